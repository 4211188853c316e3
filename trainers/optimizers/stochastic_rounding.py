"""Stochastic rounding to bfloat16, which keeps small updates that rounding to nearest loses."""

from __future__ import annotations

import torch


def round_stochastically(values: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Round float32 values up or down to bfloat16, with the probability that keeps the mean exact (Gupta et al. 2015).

    A bfloat16 is the upper half of a float32. The function adds a random lower half, keeps the carry and clears the
    lower half.

    Args:
        values: finite, float32, of any shape.
        source: generator on the device of the values.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=source)
    noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return noise.view(torch.float32).to(torch.bfloat16)
