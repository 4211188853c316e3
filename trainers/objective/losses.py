"""Losses: one number per sample from prediction and target."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def squared(error: torch.Tensor) -> torch.Tensor:
    """Return the squared error."""
    return error**2


def example_losses(
    prediction: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    penalty: Callable[[torch.Tensor], torch.Tensor] = squared,
) -> torch.Tensor:
    """Return the mean penalty of each sample's error, in float32 or better.

    Args:
        prediction, target: [B, C, ...].
        weight: None, or [B, 1, ...] weights of positions. The error is divided by their mean, so a small mask does
            not shrink the loss.
        penalty: maps the error [B, C, ...] to penalties of the same shape. By default the square.

    Returns:
        [B].
    """
    import torch

    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = penalty(prediction.to(dtype) - target.to(dtype))
    if weight is None:
        return error.flatten(1).mean(1)
    weight = weight.expand_as(error)
    return (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-8)


def absolute(error: torch.Tensor) -> torch.Tensor:
    """Return the absolute error."""
    return error.abs()


def pseudo_huber(error: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Return 2 c (sqrt(e^2 + c^2) - c): e^2 for small errors, 2 c |e| for large ones (Charbonnier et al. 1997).

    Args:
        error: [B, C, ...].
        width: c of each sample, [B].
    """
    width = width.view(-1, *[1] * (error.ndim - 1))
    # Equal to the difference above, which float32 rounds away for small errors.
    return 2 * width * error**2 / ((error**2 + width**2).sqrt() + width)


def smooth_l1(error: torch.Tensor, width: torch.Tensor) -> torch.Tensor:
    """Return 2 (sqrt(e^2 + c^2) - c), kohya sd-scripts' smooth L1: Huber over c, so large errors weigh the same.

    Args:
        error, width: as for `pseudo_huber`.
    """
    return pseudo_huber(error, width) / width.view(-1, *[1] * (error.ndim - 1))


def log_cosh(error: torch.Tensor) -> torch.Tensor:
    """Return log(cosh(e)): e^2 / 2 for small errors, |e| - log(2) for large ones (Chen et al. 2019)."""
    import torch

    size = error.abs()
    # cosh(e) overflows for large errors.
    return size + torch.log1p(torch.expm1(-2 * size) / 2)


def mixed(error: torch.Tensor, l1_fraction: float) -> torch.Tensor:
    """Return (1 - w) e^2 + w |e|, as OneTrainer's MSE and MAE strengths give it."""
    return (1 - l1_fraction) * squared(error) + l1_fraction * absolute(error)


# The losses that the widget offers. Huber and smooth L1 also take a width, which follows the noise level.
LOSSES: dict[str, Callable] = {
    "MSE": squared,
    "Huber": pseudo_huber,
    "L1": absolute,
    "smooth L1": smooth_l1,
    "log-cosh": log_cosh,
    "MSE + L1": mixed,
}
HUBER = ("Huber", "smooth L1")


def _by_snr(c: float, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (1 - c) / (1 + sigma) ** 2 + c


def _exponential(c: float, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return c**t


def _constant(c: float, sigma: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return c + 0 * t


# Schedules of the width, from 1 without noise to c at the most noise, as in kohya sd-scripts (Khrapov et al. 2024).
HUBER_SCHEDULES: dict[str, Callable] = {
    "auto": _by_snr,
    "snr": _by_snr,
    "exponential": _exponential,
    "constant": _constant,
}


def huber_width(schedule: str, c: float, sigma: torch.Tensor, t: torch.Tensor, flow: bool) -> torch.Tensor:
    """Return Huber's width for each sample, [B].

    Args:
        schedule: key of HUBER_SCHEDULES. "auto" is exponential for flow models, otherwise by signal-to-noise ratio.
        c: the width at the most noise.
        sigma: noise levels in units of the data's standard deviation, [B].
        t: the noise levels in 0..1, [B].
        flow: whether the model predicts flow.
    """
    if schedule == "auto" and flow:
        schedule = "exponential"
    return HUBER_SCHEDULES[schedule](c, sigma, t)
