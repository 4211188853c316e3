"""Noise and noise levels, drawn from given generators so that a resumed run draws the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def draw_sigmas(levels: torch.Tensor, count: int, source: torch.Generator) -> torch.Tensor:
    """Draw `count` noise levels, uniform over the model's own levels, [count] float32."""
    import torch

    index = torch.randint(len(levels), (count,), generator=source)
    return levels[index]


def spread_sigmas(levels: torch.Tensor, count: int) -> torch.Tensor:
    """Return `count` fixed noise levels, at the centers of equal intervals of the model's own levels, [count]."""
    import torch

    middles = (torch.arange(count) + 0.5) / count
    return levels[(middles * len(levels)).long()]


def draw_noise(shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    """Draw unit normal noise, float32 on the CPU."""
    import torch

    return torch.randn(shape, generator=source)


def add_offset(noise: torch.Tensor, strength: float | torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Add one normal number to each channel of noise [B, C, ...], so that brightness is trained (Guttenberg 2023).

    Args:
        strength: standard deviation, or one for each channel [B, C] or sample [B, 1].
    """
    import torch

    shape = (*noise.shape[:2], *[1] * (noise.ndim - 2))
    if isinstance(strength, torch.Tensor):
        strength = strength.view(*strength.shape, *shape[2:])
    return noise + strength * torch.randn(shape, generator=source)


def add_pyramid(noise: torch.Tensor, discount: float, source: torch.Generator) -> torch.Tensor:
    """Add coarser and coarser noise to noise [B, C, ..., h, w], then scale each sample to unit standard deviation.

    Each level is two to four times coarser than the one before, by a random ratio, and `discount` times as strong
    (Whitaker 2023, "Multi-resolution noise for diffusion model training").
    """
    import torch

    *lead, height, width = noise.shape
    total = noise.clone()
    high, wide = height, width
    for level in range(10):
        ratio = 2 + 2 * float(torch.rand((), generator=source))
        high = max(1, int(high / ratio**level))
        wide = max(1, int(wide / ratio**level))
        coarse = torch.randn((1, math.prod(lead), high, wide), generator=source)
        fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        total += discount**level * fine.view_as(noise)
        if high == 1 or wide == 1:
            break
    return total / total.flatten(1).std(1).view(-1, *[1] * (noise.ndim - 1))
