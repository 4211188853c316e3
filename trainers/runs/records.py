"""Read-only access to the runs on disk, with strict checks of every file."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import RunError
from ..formats.files import read_metadata
from ..formats.json_files import parse_json, read_own_json
from ..text import is_below
from .folders import Folders, is_name
from .loss_by_picture import LossByPicture
from .run import STOPPED, Run

# Maximum number of runs to list, newest change first.
MOST_RUNS = 1000

# Limits in bytes. A run writes recipes and log lines of some hundred to some ten thousand bytes.
_RECIPE_LIMIT = 4 * 1024 * 1024
_LINE_LIMIT = 64 * 1024
_TAIL_LIMIT = 4 * 1024 * 1024
_GRAPH_LIMIT = 32 * 1024 * 1024


@dataclass(frozen=True)
class Record:
    """Progress of a run, from its folder.

    Attributes:
        step: step of its last state.
        status: "finished", "stopped", "paused" or "unfinished".
        changed: modification time of its folder, seconds since the epoch.
    """

    name: str
    step: int
    steps: int
    status: str
    changed: float


def find_run(folders: Folders, name: str) -> Run:
    """Return the run with a name.

    Raises:
        RunError: the name is invalid, no such run exists, or its folder is a link or leads out of the runs folder.
    """
    if is_name(name):
        run = Run.named(folders, name)
        direct = os.path.join(os.path.realpath(folders.runs), name)
        same = os.path.realpath(run.folder) == direct and is_below(run.recipe_path, run.folder)
        if same and os.path.isfile(run.recipe_path):
            return run
    raise RunError("There is no such run.", "GET /graft/runs lists the existing runs.")


def list_records(folders: Folders, most: int) -> list[Record]:
    """Return the records of at most `most` runs, newest change first, without damaged runs."""
    names = os.listdir(folders.runs) if os.path.isdir(folders.runs) else []
    records = []
    for name in names:
        try:
            records.append(record_of(find_run(folders, name)))
        except (RunError, OSError):
            # OSError: the run was removed after the folder was listed, or this user may not read it.
            continue
    return sorted(records, key=lambda record: (-record.changed, record.name))[:most]


def record_of(run: Run) -> Record:
    """Return the record of a run. Raise RunError if its recipe is invalid."""
    steps = read_recipe(run)["recipe"]["steps"]
    step = max((number for number in run.states() if number <= steps), default=0)
    return Record(run.name, step, steps, _status(run, step, steps), os.stat(run.folder).st_mtime)


def _status(run: Run, step: int, steps: int) -> str:
    if step == steps:
        return "finished"
    halt = run.halt()
    if halt is None or halt.steps != steps or (halt.how == STOPPED and halt.step != step):
        return "unfinished"
    return halt.how


def read_recipe(run: Run) -> dict[str, Any]:
    """Return the content of a run's recipe.json. Raise RunError if it is invalid."""
    path = run.recipe_path
    try:
        if os.path.getsize(path) > _RECIPE_LIMIT:
            raise ValueError("it is too large")
        value = read_own_json(path)
        if type(value["recipe"]["steps"]) is not int:
            raise ValueError("its 'steps' is not a number")
    except (OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"The file '{path}' is not a recipe ({error}).", "Remove or restore it.") from error
    return value


def read_graph(run: Run) -> dict[str, Any]:
    """Return a run's queued prompt and workflow, {"prompt", "workflow"}. Raise RunError if they were not saved."""
    path = run.graph_path
    if not has_graph(run) or os.path.getsize(path) > _GRAPH_LIMIT:
        raise RunError("This run has no saved workflow.", "Early versions of Graft did not save it.")
    value = read_own_json(path)
    if not isinstance(value, dict):
        raise RunError(f"The file '{path}' is not a workflow.", "Remove it.")
    return {name: value[name] for name in ("prompt", "workflow") if isinstance(value.get(name), dict)}


def has_graph(run: Run) -> bool:
    """Report whether a run's folder holds the workflow that it was queued with."""
    return os.path.isfile(run.graph_path) and is_below(run.graph_path, run.folder)


def read_loss_by_picture(run: Run) -> LossByPicture:
    """Return the loss by picture in a run's last valid state. Raise RunError if no state has one."""
    for step in reversed(run.states()):
        path = run.state_path(step)
        try:
            if is_below(path, run.folder):
                losses = LossByPicture.of_json(parse_json(read_metadata(path)["state"])["pictures"])
                if losses.rows:
                    return losses
        except (RunError, KeyError, TypeError, ValueError):
            continue
    raise RunError(
        f"The run {run.name} has no loss by picture.", "Train it for more steps with this version of Graft.", "run"
    )


def last_loss_by_picture(
    folders: Folders, dataset: str, is_on: Callable[[Run], bool] = lambda run: True
) -> tuple[str, LossByPicture]:
    """Return the run that was changed last among those on a dataset with a loss by picture, by name, and that loss.

    Args:
        dataset: its name. A run on several datasets counts for each of them.
        is_on: reports whether a run on a dataset of that name is on this one.

    Returns:
        An empty name and no losses if there is no such run.
    """
    for record in list_records(folders, MOST_RUNS):
        try:
            run = find_run(folders, record.name)
            trained = str(read_recipe(run).get("made_from", {}).get("dataset", ""))
            if (dataset == trained or dataset in trained.split("+")) and is_on(run):
                return record.name, read_loss_by_picture(run)
        except (RunError, OSError, AttributeError):
            # No loss by picture yet, or the run was removed, or its made_from was edited.
            continue
    return "", LossByPicture()


def log_path(run: Run) -> str | None:
    """Return the path of a run's log, None if it has none or the path leads out of its folder."""
    path = os.path.join(run.folder, "metrics.jsonl")
    return path if os.path.isfile(path) and is_below(path, run.folder) else None


def read_events(run: Run, most: int) -> list[dict[str, Any]]:
    """Return the last events of a run's log, oldest first, without invalid lines."""
    path = log_path(run)
    if path is None:
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL_LIMIT))
        lines = file.read(_TAIL_LIMIT).splitlines()
    # Skip the line that the limit cut in two.
    lines = lines[1:] if size > _TAIL_LIMIT else lines
    events = (event_of(line) for line in lines[-most:])
    return [event for event in events if event is not None]


def event_of(line: bytes) -> dict[str, Any] | None:
    """Parse a line of a log. Return None if it is not an event."""
    if len(line) > _LINE_LIMIT:
        return None
    try:
        value = parse_json(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("event"), str) else None


def jsonable(value: Any) -> Any:
    """Return a copy of a value with NaN and infinities replaced by None, so that browsers can parse its JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(part) for part in value]
    return value
