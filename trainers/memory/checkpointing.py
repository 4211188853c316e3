"""Activation checkpointing of blocks, with the out-of-place rule inside the recomputed part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .autograd import OutOfPlace

if TYPE_CHECKING:
    from torch import nn


# As it comes by, whatever stands in its place in `torch.nn.functional`.
_ATTENTION = torch._C._nn.scaled_dot_product_attention


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
