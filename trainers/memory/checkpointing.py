"""Activation checkpointing of blocks, with in-place operations replaced inside the recomputed part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..lowrank.deferred import BlockProducts
from .autograd import OutOfPlace

if TYPE_CHECKING:
    from torch import nn


# The function that a torch function mode receives, even if other code replaced `torch.nn.functional`'s.
_ATTENTION = torch._C._nn.scaled_dot_product_attention


def checkpoint_blocks(blocks: list[nn.Module], keep_attention: bool = False) -> None:
    """Checkpoint each block: drop its activations in the forward and recompute them in the backward.

    Source: Chen et al. 2016. Use it only on a private tree, because it sets `forward` on the block instance.

    Args:
        blocks: blocks of a private tree, from `blocks_of`.
        keep_attention: keep the outputs of attention, so that attention is computed only once. The results have the
            same bits. Keeping attention saves the most computation per byte: for n tokens its computation grows with
            n squared, its output with n.
    """
    for block in blocks:
        if not is_checkpointed(block):
            block.forward = _Checkpointed(block.forward, keep_attention)


def forget_attention(blocks: list[nn.Module]) -> int:
    """Make checkpointed blocks recompute attention too. Return the number of blocks that this changed."""
    keeping = [block for block in blocks if keeps_attention(block)]
    for block in keeping:
        block.forward.keep_attention = False
    return len(keeping)


@contextmanager
def checkpointed(blocks: list[nn.Module], keep_attention: bool = False) -> Iterator[None]:
    """Checkpoint the blocks inside the context. Restore their previous forwards and settings on exit."""
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
    """Report whether a checkpointed block keeps the outputs of attention."""
    return is_checkpointed(block) and block.forward.keep_attention


def is_checkpointed(block: nn.Module) -> bool:
    """Report whether `checkpoint_blocks` wrapped the block's forward."""
    return isinstance(vars(block).get("forward"), _Checkpointed)


class _Checkpointed:
    """A block's forward under checkpointing, with `OutOfPlace` inside the recomputed part."""

    def __init__(self, forward, keep_attention: bool = False):
        self.forward = forward
        self.keep_attention = keep_attention

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        from torch.utils.checkpoint import checkpoint

        # Models write to their option dicts during the forward. The recomputation must see the same values.
        args = tuple(_snapshot(value) for value in args)
        kwargs = {name: _snapshot(value) for name, value in kwargs.items()}
        modes = _Attentions() if self.keep_attention else OutOfPlace
        return checkpoint(self._run, modes, BlockProducts(), *args, use_reentrant=False, **kwargs)

    def _run(self, modes, products, *args, **kwargs):
        with modes(), products:
            return self.forward(*args, **kwargs)


class _Attentions:
    """Attention outputs of one forward of a block, kept until the recomputation.

    `checkpoint` calls this object once per run of the block, to get the mode for that run.
    """

    def __init__(self):
        # One (saving, replaying) pair of contexts per attention call.
        self._rows: list[tuple] = []
        self._runs = 0

    def __call__(self) -> OutOfPlace:
        self._runs += 1
        # A second backward through the same graph finds no kept outputs, so it recomputes attention too.
        return _KeepingAttention(self._rows, self._runs == 1) if self._runs <= 2 else OutOfPlace()


class _KeepingAttention(OutOfPlace):
    """`OutOfPlace` mode that saves attention outputs in the first run and replays them in the recomputation."""

    def __init__(self, rows: list[tuple], first: bool):
        super().__init__()
        self._rows = rows
        self._first = first
        self._place = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not _ATTENTION or not torch.is_grad_enabled():
            return super().__torch_function__(func, types, args, kwargs)
        if self._first:
            # One context per attention: a mode around the whole block costs more than attention on few tokens.
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

    # Each fused backend has its own operator. If attention is composed of other operators, those are recomputed.
    kept = operation.name().startswith("aten::_scaled_dot_product_")
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _snapshot(value):
    return dict(value) if type(value) is dict else value
