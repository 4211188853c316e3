"""The processes that train together, and what the loop asks of them; unless told otherwise one trains alone.

All of them hold the same trainables and the same optimiser, compute the gradient of their share of each batch, and move
by the sum. So the result is the single process's, up to the order in which numbers are added. What is written is
written by the one that leads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .run import Run
from .state import State, read_state

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .run import Folders

log = logging.getLogger(__name__)


class Group:
    """The processes of a training, seen from one of them; this one is alone.

    Attributes:
        rank: its number among them, from 0.
        world: how many there are.
        sharded: whether they hold the denoiser's frozen weights in shares.
        paired: whether all of them have to make the same passes through the denoiser at this moment.
    """

    rank = 0
    world = 1
    sharded = False
    paired = False

    @property
    def leads(self) -> bool:
        """Whether this is the one that opens the run, saves, and tells the host."""
        return self.rank == 0

    def meet(self, number: float = 0.0) -> float:
        """Waits until all have come here; the sum of their numbers, the same to the bit in each.

        Raises:
            Parted: one of them has left instead.
        """
        return number

    def part(self) -> None:
        """Tells the others, who are on their way to a meeting, that this one leaves."""

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Puts the sum over all processes in place of each gradient; none where none has one."""

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives all the leader's values."""

    def gather(self, values: list[float], whole: int) -> list[float]:
        """The numbers of a step's examples, so many, of which each process has those of its rows."""
        return values

    def tell(self, text: str) -> str:
        """The leader's text, in all of them. Raises Parted as `meet` does."""
        return text

    def shard(self, tree: nn.Module, keep: Iterable[torch.Tensor], through: bool) -> None:
        """Shares the frozen weights of a tree's blocks out, as `shards.Shards` says; not where one trains alone."""

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """Within it the one that leads works alone, which is told True; the others have nothing to do meanwhile.

        All have to come to it, since the weights that it needs may be theirs.

        Raises:
            Parted: one of them has left.
        """
        yield self.leads

    def mend(self) -> None:
        """Lets the denoiser be asked again after a pass that did not come to its end."""


ALONE = Group()


def rows_of(sizes: Sequence[int], rank: int, world: int) -> list[slice]:
    """Which rows of each of some batches one of several processes computes.

    The rows of all are dealt as one row of examples, in stretches that differ by one at most.

    Args:
        sizes: of the batches.
    """
    total = sum(sizes)
    first, last = total * rank // world, total * (rank + 1) // world
    found = []
    for size in sizes:
        found.append(slice(min(max(first, 0), size), min(max(last, 0), size)))
        first, last = first - size, last - size
    return found


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
    name, step, finished = json.loads(group.tell(""))
    run = Follower.named(folders, name)
    state = State() if not step else read_state(run.state_path(step), step)
    return run, state, finished


def lead(group: Group, run: Run, state: State, finished: bool) -> None:
    """Tells the others which run it is and where it goes on."""
    group.tell(json.dumps([run.name, state.step, finished]))


def report_idle(group: Group, pictures: int) -> None:
    """Says so where there are more processes than pictures in a step."""
    if group.leads and group.world > pictures:
        log.warning(
            "Graft: %d processes, but %d pictures a step: some have nothing to do. Raise batch_size, or start fewer.",
            group.world,
            pictures,
        )
