"""Timestep distributions: one small class for each, and their registry.

t runs from 0 (image) to 1 (noise), or 0 to 1000 in the widgets. On models that add noise to the image, t is the
index of a level divided by the number of levels. On flow models, t is the fraction of noise, which the shifts are
made for.

Sources: Esser et al. 2024 (logit-normal, shift, mode, cosmap); Black Forest Labs' Flux (shift by the number of tokens);
Mou et al. 2023, section 3.4, as ai-toolkit has it (content, style); SimpleTuner (beta); k-diffusion (stratified).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    import torch

    from .options import Objective


class Distribution:
    """Distribution of noise levels, given by its quantile function."""

    def draw(
        self, times: torch.Tensor, count: int, source: torch.Generator, objective: Objective, tokens: float
    ) -> torch.Tensor:
        """Draw the indices of `count` levels.

        Args:
            times: t of the available levels, [N] rising.
            count: number of draws.
            source: generator.
            objective: gives the parameters of the distribution.
            tokens: number of patches of the latent, for distributions that depend on its size.

        Returns:
            [count] of 0..N-1.
        """
        if objective.stratified == "on":
            places = self.quantile(strata(count, source), objective, tokens)
        else:
            places = self.places(count, source, objective, tokens)
        return self.indices(times, places)

    def places(self, count: int, source: torch.Generator, objective: Objective, tokens: float) -> torch.Tensor:
        """Draw `count` places between the first level and the last, [count] in 0..1."""
        import torch

        return self.quantile(torch.rand(count, generator=source), objective, tokens)

    def quantile(self, u: torch.Tensor, objective: Objective, tokens: float) -> torch.Tensor:
        """Return the places below which the parts `u` of all draws lie, [count] in 0..1."""
        return u

    def indices(self, times: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return the indices of the levels at these places. A place is a relative index."""
        return (places * len(times)).long().clamp_(max=len(times) - 1)


class Uniform(Distribution):
    """Uniform over the model's own levels."""

    def draw(self, times, count, source, objective, tokens):
        import torch

        if objective.stratified == "on":
            return super().draw(times, count, source, objective, tokens)
        return torch.randint(len(times), (count,), generator=source)


class LogitNormal(Distribution):
    """Logit-normal: the relative index among the model's own levels is the sigmoid of a normal number."""

    def places(self, count, source, objective, tokens):
        import torch

        return self.squashed(torch.randn(count, generator=source), objective, tokens)

    def quantile(self, u, objective, tokens):
        import torch

        return self.squashed(torch.special.ndtri(u), objective, tokens)

    def squashed(self, normal: torch.Tensor, objective: Objective, tokens: float) -> torch.Tensor:
        """Return the places of unit normal numbers."""
        import torch

        return torch.sigmoid(objective.timestep_mean + objective.timestep_std * normal)


class Sigmoid(LogitNormal):
    """Logit-normal with mean 0 and standard deviation 1, under the name that kohya and ai-toolkit use."""


class Shifted(LogitNormal):
    """Logit-normal t, shifted towards noise by a factor on its odds.

    On flow models this replaces the model's own shift, so the numbers mean the same as in other trainers.
    """

    def factor(self, objective: Objective, tokens: float) -> float:
        """Return the factor on the odds t / (1 - t)."""
        return objective.timestep_shift

    def squashed(self, normal, objective, tokens):
        return shift(super().squashed(normal, objective, tokens), self.factor(objective, tokens))

    def indices(self, times, places):
        import torch

        # Scale into the bounds instead of clamping, as kohya does.
        t = times[0] + places * (times[-1] - times[0])
        return torch.bucketize(t, (times[1:] + times[:-1]) / 2)


class ResolutionShifted(Shifted):
    """Shifted more for larger images, by Flux's line: mu 0.5 at 256 tokens, 1.15 at 4096. The factor is exp(mu)."""

    def factor(self, objective: Objective, tokens: float) -> float:
        slope = (1.15 - 0.5) / (4096 - 256)
        return math.exp(0.5 + slope * (tokens - 256))


class Mode(Distribution):
    """Mode sampling with heavy tails: more levels in the middle for a scale above 0, more at the ends below 0."""

    def quantile(self, u, objective, tokens):
        u = 1 - u
        return 1 - u - objective.timestep_mode_scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)


class CosMap(Distribution):
    """The distribution that gives a flow model the signal-to-noise ratios of a cosine schedule."""

    def quantile(self, u, objective, tokens):
        return 1 - 1 / ((math.pi / 2 * u).tan() + 1)


class Beta(Distribution):
    """The beta distribution. Alpha above beta gives more noise."""

    def quantile(self, u, objective, tokens):
        import torch

        # ComfyUI requires scipy.
        from scipy.special import betaincinv

        return torch.from_numpy(betaincinv(objective.timestep_alpha, objective.timestep_beta, u.double().numpy()))


class Content(Distribution):
    """More of the noisy levels, which decide the composition: t is 1 - u^3."""

    def quantile(self, u, objective, tokens):
        return 1 - (1 - u) ** 3


class Style(Distribution):
    """More of the levels with little noise, which decide texture and color: t is u^3."""

    def quantile(self, u, objective, tokens):
        return u**3


TIMESTEPS = {
    "uniform": Uniform(),
    "logit-normal": LogitNormal(),
    "sigmoid": Sigmoid(),
    "shifted": Shifted(),
    "resolution-shifted": ResolutionShifted(),
    "mode": Mode(),
    "cosmap": CosMap(),
    "beta": Beta(),
    "content": Content(),
    "style": Style(),
}


def draw_levels(
    objective: Objective,
    levels: torch.Tensor,
    parameterization: str,
    shape: tuple[int, ...],
    source: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the noise levels of a batch and their t.

    Args:
        levels: all levels of the model, [N] rising.
        parameterization: of the model.
        shape: of the batch's latents, [B, C, ..., h, w]. A token covers two by two positions.

    Returns:
        sigma [B], each one of `levels`, and t [B] in 0..1, float32.

    Raises:
        SettingsError: the model has no level between the bounds.
    """
    times = level_times(levels, parameterization)
    within = (times * 1000 >= objective.min_timestep) & (times * 1000 <= objective.max_timestep)
    if not within.any():
        raise SettingsError(
            f"The model has no noise level between min_timestep {objective.min_timestep} and max_timestep "
            f"{objective.max_timestep}.",
            "Widen the range in Graft Objective Options.",
            "max_timestep",
        )
    tokens = shape[-2] * shape[-1] / 4
    levels = levels[within]
    times = times[within]
    chosen = TIMESTEPS[objective.timesteps].draw(times, shape[0], source, objective, tokens)
    return levels[chosen], times[chosen]


def level_times(levels: torch.Tensor, parameterization: str) -> torch.Tensor:
    """Return the t of each level, [N] rising in 0..1."""
    import torch

    if parameterization != "flow":
        return torch.arange(len(levels)) / len(levels)
    # Cosmos has sigmas above 1. Its fraction of noise is sigma / (sigma + 1).
    return levels if float(levels[-1]) <= 1.0 else levels / (1 + levels)


def strata(count: int, source: torch.Generator) -> torch.Tensor:
    """Draw one number from each of `count` equal parts of 0..1, in random order, [count]."""
    import torch

    return (torch.randperm(count, generator=source) + torch.rand(count, generator=source)) / count


def shift(t: torch.Tensor, factor: float) -> torch.Tensor:
    """Return t with its odds t / (1 - t) multiplied by a factor."""
    return factor * t / (1 + (factor - 1) * t)
