"""Equations of concept sliders (Gandikota et al. 2023), and the noise levels of the latents that the base draws.

The arithmetic holds for the raw outputs of every parameterization: at one x_t and sigma they are affine in the noise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# As in the paper's code: the guidance of the latents that the base draws.
GUIDANCE = 3.0
# Euler steps from pure noise to none; a latent takes part of them, to its own noise level.
DRAW_STEPS = 12


def led(target: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, strength: float) -> torch.Tensor:
    """Return target + s (positive - negative), the output to which a slider leads the model at strength s."""
    return target + strength * (positive - negative)


def guided(output: torch.Tensor, without: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return the output under classifier-free guidance, from those with the prompt and without it."""
    return without + guidance * (output - without)


def draw_path(levels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return falling noise levels from the highest one to each sigma, which the last ones repeat.

    Args:
        levels: the model's noise levels in rising order, [N].
        sigma: [B].

    Returns:
        [DRAW_STEPS + 1, B], evenly spaced over the model's own levels.
    """
    import torch

    last = len(levels) - 1
    places = (last - torch.arange(DRAW_STEPS + 1) * last / DRAW_STEPS).round().long()
    # At the end itself: timestep options may draw sigmas between the levels.
    return torch.maximum(levels[places][:, None], sigma[None])


def euler_step(denoised: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Return x_t at the following noise level (Karras et al. 2022, Euler).

    Args:
        denoised: the x0 that the model predicts at x_t and sigma. All arguments are [B, ...] or broadcastable to it.
    """
    return x_t + (x_t - denoised) / sigma * (following - sigma)
