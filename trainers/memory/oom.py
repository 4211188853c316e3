"""Out-of-memory errors of torch, Python and device drivers."""

from __future__ import annotations

import torch

# Parts of messages from hosts and drivers that have no exception type of their own for it.
_SAID = ("out of memory", "not enough memory", "allocate memory", "could not allocate", "alloc_failed", "alloc failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Report whether an exception of torch, Python or a device driver says that memory ran out."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _SAID)


def in_one_line(error: BaseException) -> str:
    """Return the first line of an exception's message (at most 200 characters), or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
