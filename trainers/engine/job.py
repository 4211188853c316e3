"""Job folders: a training that other machines can run, with recipe, dataset, cached latents and conditionings.

A job holds no pictures and no base weights. It names the base by its files' names and hashes. `read_job` treats a job
as untrusted input.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

from ..data.examples import Anchor, Augmentation, Dataset, Example, LeftOut, Source
from ..errors import GraftError, RunError
from ..formats import files
from ..objective.options import Objective
from ..preprocessing.prepare import Prepared, prepare
from ..protocols import Host
from ..recipe.recipe import Recipe
from ..runs import run_lock
from ..runs.run import Folders
from ..text import safe_name
from .session import task_of
from .validation import check_recipe

_FORMAT = "graft job 1"
_FORMATS = "graft job "
_FILE = "job.json"
_CACHE = "cache"
_START = "start.safetensors"

# Temporary names of new and replaced job folders, of this and of earlier versions.
_TEMPORARY = re.compile(r"\..+-[0-9a-f]{8}\.(?:(?:[0-9a-f]{8}\.)?(?:new|old)|(?:[0-9a-f]{8}\.)?new\.[0-9a-f]{8}\.tmp)")

# Largest job.json in bytes: room for some hundred thousand pictures.
_LIMIT = 512 * 1024 * 1024

# Never prune the cache of a job: the job needs all of it.
_NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class Job:
    """Content of a job folder.

    Attributes:
        base: JSON object that the host needs to find its model again.
        cache: folder of the latents and conditionings.
        start: path of the adapter file in the job to start from; empty if there is none, or if the recipe names one of
            the host's list.
        embedded: hash of the embedding files that the captions use; None in jobs of earlier versions.
    """

    recipe: Recipe
    dataset: Dataset
    base: dict[str, Any]
    cache: str
    start: str
    embedded: str | None = None

    def folders(self, host: Folders) -> Folders:
        """Return the host's folders, with the job's own cache and start adapter."""
        adapter_of = (lambda name: self.start) if self.start else host.adapter_of
        return replace(host, cache=self.cache, cache_limit=_NO_LIMIT, adapter_of=adapter_of)


def export_job(
    parent: str, recipe: Recipe, dataset: Dataset, host: Host, folders: Folders, base: dict[str, Any]
) -> str:
    """Encode what is not cached yet, write a job into a new folder in `parent`, and return the folder's path.

    The folder gets the name of the run. An existing job of that name is replaced after the new one is complete.

    Raises:
        GraftError: recipe, dataset and base do not fit together, or something cannot be encoded or written.
    """
    task = task_of(recipe, dataset, host, folders)
    path = os.path.join(parent, f"{safe_name(recipe.name or task.label)}-{task.identity[:8]}")
    files.refuse_links(os.path.dirname(parent), path)
    _check_replaceable(path)
    with _replaced(path) as temporary:
        copy = os.path.join(temporary, _CACHE)
        since = run_lock.earliest_start(folders.runs)
        prepared = prepare(task.dataset, recipe, host, folders.cache, folders.cache_limit, copy, since)
        if recipe.start_from:
            _copy(folders.adapter_of(recipe.start_from), os.path.join(temporary, _START))
        _write(temporary, recipe, _marked(dataset, prepared), base, "", task.embedded)
    return path


def write_local_job(
    path: str, recipe: Recipe, dataset: Dataset, host: Host, folders: Folders, base: dict[str, Any]
) -> None:
    """Write a job for processes on this machine, which share its caches and its list of adapters.

    Raises:
        GraftError: as in `export_job`.
    """
    task = task_of(recipe, dataset, host, folders)
    since = run_lock.earliest_start(folders.runs)
    prepared = prepare(task.dataset, recipe, host, folders.cache, folders.cache_limit, used_since=since)
    _write(path, recipe, _marked(dataset, prepared), base, os.path.abspath(folders.cache), task.embedded)


def _marked(dataset: Dataset, prepared: Prepared) -> Dataset:
    """Mark the examples that `prepare` has left out. A job has no pictures, so it cannot detect them again."""
    reasons = {row.name: row for row in prepared.left_out}

    def marked(example: Example) -> Example:
        names = [one.source.name for one in (example, example.control) if one is not None]
        return replace(example, left_out=next(reasons[name] for name in names if name in reasons))

    rows = enumerate(dataset.examples)
    examples = tuple(one if place in prepared.places else marked(one) for place, one in rows)
    return replace(dataset, examples=examples)


def _write(folder: str, recipe: Recipe, dataset: Dataset, base: dict, cache: str, embedded: str) -> None:
    value = {
        "format": _FORMAT,
        "recipe": recipe.as_json(),
        "dataset": _dataset_as_json(dataset),
        "base": base,
        "cache": cache,
        "embedded": embedded,
    }
    start = os.path.join(folder, _START)
    if os.path.isfile(start):
        value["start"] = files.file_hash(start)
    files.write_own_json(os.path.join(folder, _FILE), value)


def _copy(source: str, target: str) -> None:
    """Copy a file. Raise RunError if that fails."""
    with files.replacing(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def _replaced(path: str):
    """Yield a temporary folder that replaces the job at `path` after the block, like `files.new_folder`."""
    parent, name = os.path.split(path)
    _sweep_folders(parent)
    # Unique names: another ComfyUI may export the same job at the same time.
    token = secrets.token_hex(4)
    fresh, old = (os.path.join(parent, f".{name}.{token}.{kind}") for kind in ("new", "old"))
    with files.new_folder(fresh) as temporary:
        yield temporary
    try:
        if os.path.exists(path):
            os.rename(path, old)
        _move_or_restore(fresh, path, old)
    except OSError as error:
        _remove_job(fresh)
        raise RunError(
            f"The folder '{path}' cannot be replaced ({error}).", "Close what holds it open, or remove it."
        ) from error
    _remove_job(old)


def _check_replaceable(path: str) -> None:
    """Raise RunError if `path` exists and is not a job."""
    if os.path.exists(path) and not _is_job(path):
        raise RunError(
            f"'{path}' takes the place of the job and is no job itself.", "Move it away, or give the run another name."
        )


def _remove_job(folder: str) -> None:
    """Remove a folder if it is a job. Anything else of that name stays."""
    if _is_job(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_job(folder: str) -> bool:
    """Report whether a path is a job folder or an empty folder, and not a link."""
    if files.is_link(folder) or not os.path.isdir(folder):
        return False
    path = os.path.join(folder, _FILE)
    try:
        if not os.path.exists(path):
            return not os.listdir(folder)
        return os.path.getsize(path) <= _LIMIT and str(files.read_json(path)["format"]).startswith(_FORMATS)
    except (OSError, RunError, LookupError, TypeError):
        return False


def _is_part_of_job(folder: str) -> bool:
    """Report whether a folder is a job, or holds nothing but what a half-written job holds."""
    return _is_job(folder) or set(os.listdir(folder)) <= {_CACHE, _START, _FILE}


def _sweep_folders(parent: str) -> None:
    """Remove the temporary folders of killed exports, if nothing in them changed for `files.OLD` seconds."""
    for entry in os.scandir(parent) if os.path.isdir(parent) else ():
        if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and _is_part_of_job(entry.path):
            try:
                times = [os.lstat(os.path.join(at, one)).st_mtime for at, _, held in os.walk(entry) for one in held]
                newest = max(times, default=entry.stat(follow_symlinks=False).st_mtime)
            except FileNotFoundError:
                # Another process is writing it.
                continue
            if time.time() - newest > files.OLD:
                shutil.rmtree(entry.path, ignore_errors=True)


def _move_or_restore(fresh: str, path: str, old: str) -> None:
    """Rename `fresh` to `path`. If that fails, rename `old` back to `path` and raise OSError."""
    try:
        os.rename(fresh, path)
    except OSError:
        if os.path.exists(old):
            os.rename(old, path)
        raise


def _dataset_as_json(dataset: Dataset) -> dict[str, Any]:
    return {
        "examples": [_example_as_json(example) for example in dataset.examples],
        "trigger": dataset.trigger,
        "resolution": dataset.resolution,
        "name": dataset.name,
        "left_out": [asdict(one) for one in dataset.left_out],
    }


def _example_as_json(example: Example) -> dict[str, Any]:
    row = {name: getattr(example, name) for name in _PLAIN}
    row["handling"] = asdict(example.handling)
    row["name"] = example.source.name
    row["mask"] = [example.mask.name, example.mask.digest] if example.mask is not None else None
    row["anchor"] = asdict(example.anchor) if example.anchor is not None else None
    row["control"] = _example_as_json(example.control) if example.control is not None else None
    row["left_out"] = asdict(example.left_out) if example.left_out is not None else None
    return row


# Fields of an example that JSON holds unchanged.
_PLAIN = ("captions", "size", "digest", "trigger", "repeats", "held_out", "weight", "prior")
_BESIDE = ("handling", "name", "mask", "anchor", "control", "left_out")


def read_job(folder: str, is_local: bool = False) -> Job:
    """Read the job in a folder.

    Args:
        is_local: this machine has just written the job with `write_local_job`, so it may name the shared cache. Any
            other job must contain everything it needs.

    Raises:
        RunError: the folder holds no job; or the job is damaged, has another version, or uses files outside its folder.
    """
    path = os.path.join(folder, _FILE)
    if not os.path.isfile(path):
        raise RunError(
            f"There is no job in '{folder}': it holds no {_FILE}.", "Give the folder that Graft Export Job wrote."
        )
    if os.path.getsize(path) > _LIMIT:
        raise RunError(f"The file '{path}' is too large to be a job.", "Export it again.")
    value = files.read_json(path)
    try:
        if value["format"] != _FORMAT:
            raise RunError(
                f"The job '{path}' is of the format {value['format']!r:.40}.", "Export it again with this version."
            )
        recipe = _recipe_of(value["recipe"])
        dataset = _dataset_of(value["dataset"])
        cache = _text(value["cache"])
        start = os.path.join(folder, _START)
        if not is_local:
            _check_own(path, cache, "" if os.path.isfile(start) else recipe.start_from)
        base = value["base"]
        if not isinstance(base, dict):
            raise ValueError("its base is no object")
        # Verify the checksum last: the other errors say more.
        files.read_own_json(path)
        if "start" in value and (not os.path.isfile(start) or files.file_hash(start) != value["start"]):
            raise RunError(f"The file '{start}' is not the one that was exported.", "Export the job again.")
        cache = cache or os.path.join(folder, _CACHE)
        embedded = _text(value["embedded"]) if "embedded" in value else None
        return Job(recipe, dataset, base, cache, start if os.path.isfile(start) else "", embedded)
    except RunError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        said = error.message if isinstance(error, GraftError) else f"{error!r:.200}"
        raise RunError(f"The job '{path}' is damaged ({said}).", "Export it again.") from error


def _check_own(job: str, cache: str, start_from: str) -> None:
    """Refuse a job that uses files outside its own folder.

    Args:
        job: path of its job.json.
        cache: the cache folder that it names.
        start_from: name of an adapter in the host's list; empty if the job brings the adapter along, or has none.

    Raises:
        RunError: the job uses such a file. The error names the path.
    """
    parts = re.split(r"[/\\]", start_from)
    leaves = ".." in parts or not parts[0] or ":" in parts[0] if start_from else False
    link = files.find_link(os.path.dirname(job))
    path = link or cache or (start_from if leaves else "")
    if path:
        raise RunError(
            f"The job '{job}' leads out of its folder: {'the link ' if link else ''}'{path:.200}'.",
            "Copy the whole folder that Graft Export Job wrote, without links, or export the job again.",
        )


def _recipe_of(values: dict[str, Any]) -> Recipe:
    """Decode a recipe. Raise ValueError, TypeError or SettingsError for an invalid one."""
    objective = _made(Objective, values["objective"])
    recipe = _made(Recipe, {**values, "objective": objective})
    check_recipe(recipe)
    return recipe


def _dataset_of(value: dict[str, Any]) -> Dataset:
    examples = tuple(_example_of(row) for row in value["examples"])
    left_out = tuple(_made(LeftOut, row) for row in value["left_out"])
    made = {name: value[name] for name in ("trigger", "resolution", "name")}
    return _made(Dataset, {**made, "examples": examples, "left_out": left_out})


def _example_of(row: dict[str, Any]) -> Example:
    unknown = row.keys() - {*_PLAIN, *_BESIDE}
    if unknown:
        # A field of a later version. Ignoring it would train another run.
        raise ValueError(f"{min(unknown)} is unknown")
    plain = {name: row[name] for name in _PLAIN}
    mask, anchor, control = row["mask"], row["anchor"], row["control"]
    # Jobs of earlier versions lack this field.
    left_out = row.get("left_out")
    made = {
        "source": _Absent(_text(row["name"]), _text(row["digest"])),
        "handling": _made(Augmentation, row["handling"]),
        "mask": None if mask is None else _Absent(_text(mask[0]), _text(mask[1])),
        "anchor": None if anchor is None else _made(Anchor, anchor),
        "control": None if control is None else _example_of(control),
        "left_out": None if left_out is None else _made(LeftOut, left_out),
    }
    return _made(Example, {**plain, **made})


class _Absent(Source):
    """Picture that a job does not contain, because its latent is in the job's cache."""

    def __init__(self, name: str, digest: str):
        self.name = name
        self.digest = digest

    def open(self):
        """Raise RunError. Another error type would leave the picture out of training, and so train another run."""
        raise RunError(
            f"What was encoded of the picture '{self.name}' is missing or damaged, and a job holds no pictures.",
            "Export the job again.",
        )


# Type checks by the annotation of a dataclass field. Fields of other types are decoded by the callers.
_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
}


def _made(kind: type, values: dict[str, Any]) -> Any:
    """Make a dataclass from JSON values; lists become tuples.

    Raises:
        ValueError: a field is unknown, missing or has another type.
    """
    known = {field.name: field for field in fields(kind)}
    unknown = values.keys() - known.keys()
    if unknown:
        raise ValueError(f"{min(unknown)} is unknown")
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} is missing")
        check = _KINDS.get(field.type)
        if name in values and check is not None and not check(values[name]):
            raise ValueError(f"{name} is {values[name]!r:.80}")
        if name in values and str(field.type).startswith("tuple") and not isinstance(values[name], (list, tuple)):
            raise ValueError(f"{name} is no list")
    return kind(**{name: _tuples(value) for name, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.80} is no text")
    return value
