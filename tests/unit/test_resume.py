"""Tests that a run stopped anywhere and queued again gives the same bits as an uninterrupted one."""

import json
import os

import pytest
import torch
from graft_pack.trainers.engine.checkpointer import Checkpointer
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.optimizers.ema import MovingAverage
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION

from tests.support.diffusers_host import make_host, run_session, same_state, same_tensors, state_of

# Every option that has state, and a last batch smaller than the others.
FULL = {
    "steps": 6,
    "batch_size": 2,
    "accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "validation_fraction": 0.2,
    "validate_every": 2,
    "save_every": 2,
    "preview_prompts": ("a red picture",),
    "preview_every": 3,
    "preview_steps": 2,
}


class Cancelled(BaseException):
    """A cancellation as newer hosts raise it: not an Exception."""


class Stopper:
    """A report that raises at the n-th of all events, and records them."""

    def __init__(self, number=-1, error=Cancelled):
        self.number = number
        self.error = error
        self.events = []

    def __call__(self, event, payload):
        self.events.append((event, payload))
        if len(self.events) - 1 == self.number:
            raise self.error


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return (events, result) of an uninterrupted run."""
    watcher = Stopper()
    result = run_session(tmp_path_factory.mktemp("straight"), watcher, **FULL)
    return [event for event, _ in watcher.events], result


def places(events, count):
    """Return event numbers to stop at: each kind's first and last, and others spread evenly, at least `count`."""
    chosen = set()
    for kind in dict.fromkeys(events):
        numbers = [number for number, event in enumerate(events) if event == kind]
        chosen |= {numbers[0], numbers[-1]}
    every = max(1, len(events) // count)
    return sorted(chosen | set(range(0, len(events), every)))


def test_stopped_at_any_event(straight, tmp_path, trials):
    events, expected = straight
    for number in places(events, trials(3, len(events))):
        folder = tmp_path / str(number)
        with pytest.raises(Cancelled):
            run_session(folder, Stopper(number), **FULL)
        resumed = run_session(folder, **FULL)
        assert same_state(state_of(resumed), state_of(expected)), f"stopped at event {number}, {events[number]}"
        assert same_tensors(resumed.adapter, expected.adapter)
        assert resumed.losses == expected.losses


@pytest.mark.parametrize("step", [1, 2, 5])
def test_killed_without_a_chance_to_save(step, straight, tmp_path, monkeypatch):
    """As in a power cut, the run resumes from its last periodic save."""
    events, expected = straight
    number = [place for place, event in enumerate(events) if event == "step"][step - 1]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save_after_error", lambda *given: None)
        with pytest.raises(Cancelled):
            run_session(tmp_path, Stopper(number), **FULL)
    resumed = run_session(tmp_path, **FULL)
    assert resumed.resumed_from == (step - 1) // 2 * 2
    assert same_state(state_of(resumed), state_of(expected))


def test_a_damaged_state_is_passed_over(straight, tmp_path):
    _, expected = straight
    result = run_session(tmp_path, **{**FULL, "steps": 6})
    newest = os.path.join(result.run.folder, "state-00000006.safetensors")
    with open(newest, "r+b") as file:
        file.truncate(1000)
    resumed = run_session(tmp_path, **FULL)
    assert resumed.resumed_from == 4
    assert same_state(state_of(resumed), state_of(expected))


def test_the_log_tells_each_step_once(straight, tmp_path, monkeypatch):
    import json

    events, expected = straight
    number = [place for place, event in enumerate(events) if event == "step"][4]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save_after_error", lambda *given: None)
        with pytest.raises(Cancelled):
            run_session(tmp_path, Stopper(number), **FULL)
    resumed = run_session(tmp_path, **FULL)
    with open(os.path.join(resumed.run.folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines if line["event"] == "step"] == expected.losses


def test_a_finished_run_is_returned_without_work(tmp_path):
    first = run_session(tmp_path, **FULL)
    host = make_host()
    again = run_session(tmp_path, host=host, **FULL)
    assert host.denoiser.calls == host.codec.calls == 0
    assert again.resumed_from == 6
    assert same_tensors(again.adapter, first.adapter)
    assert again.losses == first.losses
    assert again.adapter.metadata == first.adapter.metadata


def test_more_steps_extend_a_run(tmp_path):
    run_session(tmp_path / "parts", steps=2)
    extended = run_session(tmp_path / "parts", steps=5)
    straight = run_session(tmp_path / "whole", steps=5)
    assert extended.resumed_from == 2
    assert same_state(state_of(extended), state_of(straight))


def test_fewer_steps_than_there_are_give_a_run_of_that_length(tmp_path):
    """The length stays: a second call returns the run, and the named file exists."""
    watcher = Stopper()
    run_session(tmp_path, steps=6, keep_last=2, save_every=1)
    short = run_session(tmp_path, watcher, steps=2, keep_last=2, save_every=1)
    expected = run_session(tmp_path / "straight", steps=2)
    assert same_tensors(short.adapter, expected.adapter)
    assert all(os.path.exists(payload["path"]) for event, payload in watcher.events[-1:] if event == "saved")
    host = make_host()
    again = run_session(tmp_path, host=host, steps=2, keep_last=2, save_every=1)
    assert host.denoiser.calls == 0
    assert same_tensors(again.adapter, expected.adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"preview_prompts": ("a", "b"), "preview_every": 1, "preview_steps": 1},
        {"save_every": 1, "keep_last": 1},
        {"micro_batch": 1},
        {"checkpointing": "on"},
        {"recompute": ALL_BUT_ATTENTION, "checkpointing": "on"},
        {"gradient_check": "on"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_does_not_decide_the_result_does_not_restart_it(fields, tmp_path):
    run_session(tmp_path, steps=2)
    resumed = run_session(tmp_path, steps=4, **fields)
    assert resumed.resumed_from == 2
    straight = run_session(tmp_path / "straight", steps=4)
    assert resumed.losses == pytest.approx(straight.losses, rel=1e-5)


@pytest.mark.parametrize("on_existing, from_step, runs", [("resume", 2, 1), ("start over", 0, 1), ("new", 0, 2)])
def test_what_to_do_with_an_existing_run(on_existing, from_step, runs, tmp_path):
    run_session(tmp_path, steps=2)
    result = run_session(tmp_path, steps=4, on_existing=on_existing)
    assert result.resumed_from == from_step
    assert len(list((tmp_path / "runs").iterdir())) == runs


def test_a_folder_of_another_run_is_refused(tmp_path):
    from graft_pack.trainers.formats import json_files

    result = run_session(tmp_path, steps=1)
    path = os.path.join(result.run.folder, "recipe.json")
    json_files.write_own_json(path, {**json_files.read_own_json(path), "identity": "another"})
    with pytest.raises(RunError, match="belongs to another run"):
        run_session(tmp_path, steps=2)


def test_only_the_last_states_and_adapters_are_kept(tmp_path):
    result = run_session(tmp_path, steps=6, save_every=1, keep_last=3)
    assert result.run.states() == [4, 5, 6]
    assert sorted(os.listdir(result.run.adapters)) == [f"step-{step:08d}.safetensors" for step in (4, 5, 6)]


def test_pictures_and_captions_are_encoded_once(tmp_path):
    run_session(tmp_path, steps=1)
    host = make_host()
    run_session(tmp_path, host=host, steps=1, seed=1)
    assert host.codec.calls == 0


def test_the_global_random_state_is_not_touched(tmp_path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    run_session(tmp_path, **FULL)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("where", ["optimiser", "average"])
def test_a_step_that_fails_halfway_is_not_kept(where, straight, tmp_path, monkeypatch):
    """Some weights have changed but the step is incomplete, so no part of it may be saved as the step before."""
    owner = torch.optim.AdamW if where == "optimiser" else MovingAverage
    real = owner.step
    calls = []

    def failing(self, *args, **kwargs):
        real(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(owner, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        run_session(tmp_path, **FULL)
    monkeypatch.undo()
    resumed = run_session(tmp_path, **FULL)
    assert resumed.resumed_from == 2
    assert same_tensors(resumed.adapter, straight[1].adapter)
    assert resumed.losses == straight[1].losses


def test_a_shorter_run_keeps_the_longer_ones_files(tmp_path):
    run_session(tmp_path, steps=4)
    run_session(tmp_path, steps=2, keep_last=1)
    assert run_session(tmp_path, steps=4).resumed_from == 4


def test_a_new_run_that_was_stopped_is_the_one_to_go_on_with(tmp_path):
    run_session(tmp_path, steps=2)
    with pytest.raises(Cancelled):
        run_session(tmp_path, Stopper(4), steps=6, on_existing="new")
    again = run_session(tmp_path, steps=6, on_existing="new")
    assert again.run.name.endswith("-2")
    assert run_session(tmp_path, steps=6, on_existing="new").run.name.endswith("-3")


def test_a_flipped_bit_in_a_state_is_told_and_resumed_to_the_same_bits(straight, tmp_path):
    _, expected = straight
    result = run_session(tmp_path, **FULL)
    newest = os.path.join(result.run.folder, "state-00000006.safetensors")
    with open(newest, "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    watcher = Stopper()
    resumed = run_session(tmp_path, watcher, **FULL)
    assert resumed.resumed_from == 4
    assert same_state(state_of(resumed), state_of(expected))
    (told,) = [payload for event, payload in watcher.events if event == "damaged state"]
    assert told == {"step": 4, "states": [6]}
    with open(os.path.join(result.run.folder, "metrics.jsonl"), encoding="utf-8") as file:
        (logged,) = [event for event in map(json.loads, file) if event["event"] == "damaged state"]
    assert logged["state"] == 6 and logged["step"] == 4 and newest in logged["reason"]
