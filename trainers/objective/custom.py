"""Random draws and losses of a batch under an objective that differs from the model's own."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .losses import LOSSES, example_losses, huber_width, pseudo_huber
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

    def part(self, start: int, stop: int) -> CustomDraw:
        """Return the draws of the samples from `start` to `stop`."""
        return CustomDraw(self.objective, self.t[start:stop], self.added[start:stop])

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
        if penalty is pseudo_huber:
            width = huber_width(objective.huber_schedule, objective.huber_c, sigma, t, kind == "flow")
            penalty = functools.partial(pseudo_huber, width=width)
        losses = example_losses(prediction, target, weight, penalty)
        return losses * WEIGHTINGS[objective.weighting].weights(sigma, t, kind, objective)


def draw_custom(
    objective: Objective, denoiser: Denoiser, shape: tuple[int, ...], source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, CustomDraw]:
    """Draw (noise levels sigma [B], noise, custom draws) for a batch of latents of a shape, on the CPU."""
    sigma, t = draw_levels(objective, denoiser.sigmas(), denoiser.parameterization, shape, source)
    noise = draw_noise(shape, source)
    if objective.noise_offset:
        noise = add_offset(noise, objective.noise_offset, source)
    if objective.pyramid_discount:
        noise = add_pyramid(noise, objective.pyramid_discount, source)
    added = noise
    if objective.input_perturbation:
        added = noise + objective.input_perturbation * draw_noise(shape, source)
    return sigma, noise, CustomDraw(objective, t, added)
