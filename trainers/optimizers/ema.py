"""The moving average of the trainables, which is what is drawn, measured and handed on instead of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class MovingAverage:
    """diffusers' exponential moving average, in float32 whatever the trainables are kept in.

    Its decay rises as (1 + n) / (10 + n) over its updates n to the one that is asked for, so that a short run is no
    average of its start. A step that is left out is no update.

    Attributes:
        shadow_params: the averages, in the order of the trainables.
        updates: so far.
    """

    def __init__(self, decay: float):
        from diffusers.training_utils import EMAModel

        self._model = EMAModel([], decay=decay, use_ema_warmup=False)
        self._kept: list[torch.Tensor] = []

    @property
    def shadow_params(self) -> list[torch.Tensor]:
        """The averages themselves, no copies."""
        return self._model.shadow_params

    @property
    def updates(self) -> int:
        return self._model.optimization_step

    def step(self, parameters: list) -> None:
        """Takes the trainables in."""
        self._model.step(parameters)

    def start(self, parameters: list) -> None:
        """Begins at the trainables."""
        # Not by diffusers' constructor, which keeps their dtype: in bfloat16 an average would stand still.
        self._model.shadow_params = [parameter.detach().float().clone() for parameter in parameters]

    def go_on(self, values: list[torch.Tensor], updates: int) -> None:
        """Go on from averages after so many updates."""
        self._model.shadow_params = values
        self._model.optimization_step = updates

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
