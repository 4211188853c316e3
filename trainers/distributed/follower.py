"""Read-only runs, for the processes of a group that are not the main process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..protocols import Group
from ..runs.checkpoint import State, read_state
from ..runs.run import Run

if TYPE_CHECKING:
    from ..runs.folders import Folders


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
