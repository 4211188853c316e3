"""Loss per timestep bucket over the course of a run, in constant memory."""

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

# Key in a LOSS_MAP, next to the losses per step. Nodes that know only those ignore it.
BY_TIMESTEP = "by_timestep"

BUCKETS = 20  # buckets of equal width in t
_MOST = 16  # spans; beyond this, pairs of adjacent spans are merged


@dataclass
class LossByTimestep:
    """Loss of the trained pictures in the model's own parameterization, by timestep bucket and span of steps.

    The loss is the mean squared error of the prediction with masks, whatever objective the run uses. It has no loss
    weighting, no Huber loss and no prior weight. So it can be compared between runs, like the validation loss.

    t runs from 0 (picture) to 1 (noise), as in `objective.timesteps`.

    Attributes:
        span: number of steps per span.
        sums, counts: sums of losses and numbers of pictures, [spans][BUCKETS]; the last span may be incomplete.
    """

    span: int = 1
    sums: list[list[float]] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)

    def add(self, step: int, times: Sequence[float], losses: Sequence[float]) -> None:
        """Add the losses of a step's pictures, except NaN and infinite ones.

        Args:
            step: number of the step, from 1.
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
                bucket = _bucket_of(t)
                self.sums[(step - 1) // self.span][bucket] += loss
                self.counts[(step - 1) // self.span][bucket] += 1

    def expected(self, t: float) -> float:
        """Return the mean of all losses in the bucket of t; NaN if it is empty."""
        bucket = _bucket_of(t)
        count = sum(row[bucket] for row in self.counts)
        return sum(row[bucket] for row in self.sums) / count if count else math.nan

    def means(self, first: int, last: int) -> list[float]:
        """Return the mean loss per bucket over the spans `first` to `last` (inclusive), NaN for empty buckets."""
        means = []
        for bucket in range(BUCKETS):
            total = sum(row[bucket] for row in self.sums[first : last + 1])
            count = sum(row[bucket] for row in self.counts[first : last + 1])
            means.append(total / count if count else math.nan)
        return means

    def as_json(self) -> dict[str, Any]:
        """Return JSON-compatible values. `of_json` restores them to the same bits."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: Any) -> LossByTimestep:
        """Restore losses from the values of `as_json`. Raise ValueError for anything else."""
        if not isinstance(value, Mapping) or value.keys() != {"span", "sums", "counts"}:
            raise ValueError("its levels are not losses by timestep")
        span, sums, counts = value["span"], value["sums"], value["counts"]
        if type(span) is not int or span < 1 or not _is_table(sums, (int, float)) or not _is_table(counts, (int,)):
            raise ValueError("its losses by timestep are not numbers")
        if len(sums) != len(counts) or len(sums) > _MOST or any(number < 0 for row in counts for number in row):
            raise ValueError("its losses by timestep do not match their counts")
        return cls(span, [[float(number) for number in row] for row in sums], [list(row) for row in counts])


def times_of(denoiser: Denoiser, sigma: torch.Tensor) -> list[float]:
    """Return t, from 0 to 1, for noise levels sigma [B] of the model."""
    import torch

    levels = denoiser.sigmas()
    places = torch.searchsorted(levels, sigma.to(levels)).clamp_(max=len(levels) - 1)
    return level_times(levels, denoiser.parameterization)[places].tolist()


def _bucket_of(t: float) -> int:
    return min(BUCKETS - 1, max(0, int(t * BUCKETS)))


def _halved(rows: list[list]) -> list[list]:
    pairs = [rows[place : place + 2] for place in range(0, len(rows), 2)]
    return [[sum(column) for column in zip(*pair, strict=True)] for pair in pairs]


def _is_table(rows: Any, kinds: tuple[type, ...]) -> bool:
    def is_number(value: Any) -> bool:
        # An integer may be too large for a float.
        return type(value) in kinds and abs(value) <= sys.float_info.max

    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == BUCKETS and all(map(is_number, row)) for row in rows
    )
