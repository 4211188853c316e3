"""The loss by noise level, as a run goes on: kept in few numbers, however long it is."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..objective.timesteps import level_times

if TYPE_CHECKING:
    import torch

    from ..protocols import Denoiser

# In a LOSS_MAP, beside the losses of the steps, under this name; whoever knows only those passes it over.
BY_TIMESTEP = "by_timestep"

BUCKETS = 20  # equal parts of t
_MOST = 16  # spans; with more, each two neighbours become one


@dataclass
class LossByTimestep:
    """The model's own loss of each picture that was trained on, by noise level and by span of steps.

    The mean squared error of the prediction, whatever is trained by: with masks, but without weighting, Huber's bend or
    prior weight. So it can be compared between runs, as the validation loss can.

    t is 0 (picture) to 1 (noise), as in `objective.timesteps`.

    Attributes:
        span: steps in each span.
        sums, counts: [spans][BUCKETS] of losses and pictures; the last span may not be over.
    """

    span: int = 1
    sums: list[list[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    def add(self, step: int, times: Sequence[float], losses: Sequence[float]) -> None:
        """Takes a step's pictures in; what is not a number is passed over.

        Args:
            step: the first is 1.
            times, losses: t and loss of each picture.
        """
        while (step - 1) // self.span >= _MOST:
            self.span *= 2
            self.sums = _halved(self.sums)
            self.counts = _halved(self.counts)
        while len(self.sums) <= (step - 1) // self.span:
            self.sums.append([0.0] * BUCKETS)
            self.counts.append([0] * BUCKETS)
        for t, loss in zip(times, losses, strict=True):
            if math.isfinite(loss):
                bucket = min(BUCKETS - 1, max(0, int(t * BUCKETS)))
                self.sums[(step - 1) // self.span][bucket] += loss
                self.counts[(step - 1) // self.span][bucket] += 1

    def means(self, first: int, last: int) -> list[float]:
        """The mean loss of each bucket over the spans first to last, nan where no picture was at those levels."""
        found = []
        for bucket in range(BUCKETS):
            total = sum(row[bucket] for row in self.sums[first : last + 1])
            count = sum(row[bucket] for row in self.counts[first : last + 1])
            found.append(total / count if count else math.nan)
        return found

    def as_json(self) -> dict[str, Any]:
        """JSON-able; `of_json` gives the same again, to the bit."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Any) -> LossByTimestep:
        """Raises ValueError for anything that `as_json` does not give."""
        if not isinstance(value, Mapping) or value.keys() != {"span", "sums", "counts"}:
            raise ValueError("no losses by noise level")
        span, sums, counts = value["span"], value["sums"], value["counts"]
        if type(span) is not int or span < 1 or not _is_table(sums, (int, float)) or not _is_table(counts, (int,)):
            raise ValueError("losses by noise level that are no numbers")
        if len(sums) != len(counts) or len(sums) > _MOST or any(one < 0 for row in counts for one in row):
            raise ValueError("losses by noise level that do not go with their counts")
        return cls(span, [[float(one) for one in row] for row in sums], [list(row) for row in counts])


def times_of(denoiser: Denoiser, sigma: torch.Tensor) -> list[float]:
    """t of noise levels [B] of the model's own, 0 to 1."""
    import torch

    levels = denoiser.sigmas()
    places = torch.searchsorted(levels, sigma.to(levels)).clamp_(max=len(levels) - 1)
    return level_times(levels, denoiser.parameterization)[places].tolist()


def _halved(rows: list[list]) -> list[list]:
    """Each two rows added up; the last may have none beside it."""
    pairs = [rows[place : place + 2] for place in range(0, len(rows), 2)]
    return [[sum(column) for column in zip(*pair, strict=True)] for pair in pairs]


def _is_table(rows: Any, kinds: tuple[type, ...]) -> bool:
    def is_number(one: Any) -> bool:
        # Whole numbers may be larger than any float.
        return type(one) in kinds and abs(one) <= sys.float_info.max

    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == BUCKETS and all(map(is_number, row)) for row in rows
    )
