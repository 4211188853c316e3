"""What a run says before its first step is what its steps then take, and the run is the same for having said it."""

import json
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers import estimate as estimates
from graft_pack.trainers.meter import Meter

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

STEPS = 60
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}


def lora(name, **fields):
    return models.in_training(models.patcher(name), name, examples=4, **fields)


KINDS = {
    "SD1": lambda: lora("SD1", batch_size=1),
    "SD1, batch 4": lambda: lora("SD1", batch_size=4),
    "SD1, parts of a batch": lambda: lora("SD1", batch_size=4, micro_batch=2, accumulation=2),
    "checkpointed": lambda: lora("SD1", batch_size=4, checkpointing=True),
    "linear + conv": lambda: lora("SD1", batch_size=2, targets="linear + conv", rank=16, alpha=16.0),
    "Flux": lambda: lora("Flux", batch_size=4),
    "SDXL, Prodigy, average": lambda: lora("SDXL", batch_size=2, optimizer="Prodigy", ema_decay=0.99),
    "DoRA": lambda: lora("SD3", batch_size=2, method="DoRA"),
    "dropout": lambda: lora("SD1", batch_size=2, dropout=0.2),
    "all weights": lambda: lora("SD1", batch_size=2, ema_decay=0.999, **FULL),
    "all weights, clipped": lambda: lora("SD1", batch_size=2, **{**FULL, "max_grad_norm": 1.0}),
    "all weights, bf16, Adafactor": lambda: lora(
        "SD1", batch_size=1, optimizer="Adafactor", beta1=0.0, beta2=0.0, weight_dtype="bf16", **FULL
    ),
    "text encoder": lambda: models.with_text("SD1", batch_size=2),
    "word": lambda: models.learning_word("SD1", batch_size=2),
}


class _Enough(Exception):
    """Ends a training after its third step."""


def observed(training, folder, watched=(2, 4), **fields):
    """(the event told before the first step, bytes at the most in the steps after the first)."""
    told = []
    weights = list(training.denoiser.module.parameters()) + list(training.denoiser.module.buffers())
    if training.plan.recipe.live_text:
        weights += list(training.host.text.module.parameters()) + list(training.host.text.module.buffers())
    meter = Meter(weights)

    def report(event, payload):
        if event == "estimate":
            told.append(payload)
        if event == "step":
            if payload["step"] == watched[0] - 1:
                meter.__enter__()
            if payload["step"] == watched[1] - 1:
                meter.__exit__(None, None, None)
                raise _Enough

    training = replace(training, host=replace(training.host, report=report))
    with pytest.raises(_Enough):
        models.train(training, folder, **{"steps": STEPS, "save_every": STEPS, **fields})
    return told, meter.peak


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_told_within_15_percent(kind, tmp_path):
    with KINDS[kind]() as training:
        (told,), peak = observed(training, tmp_path)
    assert told["memory"] == pytest.approx(peak, rel=0.15)
    assert told["fits"] and told["seconds"] > 0 and told["cures"] == ()
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert kept[0]["event"] == "estimate" and kept[0]["memory"] == told["memory"]
