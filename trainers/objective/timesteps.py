"""Which noise levels a training sees, and how often: one small class each, and the registry.

t runs from 0 (picture) to 1 (noise), as 0 to 1000 in the widgets. On models that add noise to the picture it is a
level's place among the model's levels; on flow models it is the share of noise itself, which the shifts are made for.

Sources: Esser et al. 2024 (logit-normal, shift); Black Forest Labs' Flux (shift by the number of tokens).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    import torch

    from .options import Objective


class Uniform:
    """Each of the model's own levels as often as any other."""

    def draw(
        self, times: torch.Tensor, count: int, source: torch.Generator, objective: Objective, tokens: float
    ) -> torch.Tensor:
        """Indices of `count` levels.

        Args:
            times: t of the levels that there are, [N] rising.
            tokens: patches of the latent, for whoever looks at its size.

        Returns:
            [count] of 0..N-1.
        """
        import torch

        return torch.randint(len(times), (count,), generator=source)


class LogitNormal(Uniform):
    """The place among the model's own levels is the sigmoid of a normal number."""

    def draw(self, times, count, source, objective, tokens):
        place = sigmoids(count, objective.timestep_mean, objective.timestep_std, source)
        return (place * len(times)).long().clamp_(max=len(times) - 1)


class Sigmoid(LogitNormal):
    """The same with mean 0 and deviation 1, under the name that kohya and ai-toolkit give it."""


class Shifted(Uniform):
    """t is a logit-normal number, shifted towards noise by a factor on its odds.

    On flow models this takes the place of the model's own shift: the same numbers as in other trainers.
    """

    def factor(self, objective: Objective, tokens: float) -> float:
        """The factor on the odds t / (1 - t)."""
        return objective.timestep_shift

    def draw(self, times, count, source, objective, tokens):
        import torch

        t = sigmoids(count, objective.timestep_mean, objective.timestep_std, source)
        t = shift(t, self.factor(objective, tokens))
        # Into the bounds rather than cut off at them, as kohya does.
        t = times[0] + t * (times[-1] - times[0])
        return torch.bucketize(t, (times[1:] + times[:-1]) / 2)


class ResolutionShifted(Shifted):
    """Shifted more for larger pictures, by Flux's line: mu 0.5 at 256 tokens, 1.15 at 4096; the factor is exp(mu)."""

    def factor(self, objective: Objective, tokens: float) -> float:
        slope = (1.15 - 0.5) / (4096 - 256)
        return math.exp(0.5 + slope * (tokens - 256))


TIMESTEPS = {
    "uniform": Uniform(),
    "logit-normal": LogitNormal(),
    "sigmoid": Sigmoid(),
    "shifted": Shifted(),
    "resolution-shifted": ResolutionShifted(),
}


def draw_levels(
    objective: Objective,
    levels: torch.Tensor,
    parameterization: str,
    shape: tuple[int, ...],
    source: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise levels of a batch and their t.

    Args:
        levels: all the model has, [N] rising.
        shape: of the batch's latents, [B, C, ..., h, w]; a token is two by two of its positions.

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
    """The t of each level, [N] rising in 0..1."""
    import torch

    if parameterization != "flow":
        return torch.arange(len(levels)) / len(levels)
    # Cosmos counts sigma / (sigma + 1), which is its share of noise.
    return levels if float(levels[-1]) <= 1.0 else levels / (1 + levels)


def sigmoids(count: int, mean: float, std: float, source: torch.Generator) -> torch.Tensor:
    """Sigmoids of normal numbers, [count] float32 in 0..1."""
    import torch

    return torch.sigmoid(mean + std * torch.randn(count, generator=source))


def shift(t: torch.Tensor, factor: float) -> torch.Tensor:
    """t with its odds t / (1 - t) multiplied."""
    return factor * t / (1 + (factor - 1) * t)
