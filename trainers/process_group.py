"""Protocol of a process group: the processes that train together, as one of them sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


class Group:
    """Process group of a training, as one process sees it. This base class is a group of one process.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of processes.
        sharded: the denoiser's frozen weights are sharded over the processes.
        lockstep: all processes must run the same forward passes of the denoiser now.
    """

    rank = 0
    world_size = 1
    sharded = False
    lockstep = False

    @property
    def is_main(self) -> bool:
        """Report whether this is the main process, which opens the run, saves, and reports to the host."""
        return self.rank == 0

    def all_reduce(self, number: float = 0.0) -> float:
        """Wait for all processes and return the sum of their numbers, the same to the bit in each process.

        Raises:
            PeerLostError: another process has ended.
        """
        return number

    def abort(self) -> None:
        """Tell the other processes that this one ends, so that their next `all_reduce` raises PeerLostError."""

    def all_reduce_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes. If no process has a gradient, it stays None."""

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy the main process's values into the tensors of all processes."""

    def gather(self, values: list[float], whole: int) -> list[float]:
        """Gather one number per sample of a step from all processes.

        Args:
            values: the numbers of this process's samples.
            whole: number of samples over all processes.
        """
        return values

    def broadcast_text(self, text: str) -> str:
        """Return the main process's text in all processes. Raise PeerLostError as `all_reduce` does."""
        return text

    def shard(self, tree: nn.Module, keep: Iterable[torch.Tensor], needs_input_grad: bool) -> None:
        """Shard the frozen weights of a tree's blocks, see `fsdp.ShardedWeights`. Do nothing with one process."""

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """Let only the main process work in the block: it gets True, the others get False.

        All processes must enter the block, because the main process may need their shards of the weights.

        Raises:
            PeerLostError: another process has ended.
        """
        yield self.is_main

    def reset_after_failure(self) -> None:
        """Reset the denoiser after an interrupted forward pass."""


ALONE = Group()
