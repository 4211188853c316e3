"""From prediction and target to one number for each example."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def example_losses(prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each example, in float32 or better.

    Args:
        prediction, target: [B, C, ...].
        weight: None, or [B, 1, ...] weights of positions; the error is divided by their mean, so a small
            mask does not shrink the loss.

    Returns:
        [B].
    """
    import torch

    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)) ** 2
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-8)
