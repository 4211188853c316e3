"""Tensors that are computed when an operation reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map


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
