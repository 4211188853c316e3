"""Protocol of a process group: the processes that train together, as one of them sees it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class GradientReducer:
    """Sum of the gradients over a group, step by step. This base class is that of one process: nothing to sum."""

    def begin(self) -> None:
        """Start a step, before its first backward. Raise PeerLostError as `Group.all_reduce` does."""

    def last_backward(self) -> AbstractContextManager:
        """Return a context for the last backward of the step: gradients may be sent while it runs."""
        return nullcontext()

    def finish(self) -> None:
        """Replace each gradient by its sum over all processes. If no process has a gradient, it stays None."""

    def close(self) -> None:
        """Remove the hooks from the parameters."""


class Group:
    """Process group of a training, as one process sees it. This base class is a group of one process.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of processes.
        sharded: weights of the denoiser are sharded over the processes.
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

    def reducer(self, parameters: Sequence[nn.Parameter], half: bool = False) -> GradientReducer:
        """Return the sum of the parameters' gradients over all processes.

        Args:
            parameters: in the order in which the forward uses them.
            half: send float32 gradients as bfloat16.
        """
        return GradientReducer()

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

    def shard(
        self,
        tree: nn.Module,
        keep: Iterable[torch.Tensor],
        needs_input_grad: bool,
        hybrid: bool,
        trained: dict[str, nn.Parameter] | None = None,
    ) -> Any:
        """Shard the frozen weights of a tree's blocks, see `fsdp.ShardedWeights`. Do nothing with one process.

        Args:
            hybrid: shard them over the processes of each machine, and hold all shards on every machine.
            trained: trained weights by name, to shard too: the shards take their place in this dict.

        Returns:
            The `TrainedShards`; None if no trained weights are sharded.
        """
        return None

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
