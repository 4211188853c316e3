"""Frozen weights of blocks in shares, one in each process, put together by PyTorch's FSDP2 while a block is computed.

All processes have to come to the same blocks in the same order, forward and backward: whoever has a block's weights put
together needs everyone's share. In a step they therefore make the same passes (`forward.passes_of`); what one of them
does alone is its turn, in which the others hand it what it asks for. What is trained is whole in each.
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

    from .accelerate_group import AccelerateGroup

# In place of a block's number: the turn is over.
_OVER = -1


def check_shards() -> None:
    """Refuses a PyTorch whose FSDP2 lacks what is needed here.

    Raises:
        SettingsError: naming the option.
    """
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        found = False
    else:
        found = "ignored_params" in inspect.signature(fully_shard).parameters
        found = found and all(hasattr(FSDPModule, name) for name in ("set_custom_all_gather", "reset_iter_state"))
    if not found:
        raise SettingsError(
            f"shard is on, and PyTorch {torch.__version__} cannot do what it needs.",
            "Set shard in Graft Memory Options to off, or take a newer PyTorch: 2.14 is known to do.",
            "options",
        )


class ShardedWeights:
    """The blocks of a tree whose weights are kept in shares, as one of the processes sees them.

    Attributes:
        blocks: how many.
        divided: bytes of the weights that were shared out, in all processes together.
        whole: bytes of the blocks' frozen weights that each process keeps whole.
        alone: whether it is this process's turn.
    """

    def __init__(self, tree: nn.Module, keep: Iterable[torch.Tensor], group: AccelerateGroup, needs_input_grad: bool):
        """Shares the weights out; those of a block are on the device for the time of that, all together.

        Args:
            tree: private, as `Denoiser.module`; whatever of it is not shared out is put on the device.
            keep: parameters that stay whole, frozen or not.
            through: whether gradients are to reach the tree's input, so that each pass has a backward through all
                blocks, whatever it is about.

        Raises:
            ModelError: nothing can be shared out.
        """
        from torch.distributed import group as groups
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        self.alone = False
        self._group = group
        self._tree = tree
        self._begun = False
        candidates = blocks_of(tree)
        shared_out = _divisible(tree, group.device, keep)
        self._blocks = [block for block in candidates if any(one in shared_out for one in block.parameters())]
        if not self._blocks:
            raise ModelError(
                f"The model ({type(tree).__name__}) has no blocks whose weights could be shared out.",
                "Set shard in Graft Memory Options to off.",
                "options",
            )
        frozen = [one for block in candidates for one in block.parameters() if not one.requires_grad]
        self.blocks = len(self._blocks)
        self.divided = sum(one.nbytes for one in shared_out)
        self.whole = sum(one.nbytes for one in {*frozen} - shared_out)
        # Whatever is changed in place behind a block is changed by `OutOfPlace`, which makes a new tensor of it.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = DeviceMesh.from_group(groups.WORLD, group.device.type)
        rest = {*tree.parameters()} - shared_out
        for number, block in enumerate(self._blocks):
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
            block.set_custom_all_gather(_Gather(self, number))
            # Left alone it would fetch what it guesses comes next, by what each process has computed before: not the
            # same in all. Itself is fetched already.
            block.set_modules_to_backward_prefetch([block])
        fully_shard(tree, mesh=mesh, reshard_after_forward=True, ignored_params=rest)
        onload(tree, group.device)
        if needs_input_grad:
            tree.register_forward_pre_hook(_let_through)

    def gather(self, number: int, whole: torch.Tensor, share: torch.Tensor, asynchronous: bool):
        """Puts a block's weights together from the shares of all.

        Raises:
            Parted: one of the processes has left.
        """
        self._begun = True
        if self.alone:
            self._group.broadcast_int(number)
        return self._group.gather_shares(whole, share, asynchronous)

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """As `Group.turn`."""
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
            # What it is left by is what counts, also where nobody is there any more to be told.
            with suppress(PeerLostError):
                self._end_turn()
            raise
        self._end_turn()

    def _end_turn(self) -> None:
        self.alone = False
        # A pass that was given up, whoever caught the error, leaves a block put together here and nowhere else.
        self.reset_after_failure()
        self._group.broadcast_int(_OVER)

    def _serve(self) -> None:
        """Hands out what is asked for until the turn is over."""
        while (number := self._group.broadcast_int(_OVER)) != _OVER:
            self._blocks[number].unshard()
            self._blocks[number].reshard()

    def reset_after_failure(self) -> None:
        """As `Group.mend`."""
        if self._begun:
            self._tree.reset_iter_state()


class _Gather:
    """How FSDP2 has the weights of one block put together: by bytes, which every backend can send."""

    def __init__(self, shards: ShardedWeights, number: int):
        self._shards = shards
        self._number = number

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group, async_op: bool = False):
        whole, share = output_tensor.view(torch.uint8), input_tensor.view(torch.uint8)
        return self._shards.gather(self._number, whole, share, async_op)


def _divisible(tree: nn.Module, device: torch.device, keep: Iterable[torch.Tensor]) -> set[nn.Parameter]:
    """The weights that can be shared out: those that could be kept off the device, have parts, and one place alone."""
    frozen = Counter(list_frozen([(tree, device)], keep))
    return {one for one, places in frozen.items() if one.dim() > 0 and places == 1}


def _let_through(tree: nn.Module, args: tuple) -> tuple:
    """The network's first input as one that gradients are wanted of."""
    if not torch.is_grad_enabled():
        return args
    first, *others = args
    # A copy: a network may write into what it is given, but not into a leaf.
    return (first.detach().requires_grad_().clone(), *others)
