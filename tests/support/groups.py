"""Runs of one process and of several, and comparisons between them."""

import json

import pytest
import torch
from graft_pack.trainers.runs.checkpoint import read_state

from tests.support import models
from tests.support.diffusers_host import gradient_of, make_item, planned
from tests.support.process_group import ProcessGroup

# Two batches per step, the last of an epoch smaller; average, schedule, validation and previews have state too.
FULL = {
    "steps": 6,
    "batch_size": 2,
    "accumulation": 2,
    "schedule": "cosine",
    "ema_decay": 0.9,
    "validation_fraction": 0.2,
    "validate_every": 2,
    "save_every": 2,
    "keep_last": 10,
    "preview_prompts": ("a red picture",),
    "preview_every": 3,
    "preview_steps": 1,
}


# Batches of some steps.
WINDOWS = [
    [(0, [(0, 0), (1, 0), (2, 0), (3, 0)])],
    [(0, [(4, 0), (5, 0), (6, 0)]), (0, [(7, 0)])],
    # Fewer pictures than processes.
    [(1, [(2, 1)])],
]


def gradients_of(world, fields):
    """Return byte and bucket counts per process, after checking that its gradients equal one process's."""
    method = {name: fields[name] for name in ("method", "targets", "rank", "alpha") if name in fields}
    with planned([make_item(index) for index in range(8)], **method) as (plan, host):
        alone = [gradient_of(plan, host, window, step)[:2] for step, window in enumerate(WINDOWS)]
    answers = ProcessGroup(world).run("gradients", fields=fields, windows=WINDOWS)
    assert all(found == answers[0][0] for found, *_ in answers)
    for (loss, gradient), (expected, whole) in zip(answers[0][0], alone, strict=True):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert models.distance(torch.tensor(gradient), whole) <= 1e-6
    return [counts for _, *counts in answers]


def state_in(folder, step=6):
    (path,) = (folder / "runs").glob(f"*/state-{step:08d}.safetensors")
    return read_state(str(path), step)


def log_of(folder):
    (path,) = (folder / "runs").glob("*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_steps(folder):
    return [int(path.stem.removeprefix("state-")) for path in (folder / "runs").glob("*/state-*.safetensors")]


def assert_close(folder, other):
    """Check that two runs differ only by the order of floating-point sums."""
    last = max(state_steps(other))
    a, b = state_in(folder, last), state_in(other, last)
    assert (a.step, a.batches) == (b.step, b.batches)
    assert a.losses == pytest.approx(b.losses, rel=1e-4)
    pictures = a.loss_by_picture.rows
    assert pictures.keys() == b.loss_by_picture.rows.keys()
    for name, row in b.loss_by_picture.rows.items():
        assert pictures[name] == pytest.approx(row, rel=1e-3), name
    for values, others in ((a.trainables, b.trainables), (a.ema, b.ema)):
        assert values.keys() == others.keys()
        if not values:
            continue
        assert models.distance(models.joined(values.values()), models.joined(others.values())) <= 1e-4
