"""Part of each process in a training with several: its samples of each step, and its view of the run.

All processes hold the same trained weights and the same optimizer state. Each computes the gradients of its part of a
batch, and every process steps with the sum. So the result equals a single process's, up to the order of additions. Only
the main process writes files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..protocols import Group
from ..runs.checkpoint import State, read_state
from ..runs.run import Run

if TYPE_CHECKING:
    from ..runs.folders import Folders

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


class Follower(Run):
    """A run in a process other than the main process: it reads the run's folder and writes nothing."""

    def check_identity(self, identity: str) -> None:
        """Do nothing: the main process has checked it."""

    def clear(self) -> None:
        """Do nothing: the main process does it."""

    def write_recipe(self, recipe, identity, facts) -> None:
        """Do nothing: the main process does it."""

    def note_halt(self, how, step, steps) -> None:
        """Do nothing: the main process does it."""

    def forget_halt(self) -> None:
        """Do nothing: the main process does it."""

    def save(self, state, products, keep_last) -> str:
        """Do nothing: the main process does it."""
        return ""

    def check_room(self, values, slots) -> None:
        """Do nothing: the main process does it."""

    def log(self, event) -> None:
        """Do nothing: the main process does it."""

    def forget_after(self, step) -> None:
        """Do nothing: the main process does it."""

    def save_samples(self, step, pictures, rate=24) -> list[str]:
        """Do nothing: the main process does it."""
        return []


def follow(group: Group, folders: Folders) -> tuple[Run, State, bool]:
    """Receive from the main process its run, the state to resume from, and whether the run is finished.

    Raises:
        RunError: this process cannot read the run's folder, which must be on storage that all machines share.
    """
    name, step, finished = json.loads(group.broadcast_text(""))
    run = Follower.named(folders, name)
    state = State() if not step else read_state(run.state_path(step), step)
    return run, state, finished


def lead(group: Group, run: Run, state: State, finished: bool) -> None:
    """Tell the other processes the run's name, the step to resume from and whether the run is finished."""
    group.broadcast_text(json.dumps([run.name, state.step, finished]))
