"""Tests of what the validation loss decides: the step whose files are kept as the best, and an early end."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.formats.adapter import load_adapter
from graft_pack.trainers.recipe.options import STOPS_FALLING
from graft_pack.trainers.runs.folders import Folders, Halt
from graft_pack.trainers.runs.reports import has_stopped_falling, lowest
from graft_pack.trainers.runs.run import STOPPED, Run
from graft_pack.trainers.runs.saves import list_saves, pick_save, read_best

from tests.support.diffusers_host import make_dataset, make_host, run_session, same_state, state_of
from tests.support.process_group import ProcessGroup
from tests.unit.test_resume import Cancelled, Stopper

# Three pictures, a fourth to validate with, and a rate at which they are soon learned by heart.
OVERFITS = {"steps": 40, "learning_rate": 0.1, "validation_fraction": 0.25, "validate_every": 2, "save_every": 2}
OVERFITS |= {"keep_best": "on", "keep_last": 2, "on_existing": "resume"}
STOPS = {**OVERFITS, "stop_when": STOPS_FALLING, "patience": 4}


def train(folder, report=None, **fields):
    return run_session(folder, report, dataset=make_dataset(4), **fields)


def folders_of(folder):
    return Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))


def best_path(result):
    return os.path.join(result.run.adapters, "best.safetensors")


def events_of(run, kind):
    with open(os.path.join(run.folder, "metrics.jsonl")) as file:
        return [event for event in map(json.loads, file) if event["event"] == kind]


def end_of(run, resumed=0):
    """Return (step, best step, best loss) at which patience ends a run with these validation losses.

    When a loss falls for the last time depends on the CPU's rounding.
    """
    best = 0, math.inf
    for event in events_of(run, "validation"):
        best = min(best, (event["step"], event["loss"]), key=lambda row: row[1])
        if event["step"] - max(best[0], resumed) == STOPS["patience"] * STOPS["validate_every"]:
            return event["step"], *best
    return 40, *best


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return (folder, result) of a run that overfits and keeps every save."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder, **{**OVERFITS, "keep_last": 100})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return (folder, events, result) of the same run, which ends by itself."""
    folder, watcher = tmp_path_factory.mktemp("stopped"), Stopper()
    return folder, watcher.events, train(folder, watcher, **STOPS)


def same_files(a, b):
    a, b = load_adapter(a), load_adapter(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_kept_save_is_that_of_the_lowest_validation_loss(straight):
    folder, result = straight
    losses = state_of(result).validation
    step, loss = min(losses, key=lambda row: row[1])
    assert losses[0][0] < step < losses[-1][0], "the run does not overfit"
    assert read_best(result.run) == (step, loss)
    assert same_files(best_path(result), os.path.join(result.run.adapters, f"step-{step:08d}.safetensors"))
    last = os.path.join(result.run.adapters, f"step-{result.step:08d}.safetensors")
    assert not same_files(best_path(result), last)
    kept = events_of(result.run, "best")
    assert kept[-1] == {"event": "best", "step": step, "loss": loss}
    assert [row["loss"] for row in kept] == sorted((row["loss"] for row in kept), reverse=True)


def test_pruning_keeps_the_best_and_it_can_be_picked(straight, tmp_path):
    result = train(tmp_path, **OVERFITS)
    best, _ = read_best(straight[1].run)
    assert sorted(os.listdir(result.run.adapters)) == [
        "best.safetensors",
        "step-00000038.safetensors",
        "step-00000040.safetensors",
    ]
    assert same_files(best_path(result), best_path(straight[1]))
    places = folders_of(tmp_path)
    assert list(list_saves(places, result.run)) == sorted({best, 38, 40})
    picked = pick_save(places, result.run, best)
    assert picked == {"adapter": f"{result.run.name}-step-{best}.safetensors"}
    assert same_files(os.path.join(places.adapters, picked["adapter"]), best_path(result))
    # Starting over removes it with the rest.
    result.run.clear()
    assert not os.path.exists(best_path(result))


def test_the_best_of_an_average_holds_the_average(tmp_path):
    result = train(tmp_path, **{**OVERFITS, "steps": 4, "ema_decay": 0.9, "keep_last": 9})
    step, _ = read_best(result.run)
    assert same_files(best_path(result), os.path.join(result.run.adapters, f"step-{step:08d}.safetensors"))


@pytest.mark.parametrize("event", ["validation", "best"])
def test_interrupted_anywhere_the_best_is_the_same(straight, tmp_path, event):
    best, _ = read_best(straight[1].run)

    class AtBest(Stopper):
        def __call__(self, name, payload):
            if name == event and payload["step"] == best:
                raise self.error

    with pytest.raises(Cancelled):
        train(tmp_path, AtBest(), **OVERFITS)
    result = train(tmp_path, **OVERFITS)
    assert same_files(best_path(result), best_path(straight[1]))
    assert read_best(result.run) == read_best(straight[1].run)
    assert events_of(result.run, "best") == events_of(straight[1].run, "best")


def test_steps_that_are_repeated_report_the_best_again(straight, tmp_path):
    """A crash leaves a best save of a later step than the last state."""
    result = train(tmp_path, **{**OVERFITS, "keep_last": 100})
    best, _ = read_best(straight[1].run)
    for step in result.run.states():
        if step >= best:
            os.remove(result.run.state_path(step))
    again = train(tmp_path, **OVERFITS)
    assert events_of(again.run, "best") == events_of(straight[1].run, "best")
    assert same_files(best_path(again), best_path(straight[1]))


def test_a_damaged_best_is_replaced(tmp_path):
    result = train(tmp_path, **{**OVERFITS, "steps": 2})
    with open(best_path(result), "r+b") as file:
        file.truncate(20)
    assert read_best(result.run) is None and list(list_saves(folders_of(tmp_path), result.run)) == [2]
    assert read_best(train(tmp_path, **{**OVERFITS, "steps": 4}).run)[0] == 4


def test_it_ends_within_the_patience_and_says_why(straight, stopped):
    _, events, result = stopped
    step, best, loss = end_of(straight[1].run)
    assert read_best(result.run) == (best, loss)
    assert result.step == step == best + 4 * 2 < 40
    assert result.run.halt() == Halt(STOPPED, result.step, 40)
    reason = {"event": "early stop", "step": result.step, "best": best, "loss": loss}
    assert [row for row in events if row[0] in ("early stop", "stopped")] == [
        ("early stop", reason),
        ("stopped", {"step": result.step, "steps": 40}),
    ]
    assert events_of(result.run, "early stop") == [reason]
    assert same_state(state_of(result), straight[1].run.load(result.step))


def test_queued_again_it_returns_what_was_kept(stopped):
    folder, _, result = stopped
    host = make_host()
    again = run_session(folder, host=host, dataset=make_dataset(4), **STOPS)
    assert (again.step, again.resumed_from, host.codec.calls) == (result.step, result.step, 0)


def test_resumed_it_goes_on_with_the_patience_anew(straight, tmp_path):
    result = train(tmp_path, **STOPS)
    result.run.forget_halt()
    again = train(tmp_path, **STOPS)
    assert (again.resumed_from, again.step) == (result.step, end_of(straight[1].run, result.step)[0])
    again.run.forget_halt()
    whole = train(tmp_path, **{**STOPS, "stop_when": "off"})
    assert whole.step == 40 and same_state(state_of(whole), state_of(straight[1]))


def test_interrupted_it_ends_at_the_same_step(stopped, tmp_path):
    _, events, expected = stopped
    number = len(events) * 2 // 3
    with pytest.raises(Cancelled):
        train(tmp_path, Stopper(number), **STOPS)
    result = train(tmp_path, **STOPS)
    assert result.step == expected.step and same_state(state_of(result), state_of(expected))


def test_interrupted_at_the_validation_that_ends_it_it_has_ended(stopped, tmp_path):
    _, _, expected = stopped

    class AtEnd(Stopper):
        def __call__(self, name, payload):
            if name == "validation" and payload["step"] == expected.step:
                raise self.error

    with pytest.raises(Cancelled):
        train(tmp_path, AtEnd(), **STOPS)
    result = train(tmp_path, **STOPS)
    assert (result.step, result.resumed_from) == (expected.step, expected.step)
    assert same_state(state_of(result), state_of(expected))
    assert events_of(result.run, "early stop") == events_of(expected.run, "early stop")


@pytest.mark.slow
def test_several_processes_end_together(tmp_path):
    fields = {**STOPS, "batch_size": 2, "validate_every": 1, "patience": 1}
    assert None not in ProcessGroup(2).run("train", timeout=60, folder=str(tmp_path), fields=fields)
    (path,) = (tmp_path / "runs").iterdir()
    run = Run.named(folders_of(tmp_path), path.name)
    halt = run.halt()
    assert halt.how == STOPPED and halt.step == max(run.states()) < 40
    assert read_best(run)[0] == halt.step - 1


@pytest.mark.parametrize("field", [{"keep_best": "on"}, {"stop_when": STOPS_FALLING}])
def test_without_validation_it_is_refused_before_anything_is_encoded(tmp_path, field):
    host = make_host()
    (name,) = field
    with pytest.raises(SettingsError, match=f"{name} is set, but no pictures are held out") as caught:
        run_session(tmp_path, host=host, **field)
    assert caught.value.input == name and host.codec.calls == 0


@pytest.mark.parametrize("field", [{"keep_best": "on"}, {"stop_when": STOPS_FALLING}])
def test_it_is_refused_if_no_held_out_picture_can_be_used(tmp_path, field):
    dataset = make_dataset(4)
    *others, last = dataset.examples
    dataset = replace(dataset, examples=(*others, replace(last, size=(8, 8), held_out=True)))
    with pytest.raises(SettingsError, match="is set, but the held-out pictures cannot be used .+ too small"):
        run_session(tmp_path, dataset=dataset, **field)
    assert run_session(tmp_path, dataset=dataset, steps=1).step == 1


@pytest.mark.parametrize(
    "losses, patience, ends",
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),
        ([3.0, 2.0, 2.5, 2.5], 3, False),
        ([3.0, 2.0, 2.5, 2.5, 2.5], 3, True),
        ([3.0, 2.0, 2.5, 2.5, 1.0], 3, False),
        ([3.0, 2.0, 2.5, 2.5, 2.5, 2.5], 3, False),
        ([3.0, 2.0, *[2.5] * 6], 3, True),
        ([2.0, math.nan, math.nan], 2, True),
        ([math.nan, 2.0], 1, False),
    ],
)
def test_it_has_stopped_falling_at_each_multiple_of_the_patience(losses, patience, ends):
    rows = [(10 * place, loss) for place, loss in enumerate(losses, 1)]
    last = 10 * len(losses)
    assert has_stopped_falling(rows, last, patience) is ends
    assert not has_stopped_falling(rows, last + 1, patience), "only a validation ends the run"
    if ends:
        assert lowest(rows)[1] == 2.0
