"""Loss weights by noise level: one small class for each, and their registry.

The signal-to-noise ratio (snr) is (sigma_data / sigma)^2. Weights by snr are defined for the error of the latent.
The loss of each parameterization is that error times a factor, so the weight is divided by that factor:

    loss of x0 = error,  of eps = error * snr,  of v and EDM = error * (snr + 1)

Sources: Hang et al. 2023 (min-SNR); Yu et al. 2024 (debiased); Esser et al. 2024, appendix (sigma_sqrt, cosmap);
Choi et al. 2022 (P2); Crowson et al. 2024 (soft min-SNR); Karras et al. 2022 (EDM).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .options import Objective

# Upper bound of the ratio, as in kohya. Without it the first levels would have almost no weight.
_DEBIASED_TOP = 1000.0


class Native:
    """The model's own weighting: every sample counts the same."""

    def fits(self, parameterization: str) -> bool:
        """Return True if the weighting has a meaning for a model of that parameterization."""
        return True

    def weights(self, sigma: torch.Tensor, t: torch.Tensor, kind: str, objective: Objective) -> torch.Tensor:
        """Return the weights of a batch, [B].

        Args:
            sigma: noise levels in units of the data's standard deviation, [B].
            t: the noise levels in 0..1, the fraction of noise on flow models, [B].
            kind: the parameterization.
            objective: gives the parameters of the weighting.
        """
        return t**0


class BySNR(Native):
    """Weight of the latent's error as a function of the signal-to-noise ratio, which flow models do not have."""

    def fits(self, parameterization):
        return parameterization != "flow"

    def weights(self, sigma, t, kind, objective):
        snr = sigma**-2.0
        return self.of_latent(snr, objective) / loss_factor(snr, kind)

    def of_latent(self, snr: torch.Tensor, objective: Objective) -> torch.Tensor:
        """Return the weights of the squared error of the latent, [B]."""
        raise NotImplementedError


class MinSNR(BySNR):
    """The ratio, clamped at gamma so that nearly clean levels do not outweigh all others."""

    def of_latent(self, snr, objective):
        return snr.clamp(max=objective.min_snr_gamma)


class SoftMinSNR(BySNR):
    """Min-SNR without the edge: snr gamma / (snr + gamma)."""

    def of_latent(self, snr, objective):
        # This form stays finite where the ratio is 0.
        return snr / (snr / objective.min_snr_gamma + 1)


class P2(BySNR):
    """The loss of the noise over (1 + snr)^gamma, so that perceptually rich levels count more."""

    def of_latent(self, snr, objective):
        return snr / (1 + snr) ** objective.p2_gamma


class EDM(BySNR):
    """The weight of EDM, (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 up to a constant: 1 for v and EDM models."""

    def of_latent(self, snr, objective):
        return snr + 1


class Debiased(BySNR):
    """The root of the ratio: 1 / sqrt(snr) for eps. (For v other trainers differ: kohya takes 1 / (snr + 1).)"""

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
    "soft min-SNR": SoftMinSNR(),
    "P2": P2(),
    "EDM": EDM(),
}


def loss_factor(snr: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the factor between a parameterization's loss and the squared error of the latent, [B]."""
    if kind == "eps":
        return snr
    if kind == "x0":
        return snr**0
    return snr + 1
