"""Loss of each picture relative to the run's usual loss at the same noise level, in constant memory per picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss_by_timestep import LossByTimestep

# Key in a LOSS_MAP, next to the losses per step. Nodes that know only those ignore it.
BY_PICTURE = "by_picture"

# Marks of pictures that differ from the others.
HARDEST, MEMORIZED = "hardest", "memorized"

_WINDOW = 30  # visits: the mean of more visits forgets the earliest ones
_LEAST_VISITS = 10  # of a picture before it can be marked
_FAR = 1.25  # least factor between the loss of a marked picture and the median
_MOST = 5  # pictures per mark; at most a quarter of all


@dataclass
class LossByPicture:
    """Running mean of each picture's native loss, divided by the usual loss at its noise level.

    The loss depends far more on the noise level than on the picture. After the division 1 is the usual loss of the
    run. Class images do not count. Pictures of several folders that have the same name count as one.

    Attributes:
        rows: (visits, mean) by the picture's name.
    """

    rows: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(
        self, names: Sequence[str | None], times: Sequence[float], losses: Sequence[float], usual: LossByTimestep
    ) -> None:
        """Add the losses of a step's pictures. A loss that is not finite or has no usual loss to compare with is left.

        Args:
            names: name of each picture, None to leave it out.
            times, losses: t and native loss of each picture.
            usual: the run's losses before this step.
        """
        for name, t, loss in zip(names, times, losses, strict=True):
            ratio = loss / (usual.expected(t) or math.nan)
            if name is not None and math.isfinite(ratio):
                visits, mean = self.rows.get(name, (0, 0.0))
                visits += 1
                self.rows[name] = (visits, mean + (ratio - mean) / min(visits, _WINDOW))

    def marked(self) -> dict[str, tuple[float, str]]:
        """Return (loss relative to the median picture, mark) of each picture, highest loss first.

        The first and the last of those whose loss is far from the median have the marks HARDEST and MEMORIZED.
        A picture that was seldom visited has none.
        """
        if not self.rows:
            return {}
        middle = statistics.median(mean for _, mean in self.rows.values()) or 1.0
        ranked = sorted(((mean / middle, name) for name, (_, mean) in self.rows.items()), reverse=True)
        often = [(loss, name) for loss, name in ranked if self.rows[name][0] >= _LEAST_VISITS]
        most = min(_MOST, max(1, len(often) // 4))
        marks = {name: HARDEST for loss, name in often[:most] if loss > _FAR}
        marks |= {name: MEMORIZED for loss, name in often[-most:] if loss < 1 / _FAR}
        return {name: (loss, marks.get(name, "")) for loss, name in ranked}

    def as_json(self) -> dict[str, Any]:
        """Return JSON-compatible values. `of_json` restores them to the same bits."""
        return {name: list(row) for name, row in self.rows.items()}

    @classmethod
    def of_json(cls, value: Any) -> LossByPicture:
        """Restore losses from the values of `as_json`. Raise ValueError for anything else."""
        if not isinstance(value, Mapping):
            raise ValueError("its pictures are not losses by name")
        return cls({str(name): _row_of(row) for name, row in value.items()})


def _row_of(row: Any) -> tuple[int, float]:
    is_pair = isinstance(row, list) and len(row) == 2 and type(row[0]) is int and type(row[1]) is float
    if not is_pair or row[0] < 1 or not 0 <= row[1] < math.inf:
        raise ValueError(f"its loss of a picture is {row!r:.40}")
    return row[0], row[1]
