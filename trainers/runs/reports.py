"""Reports of notable events, in the log, in the run's metrics.jsonl and to the host; early stopping."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .loss_by_picture import HARDEST, MEMORIZED

if TYPE_CHECKING:
    from ..protocols import Host
    from .checkpoint import State
    from .run import Run


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


log = logging.getLogger(__name__)


def report_spike(run: Run, host: Host, step: int, loss: float, highest: float, names: Iterable[str]) -> None:
    """Report a step that was skipped because its loss is above the highest usual one."""
    pictures = sorted(set(names))
    log.warning("Graft: skipped step %d: its loss %.4g is above %.4g (%s).", step, loss, highest, ", ".join(pictures))
    event = {"event": "spike", "step": step, "loss": loss, "highest": highest, "pictures": pictures}
    run.log(event)
    host.report("spike", event)


def report_early_stop(run: Run, host: Host, state: State) -> None:
    """Report why the run ends before its last step."""
    event = early_stop_of(state)
    log.info("Graft: stopped at step %(step)d: the validation loss was lowest at step %(best)d (%(loss).4g).", event)
    run.log(event)
    host.report("early stop", event)


def early_stop_of(state: State) -> dict[str, Any]:
    """Return the event of an early stop after the state's step."""
    best, loss = lowest(state.validation)
    return {"event": "early stop", "step": state.step, "best": best, "loss": loss}


def report_pictures(run: Run, host: Host, state: State) -> None:
    """Report the pictures with the highest and the lowest loss if some differ much from the others."""
    marked = state.loss_by_picture.marked()
    hardest = [(name, loss) for name, (loss, mark) in marked.items() if mark == HARDEST]
    memorized = [(name, loss) for name, (loss, mark) in reversed(marked.items()) if mark == MEMORIZED]
    if host.group.is_main and (hardest or memorized):
        event = {"event": "pictures", "step": state.step}
        event |= {HARDEST: hardest, MEMORIZED: memorized}
        run.log(event)
        host.report("pictures", event)


def report_damaged(run: Run, host: Host, step: int) -> None:
    """Report the damaged saved states that were skipped to find the one to resume from."""
    for row in run.damaged:
        run.log({"event": "damaged state", "step": step, **row})
    if run.damaged:
        host.report("damaged state", {"step": step, "states": [row["state"] for row in run.damaged]})
