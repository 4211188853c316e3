"""Exponential moving average of the trainables. Previews, validation and exports use it in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Bytes of averages that one operation updates: it holds a copy of them.
_CHUNK = 64 * 1024 * 1024


class MovingAverage:
    """Exponential moving average, in float32 whatever the dtype of the trainables.

    The decay rises as (1 + n) / (10 + n) over the updates n up to the requested decay, so that the average of a short
    run is not dominated by its start. A skipped step does not count as an update.

    Attributes:
        shadow_params: the averages themselves, in the order of the trainables.
        updates: number of updates so far.
    """

    def __init__(self, decay: float, in_place: bool = False):
        """Make an average; `in_place` if the trainables are views, whose data must not be swapped."""
        self.shadow_params: list[torch.Tensor] = []
        self.updates = 0
        self._decay = decay
        self._in_place = in_place
        self._kept: list[torch.Tensor] = []

    def step(self, parameters: list, skip: torch.Tensor | None = None) -> None:
        """Update the averages with the current trainables. A frozen trainable's average is the trainable itself.

        Args:
            skip: 1.0 on the device to leave the averages as they are; the update counts until `uncount`.
        """
        import torch

        # The first update replaces the start.
        decay = min(self._decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        self.updates += 1
        with torch.no_grad():
            trained = []
            for average, parameter in zip(self.shadow_params, parameters, strict=True):
                if parameter.requires_grad:
                    trained.append((average, parameter))
                else:
                    average.copy_(parameter)
            for rows in _chunks(trained):
                averages, live = (list(column) for column in zip(*rows, strict=True))
                # Not `lerp`: it rounds differently from the runs of earlier versions and refuses bfloat16.
                changes = torch._foreach_sub(averages, live)
                torch._foreach_mul_(changes, 1 - decay)
                if skip is not None:
                    torch._foreach_mul_(changes, 1 - skip)
                torch._foreach_sub_(averages, changes)

    def uncount(self) -> None:
        """Subtract an update that the device has skipped."""
        self.updates -= 1

    def start(self, parameters: list) -> None:
        """Start the averages at the current trainables, in float32: in bfloat16 an average would not change."""
        self.shadow_params = [parameter.detach().float().clone() for parameter in parameters]

    def go_on(self, values: list[torch.Tensor], updates: int) -> None:
        """Continue from given averages and their number of updates."""
        self.shadow_params = values
        self.updates = updates

    def store(self, parameters: list) -> None:
        """Do nothing: `copy_to` swaps the tensors, so no third copy is needed."""

    def copy_to(self, parameters: list) -> None:
        """Put the averages into the trainables."""
        for parameter, average in zip(parameters, self.shadow_params, strict=True):
            self._kept.append(parameter.detach().clone() if self._in_place else parameter.data)
            self._put(average.to(parameter.dtype), parameter)

    def restore(self, parameters: list) -> None:
        """Put the trainables' own values back."""
        for parameter, kept in zip(parameters, self._kept, strict=True):
            self._put(kept.to(parameter.device), parameter)
        self._kept = []

    def _put(self, value: torch.Tensor, parameter: torch.nn.Parameter) -> None:
        if self._in_place:
            parameter.detach().copy_(value)
        else:
            parameter.data = value


def _chunks(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Yield (average, trainable) in chunks of some megabytes, for which the memory of an update suffices."""
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    size = 0
    for row in rows:
        if held and size + row[0].nbytes > _CHUNK:
            yield held
            held, size = [], 0
        held.append(row)
        size += row[0].nbytes
    if held:
        yield held


@contextmanager
def averaged(average, parameters: list) -> Iterator[None]:
    """Put the averages into the trainables within the block. Does nothing if `average` is None."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
