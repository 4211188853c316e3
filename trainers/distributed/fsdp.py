"""Frozen weights of blocks, sharded over the processes with PyTorch's FSDP2, which gathers a block while it runs.

Gathering a block needs the shards of all processes, so all of them must reach the same blocks in the same order, in the
forward and the backward. Within a step they therefore make the same passes (`steps.step.forward_passes`). If the main
process works alone (`main_process_only`), the others serve the shards that it asks for. Trained weights are not
sharded: each process has all of them.

Hybrid shards are shards over the processes of a machine. Frozen weights have no gradients to sum between machines, so
FSDP2's mesh has no second dimension: each machine gathers on its own.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError, PeerLostError, SettingsError
from ..memory.autograd import blocks_of
from ..memory.offload import list_frozen, onload

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from .accelerate_group import AccelerateGroup

# Sent instead of a block's number: the main process has finished its work alone.
_DONE = -1


def check_shards() -> None:
    """Check that PyTorch's FSDP2 has the functions that this module needs.

    Raises:
        SettingsError: it lacks one; the error names the option.
    """
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        is_supported = False
    else:
        methods = ("set_custom_all_gather", "reset_iter_state")
        is_supported = "ignored_params" in inspect.signature(fully_shard).parameters
        is_supported = is_supported and all(hasattr(FSDPModule, name) for name in methods)
    if not is_supported:
        raise SettingsError(
            f"shard is on, but PyTorch {torch.__version__} does not support it.",
            "Set shard in Graft Memory Options to off, or install a newer PyTorch: 2.14 works.",
            "options",
        )


class ShardedWeights:
    """Sharded blocks of a module tree, seen from one process.

    Attributes:
        blocks: number of sharded blocks.
        divided: bytes of the sharded weights, over all processes together.
        whole: bytes of the blocks' frozen weights that every process keeps whole.
        alone: whether this is the main process and it works alone, inside `main_process_only`.
    """

    def __init__(
        self,
        tree: nn.Module,
        keep: Iterable[torch.Tensor],
        group: AccelerateGroup,
        needs_input_grad: bool,
        processes: ProcessGroup | None = None,
    ):
        """Shard the weights block by block. While it shards a block, all of its weights are on the device.

        Args:
            tree: a private tree such as `Denoiser.module`. Everything that is not sharded is placed on the device.
            keep: parameters that stay whole, frozen or not.
            group: the process group.
            needs_input_grad: whether gradients must reach the tree's input, so that every pass has a backward
                through all blocks, whatever it computes.
            processes: those that share the weights, this one among them; None for all of them.

        Raises:
            ModelError: the tree has no weights that can be sharded.
        """
        from torch.distributed import group as groups

        self.alone = False
        self._group = group
        self._tree = tree
        self._has_gathered = False
        self._processes = processes or groups.WORLD
        candidates = blocks_of(tree)
        sharded = _shardable(tree, group.device, keep)
        self._blocks = [block for block in candidates if any(weight in sharded for weight in block.parameters())]
        if not self._blocks:
            raise ModelError(
                f"The model ({type(tree).__name__}) has no blocks to shard.",
                "Set shard in Graft Memory Options to off.",
                "options",
            )
        frozen = [weight for block in candidates for weight in block.parameters() if not weight.requires_grad]
        self.blocks = len(self._blocks)
        self.divided = sum(weight.nbytes for weight in sharded)
        self.whole = sum(weight.nbytes for weight in {*frozen} - sharded)
        self._shard(sharded)
        onload(tree, group.device)
        if needs_input_grad:
            tree.register_forward_pre_hook(_require_input_grad)

    def _shard(self, sharded: set[nn.Parameter]) -> None:
        """Hand the blocks to FSDP2, which shards these weights and leaves all others alone."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        # The warning is about in-place changes of a block's output. `OutOfPlace` turns those into new tensors.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = DeviceMesh.from_group(self._processes, self._group.device.type)
        ignored = {*self._tree.parameters()} - sharded
        for number, block in enumerate(self._blocks):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
            block.set_custom_all_gather(_AllGather(self, number))
            # By default FSDP2 prefetches by the order that each process has computed, which differs between processes.
            # The block itself is gathered already, so naming it turns prefetching off.
            block.set_modules_to_backward_prefetch([block])
        fully_shard(self._tree, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)

    def gather(self, number: int, whole: torch.Tensor, shard: torch.Tensor, asynchronous: bool):
        """All-gather a block's weights from the shards of all processes that share them.

        Raises:
            PeerLostError: a process has left.
        """
        self._has_gathered = True
        if self.alone:
            self._group.broadcast_int(number)
        return self._group.gather_shares(whole, shard, self._processes, asynchronous)

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """Yield True in the main process and False in the others, which first serve shards until it has finished."""
        if not self._group.is_main:
            self._serve()
            yield False
            return
        self.alone = True
        try:
            yield True
        except PeerLostError:
            self.alone = False
            raise
        except BaseException:
            # Keep the original error even if the other processes are gone.
            with suppress(PeerLostError):
                self._end_work_alone()
            raise
        self._end_work_alone()

    def _end_work_alone(self) -> None:
        self.alone = False
        # An interrupted pass leaves a block gathered in this process only, even if other code caught the error.
        self.reset_after_failure()
        self._group.broadcast_int(_DONE)

    def _serve(self) -> None:
        """Take part in gathering the blocks that the main process asks for, until it has finished."""
        from torch.distributed import get_process_group_ranks

        shares_with_main = 0 in get_process_group_ranks(self._processes)
        while (number := self._group.broadcast_int(_DONE)) != _DONE:
            if shares_with_main:
                self._blocks[number].unshard()
                self._blocks[number].reshard()

    def reset_after_failure(self) -> None:
        """Reset FSDP2's state after an interrupted forward pass."""
        if self._has_gathered:
            self._tree.reset_iter_state()


class _AllGather:
    """All-gather function that FSDP2 calls for one block. It sends bytes, which every backend supports."""

    def __init__(self, weights: ShardedWeights, number: int):
        self._weights = weights
        self._number = number

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group, async_op: bool = False):
        whole, shard = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return self._weights.gather(self._number, whole, shard, async_op)


def _shardable(tree: nn.Module, device: torch.device, keep: Iterable[torch.Tensor]) -> set[nn.Parameter]:
    """Return the weights that can be sharded: they can be offloaded, are no scalars, and occur only once."""
    frozen = Counter(list_frozen([(tree, device)], keep))
    return {weight for weight, count in frozen.items() if weight.dim() > 0 and count == 1}


def _require_input_grad(tree: nn.Module, args: tuple) -> tuple:
    """Return the inputs with a first one that requires gradients (forward pre-hook)."""
    if not torch.is_grad_enabled():
        return args
    first, *others = args
    # Clone it: a network may write into its input, but autograd forbids that for a leaf.
    return (first.detach().requires_grad_().clone(), *others)
