"""History of runs: a summary of each run, and deletion of a run."""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..formats.atomic import is_link
from .folders import Folders
from .notes import Notes, read_notes
from .records import MOST_RUNS, Record, event_of, find_run, has_graph, list_records, log_path, read_recipe, record_of
from .run import Run
from .saves import list_saves

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

# Maximum number of points in a loss curve, which the panel draws a few hundred pixels wide.
_MOST_POINTS = 240
# Weight of each loss relative to the next one, the same as in the panel.
_SMOOTHING = 0.96
# The final loss is the mean over the last 1/_SHARE of the run.
_SHARE = 10

_FACTS = ("images", "validation_images", "class_images", "layers", "checkpointed_blocks", "made_from")

_LOG_LIMIT = 64 * 1024 * 1024
_KEPT_LOGS = 512
_REMOVED = ".removed-"
_REMOVED_NAME = re.compile(re.escape(_REMOVED) + "[0-9a-f]{16}")


@dataclass(frozen=True)
class Losses:
    """Losses of a run, in summary.

    Attributes:
        final: mean over the last tenth of the steps; None before the first step.
        best: lowest mean over any window of a tenth of the steps; None before the first step.
        best_step: last step of that window.
        checked: (step, loss) of each validation on the held-out pictures.
        curve: (step, smoothed loss); for long runs only every n-th step, and always the last.
    """

    final: float | None
    best: float | None
    best_step: int
    checked: tuple[tuple[int, float], ...]
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Summary:
    """Summary of a run for the history.

    Attributes:
        picture: path of its last sample picture, None if it has none.
        facts: further facts from recipe.json: numbers of pictures and layers, and what the run was made from.
        has_graph: whether the run's folder holds the queued workflow.
        notes: title and note from the user.
        saves: steps with a save, in ascending order.
    """

    record: Record
    losses: Losses
    picture: str | None
    recipe: dict[str, Any]
    facts: dict[str, Any]
    has_graph: bool
    size: int
    notes: Notes
    saves: tuple[int, ...]


def list_summaries(folders: Folders, text: str, first: int, count: int) -> tuple[list[Summary], int]:
    """Return one page of the history, newest change first, and the total number of matching runs.

    Args:
        text: text to find in a run's name, title or note, ignoring case; empty matches every run.
        first: index of the page's first run.
    """
    names = [record.name for record in list_records(folders, MOST_RUNS) if _holds(folders, record.name, text.lower())]
    summaries = []
    for name in names[first : first + count]:
        try:
            summaries.append(summary_of(folders, find_run(folders, name)))
        except (RunError, OSError):
            # The run was removed meanwhile.
            continue
    return summaries, len(names)


def _holds(folders: Folders, name: str, text: str) -> bool:
    if text in name.lower():
        return True
    notes = read_notes(Run.named(folders, name))
    return text in f"{notes.title}\n{notes.note}".lower()


def summary_of(folders: Folders, run: Run) -> Summary:
    """Return the summary of a run. Raise RunError if its recipe is invalid, OSError if the run was removed."""
    value = read_recipe(run)
    facts = {name: value[name] for name in _FACTS if name in value}
    record = record_of(run)
    picture = run.last_sample(record.steps)
    about = (read_notes(run), tuple(list_saves(folders, run)))
    return Summary(record, losses_of(run), picture, value["recipe"], facts, has_graph(run), _size(run.folder), *about)


def losses_of(run: Run) -> Losses:
    """Return a run's losses from its log. The result is cached until the log changes."""
    path = log_path(run)
    if path is None:
        return _describe((), ())
    status = os.stat(path)
    return _read_losses(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_KEPT_LOGS)
def _read_losses(path: str, size: int, changed: int) -> Losses:
    steps, checked = [], []
    for event in _events(path, size):
        rows = {"step": steps, "validation": checked}.get(event["event"])
        step, loss = event.get("step"), event.get("loss")
        # The log may come from elsewhere: accept only rows with ascending steps and finite losses.
        if rows is None or type(step) is not int or not _is_number(loss) or (rows and step <= rows[-1][0]):
            continue
        rows.append((step, float(loss)))
    return _describe(steps, checked)


def _events(path: str, size: int) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        if size > _LOG_LIMIT:
            file.seek(size - _LOG_LIMIT)
            # Skip the line that the limit cut in two.
            file.readline()
        for line in file:
            event = event_of(line)
            if event is not None:
                yield event


def _is_number(value: Any) -> bool:
    # An integer may be too large for a float.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _describe(steps: Iterable[tuple[int, float]], checked: Iterable[tuple[int, float]]) -> Losses:
    steps = list(steps)
    if not steps:
        return Losses(None, None, 0, _thinned(list(checked)), ())
    losses = [loss for _, loss in steps]
    width = max(1, len(losses) // _SHARE)
    sums = [0.0, *accumulate(losses)]
    means = [(sums[end] - sums[end - width]) / width for end in range(width, len(sums))]
    best = min(range(len(means)), key=means.__getitem__)
    curve = list(zip((step for step, _ in steps), smoothed(losses, _SMOOTHING), strict=True))
    return Losses(means[-1], means[best], steps[best + width - 1][0], _thinned(list(checked)), _thinned(curve))


def _thinned(points: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    every = -(-len(points) // _MOST_POINTS) or 1
    return tuple(point for place, point in enumerate(points) if (len(points) - 1 - place) % every == 0)


def _size(folder: str) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            # A running training may remove a file meanwhile.
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(directory, name)).st_size
    return total


def delete_run(run: Run) -> None:
    """Delete a run's folder: recipe, log, states, saves and sample pictures. Saves copied for the loaders stay.

    Renames the folder first, so that the run disappears as a whole. If some files cannot be removed after that, the
    next deletion tries again.

    Raises:
        RunHeldError: a process trains it, on this computer or another.
        RunError: the folder cannot be renamed or has no valid recipe; nothing has changed.
    """
    read_recipe(run)
    parent = os.path.dirname(run.folder)
    aside = os.path.join(parent, f"{_REMOVED}{secrets.token_hex(8)}")
    with run.held():
        try:
            os.rename(run.folder, aside)
        except OSError as error:
            raise RunError(
                f"The folder '{run.folder}' cannot be removed ({error}).", "Close what holds it open, or remove it."
            ) from error
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if _REMOVED_NAME.fullmatch(name) and not is_link(path):
            shutil.rmtree(path, ignore_errors=True)
            if os.path.isdir(path):
                log.warning("Graft: the deleted run's folder %s cannot be removed yet.", path)


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """Return the exponential moving average: each value has `smoothing` times the weight of the next one.

    The average starts at the first value, not at 0. It skips NaN and infinite values.
    """
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total = smoothing * total + value
            weight = smoothing * weight + 1.0
        averages.append(total / weight if weight else math.nan)
    return averages
