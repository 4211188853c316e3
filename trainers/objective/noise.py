"""Noise and noise levels, drawn from seeds and positions alone so that a resumed run draws the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..data.order import stream_seed

if TYPE_CHECKING:
    import torch


def generator(*parts) -> torch.Generator:
    """A CPU generator seeded by any parts; on the CPU so that every device sees the same noise."""
    import torch

    return torch.Generator().manual_seed(stream_seed(*parts))


def draw_sigmas(levels: torch.Tensor, count: int, source: torch.Generator) -> torch.Tensor:
    """`count` noise levels, uniform over the model's own levels, [count] float32."""
    import torch

    index = torch.randint(len(levels), (count,), generator=source)
    return levels[index]


def spread_sigmas(levels: torch.Tensor, count: int) -> torch.Tensor:
    """`count` fixed noise levels at the middles of equal parts of the model's own levels, [count]."""
    import torch

    middles = (torch.arange(count) + 0.5) / count
    return levels[(middles * len(levels)).long()]


def draw_noise(shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    """Unit normal noise, float32 on the CPU."""
    import torch

    return torch.randn(shape, generator=source)
