"""Native training targets: one small class for each parameterization.

Notation: x0 the latent, n unit noise, s the noise level sigma. With these targets as model output, ComfyUI's
`calculate_denoised` returns x0 exactly (tests compare the two).

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
        sigma_data: the standard deviation of the data that the model was built for.
        noise_scale: factor on the noise of flow models.
    """

    sigma_data: float = 1.0
    noise_scale: float = 1.0

    def target(self, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Return the target of the raw output. x0 and noise are [B, ...], sigma is broadcastable to them."""
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
    """EDM's residual: the velocity with the opposite sign."""

    def target(self, x0, noise, sigma):
        return -super().target(x0, noise, sigma)


class X0(Parameterization):
    """The latent itself."""

    def target(self, x0, noise, sigma):
        return x0


class Flow(Parameterization):
    """The direction of the straight path, n - x0."""

    def target(self, x0, noise, sigma):
        return self.noise_scale * noise - x0


_KINDS = {"eps": Eps, "v": V, "edm": Edm, "x0": X0, "flow": Flow}


def parameterization(kind: str, sigma_data: float = 1.0, noise_scale: float = 1.0) -> Parameterization:
    """Return the parameterization of that name.

    Raises:
        ModelError: the name is unknown. A guess would train towards a wrong target.
    """
    if kind not in _KINDS:
        raise ModelError(
            f"The model's sampling class '{kind}' has no known training objective.",
            "Connect the model without that ModelSampling node.",
            "model",
        )
    return _KINDS[kind](sigma_data, noise_scale)
