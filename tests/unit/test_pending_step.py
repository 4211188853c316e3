"""Tests of steps whose numbers the host reads while the device computes the next step, with the CPU as the device.

The device masks the update. All results, files and events must be those of a host that reads at once.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from graft_pack.trainers.engine import updater
from graft_pack.trainers.errors import NumbersError
from graft_pack.trainers.protocols import Command
from graft_pack.trainers.runs.run import Run
from graft_pack.trainers.steps import pending_step

from tests.support.diffusers_host import DiffusersDenoiser, make_host, make_unet, run_session, same_state, state_of

FIELDS = {"steps": 8, "batch_size": 2, "save_every": 100, "keep_last": 100, "on_existing": "resume"}


class Cancelled(Exception):
    """The user's interrupt."""


@pytest.fixture
def log(monkeypatch):
    """Let trainings read late. Return the list of their forward passes and reads in order."""
    calls = []
    copy, predict = pending_step.HostCopy, DiffusersDenoiser.predict

    class Copy(copy):
        def __init__(self, values, later):
            super().__init__(values, False)

        def read(self):
            calls.append("read")
            return super().read()

    def watched(self, *args):
        if torch.is_grad_enabled():
            calls.append("forward")
        return predict(self, *args)

    monkeypatch.setattr(updater, "copies_in_queue", lambda device: True)
    monkeypatch.setattr(pending_step, "HostCopy", Copy)
    monkeypatch.setattr(DiffusersDenoiser, "predict", watched)
    return calls


def lines_of(folder):
    """Return the events in the log of the one run below a folder, without times."""
    (path,) = Path(folder).glob("runs/*/metrics.jsonl")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in event.items() if name != "seconds"} for event in events]


def trained(folder, **fields):
    """Train; return (state, events of the log, names and steps of the reported events)."""
    reported = []
    host = make_host(lambda event, payload: reported.append((event, payload.get("step"))))
    result = run_session(folder, host=host, **{**FIELDS, **fields})
    return state_of(result), lines_of(folder), reported


def test_the_host_reads_behind_the_next_forward(log, tmp_path):
    trained(tmp_path, steps=4, save_every=3)
    # The gradient is checked before the first step.
    assert log[-8:] == ["forward", "forward", "read", "forward", "read", "read", "forward", "read"]


OPTIONS = {
    "plain": {},
    "no clipping": {"max_grad_norm": 0.0},
    "EMA": {"ema_decay": 0.9},
    "accumulation": {"accumulation": 2},
    "micro-batches": {"micro_batch": 1},
    "validation": {"validation_fraction": 0.3, "validate_every": 3},
    "saves": {"save_every": 3, "ema_decay": 0.9},
    "two rates": {"lora_plus_ratio": 4.0},
    "fp16": {"compute_dtype": "fp16"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_reading_later_changes_nothing(name, log, tmp_path, monkeypatch):
    later = trained(tmp_path / "later", **OPTIONS[name])
    assert "read" in log
    monkeypatch.setattr(updater, "copies_in_queue", lambda device: False)
    at_once = trained(tmp_path / "at once", **OPTIONS[name])
    assert same_state(later[0], at_once[0])
    assert later[1:] == at_once[1:]


class Sick(DiffusersDenoiser):
    """A denoiser whose n-th forward with gradients gives numbers that are not finite."""

    def __init__(self, number, in_gradient):
        super().__init__(make_unet())
        self.number, self.in_gradient = number, in_gradient

    def predict(self, x_t, sigma, conditioning):
        output = super().predict(x_t, sigma, conditioning)
        self.number -= torch.is_grad_enabled()
        if not torch.is_grad_enabled() or self.number:
            return output
        # The square root's derivative at 0 is infinite.
        return output + (output.sum() * 0).sqrt() if self.in_gradient else output * float("nan")


@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
def test_a_refused_step_leaves_the_state_before_it(in_gradient, log, tmp_path):
    fields = {**FIELDS, "ema_decay": 0.9}
    host = replace(make_host(), denoiser=Sick(4, in_gradient))
    with pytest.raises(NumbersError, match=f"The {'gradient' if in_gradient else 'loss'} of step 4 is not finite"):
        run_session(tmp_path / "sick", host=host, **fields)
    (folder,) = (tmp_path / "sick" / "runs").iterdir()
    run = Run(str(folder), str(folder), str(folder))
    assert run.states() == [3]
    sound = run_session(tmp_path / "sound", **{**fields, "save_every": 1})
    assert same_state(run.load(3), sound.run.load(3))
    assert lines_of(tmp_path / "sick") == lines_of(tmp_path / "sound")[:3]
    resumed = run_session(tmp_path / "sick", **fields)
    assert same_state(state_of(resumed), state_of(sound))
    assert lines_of(tmp_path / "sick") == lines_of(tmp_path / "sound")


@pytest.mark.parametrize("refused", [False, True], ids=["spike", "refused"])
def test_a_skipped_fp16_step_leaves_the_loss_scale(refused, log):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    own = object.__new__(updater.ParameterUpdater)
    own.in_backward, own.masks, own._limit, own._sums = False, True, 1.0, None
    own.optimizer, own._parameters, own._after_step = optimizer, [parameter], lambda: None
    own._scaler = torch.amp.GradScaler("cpu", growth_interval=1)
    states = []
    for loss, limit in ((1.0, 2.0), (float("nan") if refused else 3.0, 2.0), (1.0, 2.0)):
        parameter.grad = None
        own._scaler.scale((parameter * loss).sum()).backward()
        losses = pending_step.StepLosses([], [0.5], torch.tensor([loss]), torch.tensor([loss]), 1)
        numbers = own.clip_gradients(losses, limit)
        own.step(numbers.skip)
        state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
        states.append((own._scaler.state_dict(), state, parameter.detach().clone(), numbers.read()))
    before, skipped, after = states
    assert skipped[3].is_spike != refused and skipped[3].is_refused == refused
    assert skipped[0] == before[0] and after[0]["scale"] == 2 * before[0]["scale"]
    assert all(torch.equal(skipped[1][name], value) for name, value in before[1].items())
    assert torch.equal(skipped[2], before[2]) and not torch.equal(after[2], before[2])


@pytest.mark.parametrize("place", ["forward", "report"])
def test_an_interrupt_saves_the_last_finished_step(place, log, tmp_path):
    forwards = 0

    def check_interrupt():
        nonlocal forwards
        forwards += 1
        if place == "forward" and forwards == 5:
            raise Cancelled

    def report(event, payload):
        if place == "report" and event == "step" and payload["step"] == 4:
            raise Cancelled

    host = replace(make_host(report), check_interrupt=check_interrupt)
    with pytest.raises(Cancelled):
        run_session(tmp_path / "cancelled", host=host, **FIELDS)
    sound = run_session(tmp_path / "sound", **{**FIELDS, "save_every": 1})
    assert lines_of(tmp_path / "cancelled") == lines_of(tmp_path / "sound")[:4]
    resumed = run_session(tmp_path / "cancelled", **FIELDS)
    assert resumed.resumed_from == 4
    assert same_state(resumed.run.load(4), sound.run.load(4))
    assert same_state(state_of(resumed), state_of(sound))
    assert lines_of(tmp_path / "cancelled") == lines_of(tmp_path / "sound")


def interrupting(times, error=Cancelled):
    """Return a function that raises `error` at its call of this number."""

    def call():
        nonlocal times
        times -= 1
        if times == 0:
            raise error

    return call


def test_an_interrupt_leaves_before_the_error_of_the_pending_step(log, tmp_path):
    host = replace(make_host(), denoiser=Sick(4, False), check_interrupt=interrupting(5))
    with pytest.raises(Cancelled):
        run_session(tmp_path, host=host, **FIELDS)
    (folder,) = (tmp_path / "runs").iterdir()
    assert Run(str(folder), str(folder), str(folder)).states() == [3]


def test_an_interrupt_of_the_read_keeps_the_step(log, tmp_path, monkeypatch):
    read, interrupt = pending_step.HostCopy.read, interrupting(4, KeyboardInterrupt)
    monkeypatch.setattr(pending_step.HostCopy, "read", lambda self: interrupt() or read(self))
    with pytest.raises(KeyboardInterrupt):
        run_session(tmp_path, **FIELDS)
    (folder,) = (tmp_path / "runs").iterdir()
    assert Run(str(folder), str(folder), str(folder)).states() == [4]


@pytest.mark.parametrize("command", [Command.SAVE, Command.STOP])
def test_a_command_waits_for_the_step(command, log, tmp_path):
    calls = []

    def next_command():
        calls.append(None)
        return command if len(calls) == 3 else None

    result = run_session(tmp_path / "asked", host=replace(make_host(), next_command=next_command), **FIELDS)
    sound = run_session(tmp_path / "sound", **{**FIELDS, "save_every": 1})
    assert result.run.states()[0] == 3
    assert same_state(result.run.load(3), sound.run.load(3))


def test_memory_that_runs_out_in_the_next_step_keeps_the_order(log, tmp_path, monkeypatch):
    """The fallback's event belongs to step 3, so it follows that of step 2."""
    predict, left = DiffusersDenoiser.predict, [2]

    def short(self, *args):
        if torch.is_grad_enabled():
            left[0] -= 1
            if left[0] == -1:
                raise torch.OutOfMemoryError("out of memory")
        return predict(self, *args)

    monkeypatch.setattr(DiffusersDenoiser, "predict", short)
    _, lines, _ = trained(tmp_path, steps=4)
    names = [(line["event"], line["step"]) for line in lines]
    assert names == [("step", 1), ("step", 2), ("memory", 3), ("step", 3), ("step", 4)]


def test_memory_errors_of_an_early_read_apply_fallbacks(tmp_path, monkeypatch):
    """Without a mask the host reads the losses before the update, and may meet errors of the device's queue there."""
    read, short = pending_step.StepLosses.on_host, interrupting(3, torch.OutOfMemoryError("out of memory"))
    monkeypatch.setattr(pending_step.StepLosses, "on_host", lambda self: short() or read(self))
    _, lines, _ = trained(tmp_path, steps=3)
    names = [(line["event"], line["step"]) for line in lines]
    assert names == [("step", 1), ("step", 2), ("memory", 3), ("step", 3)]
