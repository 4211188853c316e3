"""Random draws and losses of a batch under an objective that differs from the model's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .losses import HUBER, LOSSES, example_losses, huber_width, mixed
from .noise import add_offset, add_pyramid, draw_noise
from .timesteps import draw_levels
from .weighting import WEIGHTINGS

if TYPE_CHECKING:
    import torch

    from ..protocols import Denoiser
    from .options import Objective


@dataclass(frozen=True)
class CustomDraw:
    """The draws of a batch that only a custom objective needs.

    Attributes:
        objective: the objective.
        t: of each sample, 0 (image) to 1 (noise), [B].
        added: the noise that is added to the latents. With input perturbation it is more than the target's noise.
    """

    objective: Objective
    t: torch.Tensor
    added: torch.Tensor

    def part(self, rows: slice) -> CustomDraw:
        """Return the draws of some of the samples."""
        return CustomDraw(self.objective, self.t[rows], self.added[rows])

    def losses(
        self,
        denoiser: Denoiser,
        prediction: torch.Tensor,
        target: torch.Tensor,
        sigma: torch.Tensor,
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the weighted loss of each sample, [B].

        Args:
            prediction, target, sigma: on the device.
            weight: as for `example_losses`.
        """
        objective = self.objective
        kind = denoiser.parameterization
        sigma = sigma / denoiser.sigma_data
        t = self.t.to(sigma)
        penalty = LOSSES[objective.loss]
        if objective.loss in HUBER:
            width = huber_width(objective.huber_schedule, objective.huber_c, sigma, t, kind == "flow")
            penalty = functools.partial(penalty, width=width)
        elif penalty is mixed:
            penalty = functools.partial(mixed, l1_fraction=objective.l1_fraction)
        losses = example_losses(prediction, target, weight, penalty)
        return losses * WEIGHTINGS[objective.weighting].weights(sigma, t, kind, objective)


def draw_custom(
    objective: Objective,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    source: torch.Generator,
    latents: torch.Tensor | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, CustomDraw]:
    """Draw (noise levels sigma [B], noise, custom draws) for a batch of latents of a shape, on the CPU.

    Args:
        latents: those that this process computes, [b, C, ...], for an offset that depends on them.
        first: their place in the batch. The noise of the other processes' latents is not theirs.
    """
    sigma, t = draw_levels(objective, denoiser.sigmas(), denoiser.parameterization, shape, source)
    noise = draw_noise(shape, source)
    if objective.noise_offset:
        noise = add_offset(noise, _offset_strength(objective, shape, source, latents, first), source)
    if objective.pyramid_discount:
        noise = add_pyramid(noise, objective.pyramid_discount, source)
    added = noise
    if objective.input_perturbation:
        added = noise + objective.input_perturbation * draw_noise(shape, source)
    return sigma, noise, CustomDraw(objective, t, added)


def _offset_strength(
    objective: Objective, shape: tuple[int, ...], source: torch.Generator, latents: torch.Tensor, first: int
) -> float | torch.Tensor:
    """Return the noise offset: a number, or one for each channel [B, C] or sample [B, 1], as sd-scripts varies it."""
    import torch

    strength = objective.noise_offset
    if objective.noise_offset_random_strength == "on":
        strength = strength * torch.rand((shape[0], 1), generator=source)
    if objective.adaptive_noise_scale:
        brightness = torch.zeros(shape[:2])
        brightness[first : first + len(latents)] = latents.flatten(2).mean(2).abs()
        strength = (strength + objective.adaptive_noise_scale * brightness).clamp_min(0.0)
    return strength
