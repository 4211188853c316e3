"""Tensors that are computed when an operation reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map


class Deferred(torch.Tensor):
    """A contiguous tensor without its numbers: each operation on it calls `compute`.

    A dispatch mode sees the operations of `compute` if it returns NotImplemented for this class.

    Args:
        compute: returns the tensor, which has this shape, dtype and device.
    """

    @staticmethod
    def __new__(cls, compute: Callable[[], torch.Tensor], shape, dtype: torch.dtype, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, compute: Callable[[], torch.Tensor], *described):
        self._compute = compute

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _computed(value):
    return value._compute() if isinstance(value, Deferred) else value
