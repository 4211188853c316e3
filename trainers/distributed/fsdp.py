"""Weights of a tree, sharded over the processes with PyTorch's FSDP2, which gathers a block while it runs.

Gathering a block needs the shards of all processes, so all of them must reach the same blocks in the same order, in the
forward and the backward. Within a step they therefore make the same passes (`steps.step.forward_passes`). If the main
process works alone (`main_process_only`), the others serve the shards that it asks for.

Of adapters and embeddings only the frozen weights of blocks are sharded: each process has all trained weights. If all
weights are trained, those are sharded too, also outside blocks, see `TrainedShards`.

Hybrid shards are shards over the processes of a machine. Frozen weights have no gradients to sum between machines, so
FSDP2's mesh has no second dimension: each machine gathers on its own. Trained weights have no hybrid shards.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError, PeerLostError, SettingsError
from ..memory.autograd import blocks_of
from ..memory.offload import list_frozen, onload
from .trained_shards import TrainedShards

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup

    from .accelerate_group import AccelerateGroup
    from .trained_shards import Place

# Sent instead of a block's number: the main process has finished its work alone.
_DONE = -1


def check_shards(trained: bool = False) -> None:
    """Check that PyTorch's FSDP2 has the functions that this module needs.

    Args:
        trained: the trained weights are sharded.

    Raises:
        SettingsError: it lacks one; the error names the option.
    """
    try:
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        is_supported = False
    else:
        methods = ("set_custom_all_gather", "reset_iter_state", *(["set_reduce_scatter_unused_params"] * trained))
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
        group: the process group.
        shares, share: number of processes that share the weights, and this one's index among them.
        trained: the trained weights; None if they are not sharded.
        used: names of the sharded trained weights with a gradient in this process's passes.
    """

    def __init__(
        self,
        tree: nn.Module,
        keep: Iterable[torch.Tensor],
        group: AccelerateGroup,
        needs_input_grad: bool,
        processes: ProcessGroup | None = None,
        trained: dict[str, nn.Parameter] | None = None,
    ):
        """Shard the weights block by block. While it shards a block, all of its weights are on the device.

        Args:
            tree: a private tree such as `Denoiser.module`. Everything that is not sharded is placed on the device.
            keep: parameters that stay whole, frozen or not.
            group: the process group.
            needs_input_grad: whether gradients must reach the tree's input, so that every pass has a backward
                through all blocks, whatever it computes.
            processes: those that share the weights, this one among them; None for all of them.
            trained: trained weights by name. The shards take the place of the weights in this dict.

        Raises:
            ModelError: the tree has no weights that can be sharded, or a trained one that cannot.
        """
        from torch.distributed import group as groups

        self.alone = False
        self.group = group
        self._tree = tree
        self._has_gathered = False
        self._processes = processes or groups.WORLD
        self.shares, self.share = self._processes.size(), self._processes.rank()
        self.trained: TrainedShards | None = None
        self.used: set[str] = set()
        candidates = blocks_of(tree)
        places = _places(tree, trained or {})
        sharded = _shardable(tree, group.device, keep) | {*(trained or {}).values()}
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
        ignored = {*tree.parameters()} - sharded
        # Each weight is freed as soon as it is sharded.
        sharded.clear()
        if trained:
            trained.clear()
        self._shard(ignored, places)
        onload(tree, group.device)
        if trained is not None:
            self.trained = TrainedShards(self, places)
            trained.update(self.trained.parameters)
        if needs_input_grad:
            tree.register_forward_pre_hook(_require_input_grad)

    def _shard(self, ignored: set[nn.Parameter], places: dict[str, list[Place]]) -> None:
        """Hand the tree to FSDP2, which leaves the ignored weights alone and shards all others."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        # The warning is about in-place changes of a block's output. `OutOfPlace` turns those into new tensors.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = DeviceMesh.from_group(self._processes, self.group.device.type)
        names = {place: name for name, held in places.items() for place in held}
        self._modules = [*self._blocks, self._tree]
        for number, module in enumerate(self._modules):
            trained = [(place, names.pop(place)) for place in _parameter_places(module) if place in names]
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
            module.set_custom_all_gather(_AllGather(self, number))
            # By default FSDP2 prefetches by the order that each process has computed, which differs between processes.
            # The module itself is gathered already, so naming it turns prefetching off.
            module.set_modules_to_backward_prefetch([module])
            if trained:
                module.set_custom_reduce_scatter(_ReduceScatter(self.group))
                # The loss is divided by the samples of all processes already.
                module.set_gradient_divide_factor(1.0)
                _Watch(module, trained, self.used)
        if places:
            # Processes may have used different weights, but their messages must have one size.
            self._tree.set_reduce_scatter_unused_params(True)

    def gather(self, number: int, whole: torch.Tensor, shard: torch.Tensor, asynchronous: bool):
        """All-gather a module's weights from the shards of all processes that share them.

        Raises:
            PeerLostError: a process has left.
        """
        self._has_gathered = True
        if self.alone:
            self.group.broadcast_int(number)
        return self.group.gather_shares(whole, shard, self._processes, asynchronous)

    def gather_published(self, number: int) -> torch.Tensor:
        """Return a whole tensor that the trained shards have published. Call it in `main_process_only` alone."""
        assert self.alone, "a tensor in shards is read where the other processes do not serve"
        self.group.broadcast_int(len(self._modules) + number)
        return self.trained.gather(number)

    def gather_bytes(self, whole: torch.Tensor, shard: torch.Tensor) -> None:
        """All-gather a tensor with the same number of bytes from each process. Raise PeerLostError if one has left."""
        parts = (tensor.view(-1).view(torch.uint8) for tensor in (whole, shard))
        self.group.gather_shares(*parts, self._processes, False)

    @contextmanager
    def main_process_only(self) -> Iterator[bool]:
        """Yield True in the main process and False in the others, which first serve shards until it has finished."""
        if not self.group.is_main:
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
        self.group.broadcast_int(_DONE)

    def _serve(self) -> None:
        """Take part in gathering the blocks that the main process asks for, until it has finished."""
        from torch.distributed import get_process_group_ranks

        shares_with_main = 0 in get_process_group_ranks(self._processes)
        while (number := self.group.broadcast_int(_DONE)) != _DONE:
            if number >= len(self._modules):
                self.trained.gather(number - len(self._modules))
            elif shares_with_main:
                self._modules[number].unshard()
                self._modules[number].reshard()

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


class _ReduceScatter:
    """Reduce-scatter function that FSDP2 calls for the gradients of one block: their sum, whatever it asks for."""

    def __init__(self, group: AccelerateGroup):
        self._group = group

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group, op, async_op: bool = False):
        return self._group.scatter_sum(output_tensor, input_tensor, group, async_op)


class _Watch:
    """Hook of a module's first forward that notes which of its weights get a gradient in a backward."""

    def __init__(self, module: nn.Module, trained: list[tuple[Place, str]], used: set[str]):
        self._trained, self._used = trained, used
        # FSDP2's own hook runs before: the module then holds the weights that autograd sees.
        self._handle = module.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self._handle.remove()
        for (owner, leaf), name in self._trained:
            owner._parameters[leaf].register_post_accumulate_grad_hook(partial(self._note, name))

    def _note(self, name: str, weight: nn.Parameter) -> None:
        self._used.add(name)


def _parameter_places(tree: nn.Module) -> list[Place]:
    return [
        (owner, leaf) for owner in tree.modules() for leaf, weight in owner._parameters.items() if weight is not None
    ]


def _places(tree: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, list[Place]]:
    """Return the modules that hold each trained weight. Make the weights contiguous, as FSDP2 requires."""
    for weight in trained.values():
        weight.data = weight.data.contiguous()
    names = {weight: name for name, weight in trained.items()}
    places: dict[str, list[Place]] = {name: [] for name in trained}
    for owner, leaf in _parameter_places(tree):
        if owner._parameters[leaf] in names:
            places[names[owner._parameters[leaf]]].append((owner, leaf))
    return places


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
