"""Stochastic rounding to bfloat16, which keeps the small steps that rounding to the nearest loses."""

from __future__ import annotations

import torch


def round_stochastically(values: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Float32 values as bfloat16: up or down with the chance that makes the mean exact (Gupta et al. 2015).

    A bfloat16 is the upper half of a float32: a random lower half is added, whatever it carries over is kept, and the
    rest is cut off.

    Args:
        values: finite, float32, of any shape.
        source: on the device of the values.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=source)
    noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return noise.view(torch.float32).to(torch.bfloat16)
