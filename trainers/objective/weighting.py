"""What an example's loss counts for, by its noise level: one small class each, and the registry.

The signal-to-noise ratio is (sigma_data / sigma)^2. A weight by it is meant for the error of the latent; each
parameterisation's loss is that error times a factor of its own, by which the weight is divided:

    loss of x0 = error,  of eps = error * snr,  of v and EDM = error * (snr + 1)

Sources: Hang et al. 2023 (min-SNR); Yu et al. 2024 (debiased); Esser et al. 2024, appendix (sigma_sqrt, cosmap).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .options import Objective

# Where the ratio is cut, as kohya does: the first levels would have next to no weight otherwise.
_DEBIASED_TOP = 1000.0


class Native:
    """The model's own: every example counts the same."""

    def fits(self, parameterization: str) -> bool:
        """Whether it has a meaning for a model of that parameterisation."""
        return True

    def weights(self, sigma: torch.Tensor, t: torch.Tensor, kind: str, objective: Objective) -> torch.Tensor:
        """The weights of a batch, [B].

        Args:
            sigma: noise levels in units of the data's deviation, [B].
            t: the same in 0..1, the share of noise on flow models, [B].
            kind: the parameterisation.
        """
        return t**0


class MinSNR(Native):
    """The ratio, cut at gamma: nearly clean levels do not outweigh all others."""

    def fits(self, parameterization):
        return parameterization != "flow"

    def weights(self, sigma, t, kind, objective):
        snr = sigma**-2.0
        return snr.clamp(max=objective.min_snr_gamma) / loss_factor(snr, kind)


class Debiased(Native):
    """The root of the ratio: for eps 1 / sqrt(snr). (For v other trainers differ: kohya takes 1 / (snr + 1).)"""

    def fits(self, parameterization):
        return parameterization != "flow"

    def weights(self, sigma, t, kind, objective):
        snr = (sigma**-2.0).clamp(max=_DEBIASED_TOP)
        return snr.sqrt() / loss_factor(snr, kind)


class SigmaSqrt(Native):
    """1 / t^2."""

    def fits(self, parameterization):
        return parameterization == "flow"

    def weights(self, sigma, t, kind, objective):
        return t**-2.0


class CosMap(Native):
    """The density that makes the signal-to-noise ratio that of a cosine schedule."""

    def fits(self, parameterization):
        return parameterization == "flow"

    def weights(self, sigma, t, kind, objective):
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


WEIGHTINGS = {
    "native": Native(),
    "min-SNR": MinSNR(),
    "debiased": Debiased(),
    "sigma_sqrt": SigmaSqrt(),
    "cosmap": CosMap(),
}


def loss_factor(snr: torch.Tensor, kind: str) -> torch.Tensor:
    """A parameterisation's loss in units of the latent's squared error, [B]."""
    if kind == "eps":
        return snr
    if kind == "x0":
        return snr**0
    return snr + 1
