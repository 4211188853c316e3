"""Random generators seeded by names and positions, so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream_seed(*parts) -> int:
    """Return a 63-bit seed derived from any values. Different values give independent random streams."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts) -> torch.Generator:
    """Return a generator seeded with `stream_seed`. It is on the CPU, so that every device gets the same noise."""
    import torch

    return torch.Generator().manual_seed(stream_seed(*parts))
