"""Tests of the loss-spike guard: it skips an outlier step for every kind of training, and a resumed run agrees."""

import json
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.runs.checkpoint import State
from graft_pack.trainers.runs.run import Run

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

# In this step one picture's loss is a thousand times its usual value.
SPIKE = 23
STEPS = 24
KINDS = {
    "LoRA": {},
    "fp16": {"compute_dtype": "fp16"},
    "moved within the backward": {"method": "all weights", "rank": 0, "max_grad_norm": 0.0},
    "all gradients first": {"method": "all weights", "rank": 0, "max_grad_norm": 1.0},
}


def trained(kind, folder, factor, resume=False, steps=STEPS, **options):
    """Return the run of a training with one loss spike."""
    fields = {"batch_size": 2, "learning_rate": 1e-4, **KINDS[kind], **options}
    with models.in_training(models.patcher("SD1"), "SD1", **fields) as training:
        first, second = training.plan.train

        def spiking(turn):
            shown = first.show(turn)
            return replace(shown, factor=1000.0) if turn == SPIKE - 1 else shown

        plan = replace(training.plan, train=[replace(first, show=spiking), second])
        more = {"steps": steps, "save_every": 1, "keep_last": STEPS, "loss_spike_factor": factor}
        models.train(replace(training, plan=plan), folder, resume, **more)
    return Run(str(folder / "run"), str(folder / "adapters"), str(folder / "embeddings"))


def values_at(run, step):
    return models.joined(run.load(step).trainables.values())


def events_of(run, kind):
    with open(run.folder + "/metrics.jsonl", encoding="utf-8") as file:
        events = [json.loads(line) for line in file]
    return [event for event in events if event["event"] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_spikes_moves_nothing(kind, tmp_path):
    run = trained(kind, tmp_path, 10.0)
    assert torch.equal(values_at(run, SPIKE), values_at(run, SPIKE - 1))
    assert not torch.equal(values_at(run, SPIKE + 1), values_at(run, SPIKE))
    (spike,) = events_of(run, "spike")
    assert spike["step"] == SPIKE and spike["pictures"] == ["picture 0", "picture 1"]
    assert spike["loss"] > spike["highest"]
    assert [event["step"] for event in events_of(run, "step")] == list(range(1, STEPS + 1))


def test_without_the_guard_it_does(tmp_path):
    run = trained("LoRA", tmp_path, 0.0)
    assert not torch.equal(values_at(run, SPIKE), values_at(run, SPIKE - 1))
    assert not events_of(run, "spike")


def test_a_resumed_run_leaves_out_the_same_steps(tmp_path):
    """Spike detection depends on earlier losses, which are part of the saved state."""
    whole = trained("LoRA", tmp_path / "whole", 10.0)
    trained("LoRA", tmp_path / "parts", 10.0, steps=SPIKE - 2)
    parts = trained("LoRA", tmp_path / "parts", 10.0, resume=True)
    assert torch.equal(values_at(parts, STEPS), values_at(whole, STEPS))
    assert len(events_of(parts, "spike")) == 1


@pytest.mark.parametrize("written_by", ["this version", "an earlier version"])
def test_the_moving_average_resumes_to_the_bit_after_a_spike(written_by, tmp_path, monkeypatch):
    """A skipped step does not update the average, whose decay depends on the number of updates."""
    fields = {"ema_decay": 0.99}
    whole = trained("LoRA", tmp_path / "whole", 10.0, **fields)
    before = trained("LoRA", tmp_path / "parts", 10.0, steps=SPIKE, **fields)
    assert before.load(SPIKE).ema_updates == SPIKE - 1
    if written_by == "an earlier version":
        monkeypatch.setattr(State, "ema_updates", property(lambda state: None, lambda state, value: None))
    parts = trained("LoRA", tmp_path / "parts", 10.0, resume=True, **fields)
    monkeypatch.undo()
    ours, theirs = (run.load(STEPS).ema for run in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not torch.equal(models.joined(theirs.values()), values_at(whole, STEPS)), "it averages"
