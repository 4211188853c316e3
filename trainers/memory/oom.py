"""Out-of-memory errors of torch, Python and device drivers."""

from __future__ import annotations

import torch

# How hosts and devices say it where they have no exception of its own for it.
_SAID = ("out of memory", "not enough memory", "allocate memory", "could not allocate", "alloc_failed", "alloc failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, Python or a device's driver says that memory ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SAID)


def in_one_line(error: BaseException) -> str:
    """The first line of what an exception says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
