"""The average that schedule-free optimisers keep, lent to the trainables as the loop's moving average is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class ScheduleFreeAverage:
    """The point x of schedule-free, which is what is saved and drawn; the gradient is taken at another, y.

    The trainables hold y throughout. The library's own way there and back, eval() and train(), rounds: a training
    would depend on how often it is looked at. So x is made aside, and y put back as it was.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list):
        self._optimizer = optimizer
        self._parameters = parameters
        self._beta1 = optimizer.defaults["betas"][0]
        self._kept: list[torch.Tensor] = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """x of every parameter."""
        found = []
        for parameter in self._parameters:
            y = parameter.detach()
            # Asked for anew: what is restored comes as another dict.
            z = self._optimizer.state.get(parameter, {}).get("z")
            # One that was never moved has no z; all three are the same then.
            found.append(y.clone() if z is None else y.lerp(z, 1 - 1 / self._beta1))
        return found

    def step(self, parameters: list) -> None:
        """Nothing: the optimiser's own step has averaged."""

    def store(self, parameters: list) -> None:
        """Keeps y."""
        self._kept = [parameter.detach().clone() for parameter in parameters]

    def copy_to(self, parameters: list) -> None:
        """Puts x in its place."""
        self._put(self.shadow_params, parameters)

    def restore(self, parameters: list) -> None:
        """Puts y back."""
        self._put(self._kept, parameters)
        self._kept = []

    def _put(self, values: list, parameters: list) -> None:
        for value, parameter in zip(values, parameters, strict=True):
            parameter.detach().copy_(value)
