"""Tensors that are computed when an operation reads them, and products that a checkpointed block computes once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch.utils._pytree import tree_map

# A checkpointed block keeps an output if the frozen weight is at least so many times larger, as a modulation's is.
_LEAST_WEIGHT_RATIO = 64


class Deferred(torch.Tensor):
    """A contiguous tensor without its numbers. Each operation on it calls `compute`, which returns the tensor.

    A dispatch mode sees the operations of `compute` if it returns NotImplemented for this class.
    """

    @staticmethod
    def __new__(cls, compute: Callable[[], torch.Tensor], shape, dtype: torch.dtype, device: torch.device):
        deferred = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        deferred._compute = compute
        return deferred

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _computed(value):
    return value._compute() if isinstance(value, Deferred) else value


class BlockProducts:
    """Context of each run of one call of a checkpointed block. It saves work in the runs after the first.

    They read the first run's A x if the rank is far below the layer's width: A x is then small, and computing it reads
    all of x. They read the first run's outputs of few rows: computing them reads the whole weight. They compute the
    last product's output only if an operation reads it. Where only a frozen gate follows, no gradient needs it.
    """

    def __init__(self):
        # A x, and outputs with their versions, by the number of the product.
        self._narrow: dict[int, torch.Tensor] = {}
        self._wide: dict[int, list[tuple[torch.Tensor, int]]] = {}
        self._number = 0
        # Number of the last product, once the first run has ended.
        self._last: int | None = None

    def __enter__(self) -> None:
        self._before, _running.context = _running.context, self
        self._number = 0

    def __exit__(self, *error) -> None:
        _running.context = self._before
        self._last = self._last or self._number

    def narrow(self, keeps: bool, compute: Callable) -> torch.Tensor:
        """Return the A x of the next product."""
        self._number += 1
        if not keeps:
            return compute()
        if self._number not in self._narrow:
            self._narrow[self._number] = compute()
        # Autograd sets the graph on the tensor object that a function returns.
        return self._narrow[self._number].detach()

    def wide(self, x: torch.Tensor, ups: Sequence[torch.Tensor], compute: Callable) -> list[torch.Tensor]:
        """Return the outputs of that product, one for each B."""
        kept = self._wide.get(self._number)
        # The network may have written into them.
        if kept is not None and all(output._version == version for output, version in kept):
            return [output.detach() for output, _ in kept]
        if self._number == self._last and len(ups) == 1:
            compute = cache(compute)
            return [Deferred(lambda: compute()[0], (*x.shape[:-1], len(ups[0])), x.dtype, x.device)]
        outputs = compute()
        if x.numel() * _LEAST_WEIGHT_RATIO <= x.shape[-1] ** 2:
            self._wide[self._number] = [(output.detach(), output._version) for output in outputs]
        return outputs


class _Running(threading.local):
    """The context that a thread computes in. Autograd may run a recomputation in its own thread."""

    context: BlockProducts | None = None


_running = _Running()


def block_in_progress() -> BlockProducts | None:
    """Return the context of the checkpointed block that this thread computes, if any."""
    return _running.context
