"""Losses: one number per sample from prediction and target, or per pair of pictures of which one is preferred.

Pairs: Diffusion-DPO (Wallace et al. 2023, equation 14). For a pair with the errors e of the trained model and r of the
frozen base, at one noise level,

    z = -beta / 2 * w * ((e - r) of the better picture - (e - r) of the worse one),    loss = -log sigmoid(z)

An error is the mean square over a latent's values, as in the authors' code, in which beta also holds the paper's T. The
paper's constant weight belongs to the error of the noise. Flow models take the error of the velocity with a constant
weight (Liu et al. 2025, Flow-DPO).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def multi_scale(error: torch.Tensor) -> torch.Tensor:
    """Return e^2 plus f times the square of e's mean over f x f positions, for f = 2, 4, ... (Hoogeboom et al. 2023).

    The means are the low band of Haar's wavelet, down to 32 positions on the shorter side. The finest scale counts 1.

    Args:
        error: [B, C, ..., height, width].
    """
    from torch.nn.functional import avg_pool2d

    height, width = error.shape[-2:]
    planes = error.reshape(-1, 1, height, width)
    total = planes**2
    factor = 2
    while min(height, width) >= 32 * factor:
        coarse = factor * avg_pool2d(planes, factor, ceil_mode=True) ** 2
        fine = coarse.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        total = total + fine[..., :height, :width]
        factor *= 2
    return total.reshape(error.shape)


# The losses that the widget offers. Huber and smooth L1 also take a width, which follows the noise level.
LOSSES: dict[str, Callable] = {
    "MSE": squared,
    "Huber": pseudo_huber,
    "L1": absolute,
    "smooth L1": smooth_l1,
    "log-cosh": log_cosh,
    "MSE + L1": mixed,
    "multi-scale": multi_scale,
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


def preference_losses(
    errors: torch.Tensor, base_errors: torch.Tensor, weights: torch.Tensor, beta: float
) -> torch.Tensor:
    """Return the loss of each pair, [B].

    Args:
        errors, base_errors: of the trained model and of the frozen base, [2, B]: better pictures, then worse ones.
        weights: of the pairs' noise levels, [B].
    """
    import torch

    better, worse = errors - base_errors
    return torch.nn.functional.softplus(0.5 * beta * weights * (better - worse))


def noise_error_weights(kind: str, sigma: torch.Tensor) -> torch.Tensor:
    """Return the factor from the error of the raw output to that of the noise, [B]; 1 for flow models and x0.

    Args:
        kind: the parameterization.
        sigma: noise levels in units of the data's standard deviation, [B].
    """
    return 1 / (1 + sigma**2) if kind in ("v", "edm") else sigma**0


def implicit_accuracy(losses: Sequence[float]) -> float:
    """Return the share of pairs whose better picture the model prefers more than the base does; half of the ties count.

    A pair's loss is then below log 2, because z is positive.

    Args:
        losses: from `preference_losses`, in float32.
    """
    import torch

    values = torch.tensor(losses, dtype=torch.float32)
    tie = torch.nn.functional.softplus(torch.zeros(()))
    return float(((values < tie).float() + 0.5 * (values == tie).float()).mean())
