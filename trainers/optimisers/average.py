"""The moving average of the trainables, which is what is drawn, measured and handed on instead of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class MovingAverage:
    """diffusers' exponential moving average, in float32 whatever the trainables are kept in.

    Its decay rises as (1 + n) / (10 + n) over the steps n to the one that is asked for, so that a short run is no
    average of its start.

    Attributes:
        shadow_params: the averages, in the order of the trainables.
    """

    def __init__(self, parameters: list, decay: float):
        from diffusers.training_utils import EMAModel

        self._model = EMAModel([], decay=decay, use_ema_warmup=False)
        # Not by its constructor, which keeps the trainables' dtype: in bfloat16 an average would stand still.
        self._model.shadow_params = [parameter.detach().float().clone() for parameter in parameters]
        self._kept: list[torch.Tensor] = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """The averages themselves, no copies."""
        return self._model.shadow_params

    def step(self, parameters: list) -> None:
        """Takes the trainables in."""
        self._model.step(parameters)

    def restore_to(self, values: list[torch.Tensor], step: int) -> None:
        """Goes on from the averages of a step."""
        self._model.shadow_params = values
        self._model.optimization_step = step

    def store(self, parameters: list) -> None:
        """Nothing: the values change places, so that no third copy of them is held."""

    def copy_to(self, parameters: list) -> None:
        """Lends the averages to the trainables."""
        for parameter, average in zip(parameters, self.shadow_params, strict=True):
            self._kept.append(parameter.data)
            parameter.data = average.to(parameter.dtype)

    def restore(self, parameters: list) -> None:
        """Gives both their own back."""
        for parameter, kept in zip(parameters, self._kept, strict=True):
            parameter.data = kept.to(parameter.device)
        self._kept = []


@contextmanager
def averaged(average, parameters: list) -> Iterator[None]:
    """Lends an average, if there is one, to the trainables for the block."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
