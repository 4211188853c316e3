"""Runs as the other processes of a group see them: read, never written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..protocols import Group
from ..runs.checkpoint import State, read_state
from ..runs.run import Run

if TYPE_CHECKING:
    from ..runs.run import Folders


class Follower(Run):
    """A run as those know it who train along and keep nothing of it."""

    def check_identity(self, identity: str) -> None:
        """The leader has."""

    def clear(self) -> None:
        """The leader does."""

    def write_recipe(self, recipe, identity, facts) -> None:
        """The leader does."""

    def note_halt(self, how, step, steps) -> None:
        """The leader does."""

    def forget_halt(self) -> None:
        """The leader does."""

    def save(self, state, products, keep_last) -> str:
        """The leader does."""
        return ""

    def check_room(self, values, slots) -> None:
        """The leader does."""

    def log(self, event) -> None:
        """The leader does."""

    def forget_after(self, step) -> None:
        """The leader does."""

    def save_samples(self, step, pictures) -> list[str]:
        """The leader does."""
        return []


def follow(group: Group, folders: Folders) -> tuple[Run, State, bool]:
    """The leader's run, the state that it goes on from, and whether nothing is left to do.

    Raises:
        RunError: its folder cannot be read here: it has to lie where all machines see it.
    """
    name, step, finished = json.loads(group.broadcast_text(""))
    run = Follower.named(folders, name)
    state = State() if not step else read_state(run.state_path(step), step)
    return run, state, finished


def lead(group: Group, run: Run, state: State, finished: bool) -> None:
    """Tells the others which run it is and where it goes on."""
    group.broadcast_text(json.dumps([run.name, state.step, finished]))
