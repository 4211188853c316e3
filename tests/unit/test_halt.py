"""Tests of save and stop requests between steps: what is written, what is returned, and what resumes from there."""

import json
from dataclasses import replace

import pytest
from graft_pack.trainers.protocols import Command, PreviewSkipped
from graft_pack.trainers.runs.folders import Halt
from graft_pack.trainers.runs.run import PAUSED, STOPPED

from tests.support.diffusers_host import make_host, run_session, same_state, same_tensors, state_of

FIELDS = {"steps": 8, "batch_size": 2, "ema_decay": 0.9, "save_every": 100, "keep_last": 100, "on_existing": "resume"}


def host_that_asks(report=None, **wishes):
    """Return a host that sends commands after some steps: save=2, stop=5."""
    calls = []

    def asked():
        calls.append(None)
        return next((Command(wish) for wish, step in wishes.items() if step == len(calls)), None)

    return replace(make_host(report), next_command=asked)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return the result of an uninterrupted run that saved every step."""
    return run_session(tmp_path_factory.mktemp("straight"), **{**FIELDS, "save_every": 1})


def state_at(result, step):
    return result.run.load(step)


def test_save_writes_the_step_it_was_asked_after_and_goes_on(straight, tmp_path):
    result = run_session(tmp_path, host=host_that_asks(save=3), **FIELDS)
    assert result.run.states() == [3, 8]
    assert same_state(state_at(result, 3), state_at(straight, 3))
    assert same_state(state_of(result), state_of(straight))


def test_stop_makes_that_step_the_last(straight, tmp_path):
    events = []
    result = run_session(tmp_path, host=host_that_asks(lambda *event: events.append(event), stop=3), **FIELDS)
    assert (result.step, result.resumed_from, len(result.losses)) == (3, 0, 3)
    assert same_state(state_of(result), state_at(straight, 3))
    assert result.run.halt() == Halt(STOPPED, 3, 8)
    assert events[-1] == ("stopped", {"step": 3, "steps": 8})


def test_the_same_recipe_again_gives_what_was_kept_without_work(straight, tmp_path):
    first = run_session(tmp_path, host=host_that_asks(stop=3), **FIELDS)
    host = make_host()
    again = run_session(tmp_path, host=host, **FIELDS)
    assert (again.step, again.resumed_from) == (3, 3)
    assert same_tensors(again.adapter, first.adapter)
    assert host.codec.calls == 0


@pytest.mark.parametrize("steps", [5, 9])
def test_other_steps_go_on(straight, tmp_path, steps):
    run_session(tmp_path, host=host_that_asks(stop=3), **FIELDS)
    result = run_session(tmp_path, **{**FIELDS, "steps": steps})
    assert (result.step, result.resumed_from) == (steps, 3)
    assert result.run.halt() is None
    assert same_state(state_at(result, 5), state_at(straight, 5)) or steps == 9


def test_told_to_go_on_it_ends_as_if_it_was_never_stopped(straight, tmp_path):
    run_session(tmp_path, host=host_that_asks(stop=3), **FIELDS).run.forget_halt()
    result = run_session(tmp_path, **FIELDS)
    assert result.resumed_from == 3
    assert same_state(state_of(result), state_of(straight))


def test_a_stop_asked_in_the_last_step_is_the_end_as_ever(straight, tmp_path):
    result = run_session(tmp_path, host=host_that_asks(stop=8), **FIELDS)
    assert result.step == 8 and result.run.halt() is None


def test_a_stop_whose_state_is_lost_counts_for_nothing(straight, tmp_path):
    result = run_session(tmp_path, host=host_that_asks(save=2, stop=3), **FIELDS)
    with open(result.run.state_path(3), "r+b") as file:
        file.truncate(100)
    again = run_session(tmp_path, **FIELDS)
    assert (again.resumed_from, again.step) == (2, 8)
    assert same_state(state_of(again), state_of(straight))


@pytest.mark.parametrize(
    "text", ["", "[]", '{"how": "stopped"}', '{"how": "stopped", "step": "3", "steps": 8}', "[" * 9]
)
def test_a_damaged_note_counts_for_nothing(straight, tmp_path, text):
    result = run_session(tmp_path, host=host_that_asks(stop=3), **FIELDS)
    with open(f"{result.run.folder}/halted.json", "w") as file:
        file.write(text)
    assert run_session(tmp_path, **FIELDS).step == 8


def test_new_makes_another_beside_a_stopped_run_and_goes_on_with_a_paused_one(tmp_path):
    fields = {**FIELDS, "on_existing": "new"}
    first = run_session(tmp_path, host=host_that_asks(stop=3), **fields)
    second = run_session(tmp_path, host=host_that_asks(stop=4), **fields)
    assert second.run.name == f"{first.run.name}-2"
    # A stopped run counts as finished.
    third = run_session(tmp_path, host=host_that_asks(stop=2), **fields)
    assert third.run.name == f"{first.run.name}-3"
    first.run.note_halt(PAUSED, 3, 8)
    assert run_session(tmp_path, **fields).run.name == first.run.name


def test_start_over_goes_on_with_what_it_was_paused_in(straight, tmp_path):
    fields = {**FIELDS, "on_existing": "start over"}
    stopped = run_session(tmp_path, host=host_that_asks(stop=3), **fields)
    assert run_session(tmp_path, host=host_that_asks(stop=2), **fields).resumed_from == 0
    stopped.run.note_halt(PAUSED, 2, 8)
    result = run_session(tmp_path, **fields)
    assert result.resumed_from == 2
    assert same_state(state_of(result), state_of(straight))


def test_a_preview_that_should_not_be_waited_for_is_left_out(tmp_path):
    def hurried(request):
        raise PreviewSkipped

    host = make_host()
    host.denoiser.preview = hurried
    result = run_session(tmp_path, host=host, **FIELDS, preview_prompts=("a red picture",), preview_every=3)
    assert result.step == 8 and not result.run.samples()
    with open(f"{result.run.folder}/metrics.jsonl") as file:
        assert {json.loads(line)["event"] for line in file} == {"step"}
