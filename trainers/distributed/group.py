"""The processes that train together, and what the loop asks of them; unless told otherwise one trains alone.

All of them hold the same trainables and the same optimiser, compute the gradient of their share of each batch, and move
by the sum. So the result is the single process's, up to the order in which numbers are added. What is written is
written by the one that leads.
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
    """Which rows of each of some batches one of several processes computes.

    The rows of all are dealt as one row of examples, in stretches that differ by one at most.

    Args:
        sizes: of the batches.
    """
    total = sum(sizes)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    found = []
    for size in sizes:
        found.append(slice(min(max(first, 0), size), min(max(last, 0), size)))
        first, last = first - size, last - size
    return found


def report_idle(group: Group, pictures: int) -> None:
    """Says so where there are more processes than pictures in a step."""
    if group.is_main and group.world_size > pictures:
        log.warning(
            "Graft: %d processes, but %d pictures a step: some have nothing to do. Raise batch_size, or start fewer.",
            group.world_size,
            pictures,
        )
