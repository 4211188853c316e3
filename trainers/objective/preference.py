"""Diffusion-DPO: learn from pairs in which one picture is preferred (Wallace et al. 2023, equation 14).

For a pair with the errors e of the trained model and r of the frozen base, at one noise level,

    z = -beta / 2 * w * ((e - r) of the better picture - (e - r) of the worse one),    loss = -log sigmoid(z)

An error is the mean square over a latent's values, as in the authors' code, in which beta also holds the paper's T. The
paper's constant weight belongs to the error of the noise. Flow models take the error of the velocity with a constant
weight (Liu et al. 2025, Flow-DPO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def pair_losses(errors: torch.Tensor, base_errors: torch.Tensor, weights: torch.Tensor, beta: float) -> torch.Tensor:
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
        losses: from `pair_losses`, in float32.
    """
    import torch

    values = torch.tensor(losses, dtype=torch.float32)
    tie = torch.nn.functional.softplus(torch.zeros(()))
    return float(((values < tie).float() + 0.5 * (values == tie).float()).mean())
