"""Division of each step's samples between the processes that train together.

All processes hold the same trained weights and the same optimizer state. Each computes the gradients of its part of a
batch, and every process steps with the sum. So the result equals a single process's, up to the order of additions. Only
the main process writes files.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..protocols import Group

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)


def rows_of(sizes: Sequence[int], rank: int, world_size: int) -> list[slice]:
    """Return the rows of each batch that one process computes.

    Concatenates the rows of all batches and splits them into contiguous ranges whose lengths differ by at most one.

    Args:
        sizes: sizes of the batches.
        rank: index of the process.
        world_size: number of processes.
    """
    total = sum(sizes)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    rows = []
    for size in sizes:
        rows.append(slice(min(max(first, 0), size), min(max(last, 0), size)))
        first, last = first - size, last - size
    return rows


def report_idle(group: Group, pictures: int) -> None:
    """Log a warning if there are more processes than pictures in a step."""
    if group.is_main and group.world_size > pictures:
        log.warning(
            "Graft: %d processes train only %d pictures per step, so some idle. Raise batch_size, or start fewer.",
            group.world_size,
            pictures,
        )
