"""Peak memory of a contestant's steps in this process, in bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from . import contestants
from .contestants import Case

STEPS = 3


class Peak:
    """The peak resident memory since construction, minus the memory at construction, in bytes."""

    def __init__(self):
        from graft_pack.trainers.memory.tracking import ProcessMemory

        self._resident = ProcessMemory()

    def __call__(self) -> int:
        return self._resident.most


class _Enough(Exception):
    """The exception that ends a contestant."""


def run(case: Case, work: Callable[[Case, Callable[[], None]], None], steps: int) -> None:
    """Run a contestant's steps in this thread."""
    left = steps

    def stand():
        nonlocal left
        left -= 1
        if not left:
            raise _Enough

    with contextlib.suppress(_Enough):
        work(case, stand)


def peak_of(case: Case, name: str) -> dict[str, float]:
    """Return a contestant's peak, the model included, without imports and one-time setup."""
    import torch

    torch.set_num_threads(1)
    return {"peak": peak_of_work(case, contestants.ALL[name]), "adapters": _adapters(case, name)}


def peak_of_work(case: Case, work: Callable[[Case, Callable[[], None]], None]) -> int:
    """Return the peak of some work in bytes."""
    run(Case("SD1", case.batch, case.checkpointing), work, STEPS)
    peak = Peak()
    run(case, work, STEPS)
    return peak()


def _adapters(case: Case, name: str) -> int:
    """Return the bytes of our trained weights and their AdamW state; 0 for other contestants."""
    from tests.support import models

    if name not in ("attention", "linear + conv"):
        return 0
    ranks = {"rank": case.rank, "alpha": float(case.rank)}
    with models.in_training(case.patcher(), case.model, **ranks, targets=name) as training:
        # Values and two moments; gradients share memory with them.
        return 4 * sum(one.nbytes for one in training.plan.trainables.values())
