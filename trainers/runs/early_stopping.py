"""Early stopping: find in a run's validation losses when it stops learning what the held-out pictures share."""

from __future__ import annotations

import math
from collections.abc import Sequence


def lowest(validation: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the first (step, loss) with the lowest finite loss."""
    return min(validation, key=lambda row: row[1] if math.isfinite(row[1]) else math.inf)


def has_stopped_falling(validation: Sequence[tuple[int, float]], step: int, patience: int) -> bool:
    """Report whether `patience` validations in a row have found no new lowest loss, the last one after `step`.

    If the user resumes the run, the count starts again, so that it is not over at the next validation. The losses
    alone decide this, so an interrupted run ends at the same step as an uninterrupted one.
    """
    if not validation or validation[-1][0] != step:
        return False
    since = len(validation) - 1 - validation.index(lowest(validation))
    return since > 0 and since % patience == 0
