"""Job folders: a training that other machines can run, with recipe, dataset, cached latents and conditionings.

A job holds no pictures and no base weights. It names the base by its files' names and hashes. `read_job` treats a job
as untrusted input.
"""

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from ..data.examples import Dataset, Example
from ..errors import GraftError, RunError
from ..formats import atomic, files, json_files
from ..formats.adapter import Adapter, load_adapter
from ..formats.embedding import Embedding
from ..formats.peft_format import WEIGHTS, write_peft
from ..methods import METHODS
from ..preprocessing.cache import is_sound
from ..preprocessing.prepare import Prepared, prepare
from ..protocols import Host
from ..recipe.recipe import Recipe
from ..runs.folders import Folders
from ..text import safe_name
from .job_json import (
    check_text_field,
    dataset_as_json,
    decode_dataset,
    decode_pictures,
    decode_recipe,
    pictures_as_json,
)
from .session import task_of

_FORMAT = "graft job 1"
_FORMATS = "graft job "
_FILE = "job.json"
_CACHE = "cache"
_README = "README.md"
# The tensors to start from, or peft's folder of an adapter in peft's form.
_START = "start.safetensors"
_PEFT_START = "start"

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
        cache: folder of the latents and conditionings; in a file, empty for the job's own.
        start: path of the adapter or embedding file in the job to start from; empty if there is none, or if the recipe
            names one of the host's list.
        pictures: source pictures that the prompts of sample pictures name, by these names.
        cached: sizes in bytes of the files in the job's own cache, by path; None in jobs of earlier versions.
        embedded: hash of the embedding files that the captions use; None in jobs of earlier versions.
    """

    recipe: Recipe
    dataset: Dataset
    base: dict[str, Any]
    cache: str = ""
    start: str = ""
    embedded: str | None = None
    pictures: Mapping[str, Example] = field(default_factory=dict)
    cached: Mapping[str, int] | None = None

    def host(self, host: Host) -> Host:
        """Return the host with what was connected to the trainer to start from, if anything."""
        if not self.start or self.recipe.start_from:
            return host
        if METHODS[self.recipe.method].trains_model:
            return replace(host, start=load_adapter(self.start))
        tensors, metadata = files.read_tensors(self.start)
        return replace(host, start=Embedding(tensors, self.recipe.embedding_name, metadata))

    def folders(self, host: Folders) -> Folders:
        """Return the host's folders, with the job's own cache and start adapter."""
        adapter_of = (lambda name: self.start) if self.start else host.adapter_of
        return replace(host, cache=self.cache, cache_limit=_NO_LIMIT, adapter_of=adapter_of, pictures=self.pictures)


def export_job(
    parent: str,
    recipe: Recipe,
    dataset: Dataset,
    host: Host,
    folders: Folders,
    base: dict[str, Any],
    readme: Callable[[str], str] | None = None,
) -> str:
    """Encode what is not cached yet, write a job into a new folder in `parent`, and return the folder's path.

    The folder gets the name of the run. An existing job of that name is replaced after the new one is complete.

    Args:
        readme: returns the text of the folder's README from the folder's name.

    Raises:
        GraftError: recipe, dataset and base do not fit together, or something cannot be encoded or written.
    """
    task = task_of(recipe, dataset, host, folders)
    path = os.path.join(parent, f"{safe_name(recipe.name or task.label)}-{task.identity[:8]}")
    atomic.refuse_links(os.path.dirname(parent), path)
    _check_replaceable(path)
    with _replaced(path) as temporary:
        copy = os.path.join(temporary, _CACHE)
        prepared = prepare(task.dataset, recipe, host, folders, copy)
        start = task.start if recipe.start_from else host.start
        if start is not None:
            _write_start(temporary, start)
        dataset = _marked(dataset, prepared)
        if readme is not None:
            atomic.write_bytes(os.path.join(temporary, _README), readme(os.path.basename(path)).encode())
        _write(temporary, Job(recipe, dataset, base, "", "", task.embedded, prepared.named, _sizes_of(copy)))
    return path


def write_local_job(
    path: str, recipe: Recipe, dataset: Dataset, host: Host, folders: Folders, base: dict[str, Any]
) -> None:
    """Write a job for processes on this machine, which share its caches and its list of adapters.

    Raises:
        GraftError: as in `export_job`.
    """
    task = task_of(recipe, dataset, host, folders)
    prepared = prepare(task.dataset, recipe, host, folders)
    if host.start is not None and not recipe.start_from:
        _write_start(path, host.start)
    cache = os.path.abspath(folders.cache)
    _write(path, Job(recipe, _marked(dataset, prepared), base, cache, "", task.embedded, prepared.named))


def _write_start(folder: str, start: Adapter | Embedding) -> None:
    """Write an adapter or embedding so that a job reads the same tensors, and thus has the same identity."""
    native = getattr(start, "native", None)
    if native is None:
        files.write_tensors(os.path.join(folder, _START), start, start.metadata)
    else:
        write_peft(os.path.join(folder, _PEFT_START), native, start.metadata)


def _find_start(folder: str) -> str:
    paths = (os.path.join(folder, _START), os.path.join(folder, _PEFT_START, WEIGHTS))
    return next((path for path in paths if os.path.isfile(path)), "")


def _hash_of_start(path: str) -> str:
    folder, name = os.path.split(path)
    if name == _START:
        return atomic.file_hash(path)
    held = sorted(os.path.join(at, file) for at, _, names in os.walk(folder) for file in names)
    rows = [f"{os.path.relpath(file, folder).replace(os.sep, '/')} {atomic.file_hash(file)}" for file in held]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _marked(dataset: Dataset, prepared: Prepared) -> Dataset:
    """Mark the examples that `prepare` has left out. A job has no pictures, so it cannot detect them again."""
    reasons = {row.name: row for row in prepared.left_out}

    def marked(example: Example) -> Example:
        worse = () if example.paired is None else (example.paired,)
        names = [picture.source.name for picture in (example, *example.sources, *worse)]
        return replace(example, left_out=next(reasons[name] for name in names if name in reasons))

    rows = enumerate(dataset.examples)
    examples = tuple(example if place in prepared.places else marked(example) for place, example in rows)
    return replace(dataset, examples=examples)


def _sizes_of(cache: str) -> dict[str, int]:
    paths = [os.path.join(at, name) for at, _, names in os.walk(cache) for name in names]
    return {os.path.relpath(path, cache).replace(os.sep, "/"): os.path.getsize(path) for path in sorted(paths)}


def _write(folder: str, job: Job) -> None:
    value = {
        "format": _FORMAT,
        "recipe": job.recipe.as_json(),
        "dataset": dataset_as_json(job.dataset),
        "base": job.base,
        "cache": job.cache,
        "embedded": job.embedded,
        "pictures": pictures_as_json(job.pictures),
    }
    if job.cached is not None:
        value["cached"] = dict(job.cached)
    start = _find_start(folder)
    if start:
        value["start"] = _hash_of_start(start)
    json_files.write_own_json(os.path.join(folder, _FILE), value)


@contextmanager
def _replaced(path: str):
    """Yield a temporary folder that replaces the job at `path` after the block, like `atomic.new_folder`."""
    parent, name = os.path.split(path)
    _sweep_folders(parent)
    # Unique names: another ComfyUI may export the same job at the same time.
    token = secrets.token_hex(4)
    fresh, old = (os.path.join(parent, f".{name}.{token}.{kind}") for kind in ("new", "old"))
    with atomic.new_folder(fresh) as temporary:
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
    if os.path.exists(path) and not _is_job(path):
        raise RunError(f"'{path}' exists and is not a job.", "Move it away, or give the run another name.")


def _remove_job(folder: str) -> None:
    """Remove a folder if it is a job. Anything else of that name stays."""
    if _is_job(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _is_job(folder: str) -> bool:
    """Report whether a path is a job folder or an empty folder, and not a link."""
    if atomic.is_link(folder) or not os.path.isdir(folder):
        return False
    path = os.path.join(folder, _FILE)
    try:
        if not os.path.exists(path):
            return not os.listdir(folder)
        return os.path.getsize(path) <= _LIMIT and str(json_files.read_json(path)["format"]).startswith(_FORMATS)
    except (OSError, RunError, LookupError, TypeError):
        return False


def _is_part_of_job(folder: str) -> bool:
    return _is_job(folder) or set(os.listdir(folder)) <= {_CACHE, _START, _PEFT_START, _README, _FILE}


def _sweep_folders(parent: str) -> None:
    """Remove the temporary folders of killed exports, if nothing in them changed for `atomic.OLD` seconds."""
    for entry in os.scandir(parent) if os.path.isdir(parent) else ():
        if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False) and _is_part_of_job(entry.path):
            try:
                times = [os.lstat(os.path.join(at, file)).st_mtime for at, _, held in os.walk(entry) for file in held]
                newest = max(times, default=entry.stat(follow_symlinks=False).st_mtime)
            except FileNotFoundError:
                # Another process is writing it.
                continue
            if time.time() - newest > atomic.OLD:
                shutil.rmtree(entry.path, ignore_errors=True)


def _move_or_restore(fresh: str, path: str, old: str) -> None:
    """Rename `fresh` to `path`. If that fails, rename `old` back to `path` and raise OSError."""
    try:
        os.rename(fresh, path)
    except OSError:
        if os.path.exists(old):
            os.rename(old, path)
        raise


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
            f"There is no job in '{folder}': it holds no {_FILE}.", "Use the folder that Graft Export Job wrote."
        )
    if os.path.getsize(path) > _LIMIT:
        raise RunError(f"The file '{path}' is too large to be a job.", "Export it again.")
    value = json_files.read_json(path)
    try:
        return _decode_job(path, value, is_local)
    except RunError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        reason = error.message if isinstance(error, GraftError) else f"{error!r:.200}"
        raise RunError(f"The job '{path}' is damaged ({reason}).", "Export it again.") from error


def _decode_job(path: str, value: Any, is_local: bool) -> Job:
    if value["format"] != _FORMAT:
        raise RunError(
            f"The job '{path}' has the unknown format {value['format']!r:.40}.", "Export it again with this version."
        )
    recipe = decode_recipe(value["recipe"])
    dataset = decode_dataset(value["dataset"])
    cache = check_text_field(value["cache"])
    start = _find_start(os.path.dirname(path))
    if not is_local:
        _check_own(path, cache, "" if start else recipe.start_from)
    base = value["base"]
    if not isinstance(base, dict):
        raise ValueError("its base is not an object")
    # Verify the checksum last: the other errors say more.
    json_files.read_own_json(path)
    if "start" in value and (not start or _hash_of_start(start) != value["start"]):
        changed = start or os.path.join(os.path.dirname(path), _START)
        raise RunError(f"The file '{changed}' has changed since the export.", "Export the job again.")
    cache = cache or os.path.join(os.path.dirname(path), _CACHE)
    embedded = check_text_field(value["embedded"]) if "embedded" in value else None
    # Jobs of earlier versions lack this field: they look for the files here.
    pictures = decode_pictures(value.get("pictures", {}))
    cached = value.get("cached")
    if cached is not None and not all(type(size) is int for size in cached.values()):
        raise ValueError("the sizes of its cached files are not numbers")
    return Job(recipe, dataset, base, cache, start, embedded, pictures, cached)


def cache_problems(folder: str, job: Job) -> Iterator[RunError]:
    """Yield an error for each cached file of a job folder that is missing, has another size, or is damaged."""
    cache = os.path.join(folder, _CACHE)
    here = _sizes_of(cache)
    wanted = here if job.cached is None else job.cached
    for name, size in wanted.items():
        path = os.path.join(cache, name)
        if here.get(name) != size or not is_sound(path):
            what = "is damaged" if name in here else "is missing"
            yield RunError(f"The job's file '{path}' {what}.", "Copy the whole folder that Graft Export Job wrote.")


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
    link = atomic.find_link(os.path.dirname(job))
    path = link or cache or (start_from if leaves else "")
    if path:
        raise RunError(
            f"The job '{job}' uses a file outside its folder: {'the link ' if link else ''}'{path:.200}'.",
            "Copy the whole folder that Graft Export Job wrote, without links, or export the job again.",
        )
