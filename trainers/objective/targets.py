"""What the network itself predicts, for each way of noising; one small class each.

Notation: x0 the latent, n unit noise, s the noise level sigma. The targets are what makes the host's own
`calculate_denoised` give back x0 exactly (the tests hold them against it).

Sources: Ho et al. 2020 (eps); Salimans & Ho 2022 (v); Karras et al. 2022 (EDM); Liu et al. 2022 (rectified flow).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Parameterization:
    """A native target.

    Attributes:
        sigma_data: the data's standard deviation the model was built for.
        noise_scale: factor on the noise of flow models.
    """

    sigma_data: float = 1.0
    noise_scale: float = 1.0

    def target(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """What the raw output should be; x0 and noise [B, ...], sigma broadcastable to them."""
        raise NotImplementedError


class Eps(Parameterization):
    """The noise."""

    def target(self, x0, noise, sigma):
        return noise


class V(Parameterization):
    """The velocity alpha n - s x0 with alpha = 1 / sqrt(s^2 + 1), for sigma_data 1."""

    def target(self, x0, noise, sigma):
        norm = (sigma**2 + self.sigma_data**2) ** 0.5
        return (self.sigma_data * noise - (sigma / self.sigma_data) * x0) / norm


class Edm(V):
    """EDM's residual: the velocity with the other sign."""

    def target(self, x0, noise, sigma):
        return -super().target(x0, noise, sigma)


class X0(Parameterization):
    """The latent itself."""

    def target(self, x0, noise, sigma):
        return x0


class Flow(Parameterization):
    """The straight path's direction, n - x0."""

    def target(self, x0, noise, sigma):
        return self.noise_scale * noise - x0


_KINDS = {"eps": Eps, "v": V, "edm": Edm, "x0": X0, "flow": Flow}


def parameterization(kind: str, sigma_data: float = 1.0, noise_scale: float = 1.0) -> Parameterization:
    """The parameterisation of a name.

    Raises:
        ModelError: an unknown name; guessing would train towards something else.
    """
    if kind not in _KINDS:
        raise ModelError(
            f"The model's sampling class '{kind}' has no known training objective.",
            "Connect the model without that ModelSampling node.",
            "model",
        )
    return _KINDS[kind](sigma_data, noise_scale)
