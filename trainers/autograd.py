"""Exact gradients through modules that were written for inference.

Three things stand in the way and are put right here: weights made under inference mode, residuals added in
place, and the wish to leave the graph's own module as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import nn

# As it comes by, whatever stands in its place in `torch.nn.functional`.
_ATTENTION = torch._C._nn.scaled_dot_product_attention

_OUT_OF_PLACE = {}
for _name in ("add", "sub", "mul", "div"):
    _OUT_OF_PLACE[getattr(torch.Tensor, f"{_name}_")] = getattr(torch, _name)
_OUT_OF_PLACE[torch.Tensor.__iadd__] = torch.add
_OUT_OF_PLACE[torch.Tensor.__isub__] = torch.sub
_OUT_OF_PLACE[torch.Tensor.__imul__] = torch.mul
_OUT_OF_PLACE[torch.Tensor.__itruediv__] = torch.div


class OutOfPlace(TorchFunctionMode):
    """Answers `x += y` and its kin with a new tensor while gradients are recorded.

    A tensor that is changed in place after autograd saved it makes the gradient fail, or, when the change is
    repeated in a checkpoint's recomputation, silently wrong. Holds for statements that rebind their left side;
    the gradient checks of the tests say for each architecture whether that is so.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every call of torch's comes by here; most are none of the two kinds, and have no keywords.
        plain = _OUT_OF_PLACE.get(func)
        if plain is None:
            if not kwargs:
                return func(*args)
            if kwargs.get("out") is not None and torch.is_grad_enabled() and _recorded(args):
                # Into a given tensor autograd does not record at all.
                kwargs = {name: value for name, value in kwargs.items() if name != "out"}
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        result = plain(*args, **(kwargs or {}))
        # In place would have kept the dtype; so must this, or activations grow under half precision.
        return result if result.dtype == args[0].dtype else result.to(args[0].dtype)


def _recorded(args) -> bool:
    return any(torch.is_tensor(value) and value.requires_grad for value in args)


def own_weights(module: nn.Module) -> None:
    """Replaces parameters and buffers made under inference mode by ordinary ones of the same values.

    One at a time, so that the weights are never held twice. Must be called outside inference mode.
    """
    done: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for slots, make in ((owner._parameters, _ordinary_parameter), (owner._buffers, _ordinary_buffer)):
            for name, tensor in list(slots.items()):
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in done:
                    done[id(tensor)] = make(tensor)
                slots[name] = done[id(tensor)]


def _ordinary_parameter(tensor):
    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _ordinary_buffer(tensor):
    return tensor.detach().clone()


def private_tree(module: nn.Module) -> nn.Module:
    """A copy of a module's structure over the same storages; what is done to it does not reach the original.

    Args:
        module: with ordinary weights (see `own_weights`).

    Returns:
        A tree of frozen parameters, to inject adapters into.
    """
    memo: dict[int, object] = {}
    for tensor in module.parameters():
        memo[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    for tensor in module.buffers():
        memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(module, memo)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules at which activations are worth forgetting: the members of the outermost lists of blocks.

    A member that is a `Sequential` is taken apart, since some models iterate over it instead of calling it.
    """
    from torch import nn

    found = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for member in child.children():
                found.extend(_callable_members(member))
        elif isinstance(child, nn.ModuleDict):
            found.extend(child.children())
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            found.extend(blocks_of(child))
    return [block for block in found if any(True for _ in block.parameters())]


def _callable_members(member: nn.Module) -> list[nn.Module]:
    from torch import nn

    if isinstance(member, (nn.ModuleList, nn.Sequential)):
        return [inner for child in member.children() for inner in _callable_members(child)]
    return [member]


def checkpoint_blocks(blocks: list[nn.Module], keep_attention: bool = False) -> None:
    """Makes each block forget its activations and compute them again in the backward.

    Source: Chen et al. 2016. Only on a private tree: the block's `forward` is set on the instance.

    Args:
        blocks: of a private tree, as `blocks_of` gives them.
        keep_attention: whether what attention gives is kept, so that it is computed once; same bits. Of all that a
            block computes it is the dearest for the memory that it takes: of n tokens work grows as n squared, what
            is kept as n.
    """
    for block in blocks:
        if not is_checkpointed(block):
            block.forward = _Checkpointed(block.forward, keep_attention)


def forget_attention(blocks: list[nn.Module]) -> int:
    """Has checkpointed blocks compute attention again too; how many did not."""
    keeping = [block for block in blocks if keeps_attention(block)]
    for block in keeping:
        block.forward.keep_attention = False
    return len(keeping)


@contextmanager
def checkpointed(blocks: list[nn.Module], keep_attention: bool = False) -> Iterator[None]:
    """Within it the blocks are as `checkpoint_blocks` makes them anew, afterwards as they were."""
    before = {block: vars(block).get("forward") for block in blocks if not is_checkpointed(block)}
    keeping = {block: block.forward.keep_attention for block in blocks if is_checkpointed(block)}
    for block in keeping:
        block.forward.keep_attention = keep_attention
    checkpoint_blocks(list(before), keep_attention)
    try:
        yield
    finally:
        for block, kept in keeping.items():
            block.forward.keep_attention = kept
        for block, forward in before.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def keeps_attention(block: nn.Module) -> bool:
    """Whether a checkpointed block keeps what attention gives."""
    return is_checkpointed(block) and block.forward.keep_attention


def is_checkpointed(block: nn.Module) -> bool:
    """Whether `checkpoint_blocks` was there."""
    return isinstance(vars(block).get("forward"), _Checkpointed)


class _Checkpointed:
    """A block's forward under checkpointing, with the out-of-place rule inside the recomputed part."""

    def __init__(self, forward, keep_attention: bool = False):
        self.forward = forward
        self.keep_attention = keep_attention

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint

        # What a model notes in its option dicts on the way must be the same when the block is run again.
        args = tuple(_snapshot(value) for value in args)
        kwargs = {name: _snapshot(value) for name, value in kwargs.items()}
        modes = _Attentions() if self.keep_attention else OutOfPlace
        return checkpoint(self._run, modes, *args, use_reentrant=False, **kwargs)

    def _run(self, modes, *args, **kwargs):
        with modes():
            return self.forward(*args, **kwargs)


class _Attentions:
    """What the attentions of one pass of a block gave, from its forward until it is run again.

    Called for the mode of each time that the block is run.
    """

    def __init__(self):
        # One row for each attention: what notes it, and what answers with it.
        self._rows: list[tuple] = []
        self._runs = 0

    def __call__(self) -> OutOfPlace:
        self._runs += 1
        # Whoever goes back through the same graph once more finds nothing kept.
        return _KeepingAttention(self._rows, self._runs == 1) if self._runs <= 2 else OutOfPlace()


class _KeepingAttention(OutOfPlace):
    """The out-of-place rule; attention is computed when the block is run first, and answered from then on."""

    def __init__(self, rows: list[tuple], first: bool):
        super().__init__()
        self._rows = rows
        self._first = first
        self._place = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not _ATTENTION or not torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        if self._first:
            # Around each alone: what watches all operations of a block costs more than attention on few tokens.
            self._rows.append(_noting_and_answering())
        noting, answering = self._rows[self._place]
        self._place += 1
        with noting if self._first else answering:
            return func(*args, **(kwargs or {}))


def _noting_and_answering() -> tuple:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_keeps)


def _keeps(context, operation, *args, **kwargs):
    from torch.utils.checkpoint import CheckpointPolicy

    # Each backend has one of its own; where it is made of other operations, these are computed again.
    kept = operation.name().startswith("aten::_scaled_dot_product_")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _snapshot(value):
    return dict(value) if type(value) is dict else value
