"""The average of schedule-free optimizers, with the interface of the moving average."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ScheduleFreeAverage:
    """The point x of schedule-free, for saves and previews. The gradient is taken at another point, y.

    The trainables hold y throughout. The library's own conversions between x and y round: the result of a run
    would depend on how often it is previewed. So this class computes x separately and puts the unchanged y back.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list):
        self._optimizer = optimizer
        self._parameters = parameters
        self._beta1 = optimizer.defaults["betas"][0]
        self._kept: list[torch.Tensor] = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """Return x of every parameter."""
        averages = []
        for parameter in self._parameters:
            y = parameter.detach()
            # Look it up each time: restoring a saved state replaces the dict.
            z = self._optimizer.state.get(parameter, {}).get("z")
            # A parameter without an update has no z. Then x, y and z are equal.
            averages.append(y.clone() if z is None else y.lerp(z, 1 - 1 / self._beta1))
        return averages

    def step(self, parameters: list, skip: torch.Tensor | None = None) -> None:
        """Do nothing: the optimizer's own step updates the average."""

    def store(self, parameters: list) -> None:
        """Keep a copy of y."""
        self._kept = [parameter.detach().clone() for parameter in parameters]

    def copy_to(self, parameters: list) -> None:
        """Put x into the trainables."""
        self._put(self.shadow_params, parameters)

    def restore(self, parameters: list) -> None:
        """Put y back into the trainables."""
        self._put(self._kept, parameters)
        self._kept = []

    def _put(self, values: list, parameters: list) -> None:
        for value, parameter in zip(values, parameters, strict=True):
            parameter.detach().copy_(value)
