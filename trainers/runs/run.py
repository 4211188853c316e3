"""A run's folder: its recipe, its log, its states, its pictures."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..formats import files
from ..formats.metadata import data_uri
from ..text import is_windows_reserved, safe_name
from . import run_lock
from .checkpoint import State, read_state, write_state

if TYPE_CHECKING:
    from PIL import Image

    from ..formats.adapter import Adapter, LazyAdapter
    from ..formats.embedding import Embedding
    from ..recipe.recipe import Recipe

log = logging.getLogger(__name__)

STOPPED = "stopped"  # what was reached is the result
PAUSED = "paused"  # it is to go on when the same graph is queued again

_HALT = "halted.json"
_GRAPH = "workflow.json"
_NAME = re.compile(r"\w[\w.-]{0,63}-[0-9a-f]{8}(?:-[0-9]{1,6})?")

_STATE = re.compile(r"state-(\d{8})\.safetensors")
_SAMPLE = re.compile(r"step-(\d{8})-\d+\.png")
_PRODUCT = re.compile(r"step-(\d{8})\.safetensors")
_EVENTS = re.compile(r"events\.out\.tfevents\..+")
_LOG = "metrics.jsonl"
_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Folders:
    """Where things are written.

    Attributes:
        runs: one folder each run.
        cache: latents and conditionings, shared by all runs.
        adapters: where the host's loaders look for adapters; a run's saves come there when one is picked.
        embeddings: where its tokenizers look for embeddings.
        adapter_of: the path of an adapter of the host's list, by its name there.
        cache_limit: bytes; past this the caches of earlier runs make room.
    """

    runs: str
    cache: str
    adapters: str
    embeddings: str
    cache_limit: int = 50 * 1024**3
    adapter_of: Callable[[str], str] = str


@dataclass(frozen=True)
class Products:
    """What a run makes at a step.

    Attributes:
        adapter: in the host's names; None where nothing of the model is trained.
        embedding: None where none is trained.
    """

    adapter: Adapter | LazyAdapter | None = None
    embedding: Embedding | None = None


@dataclass(frozen=True)
class Halt:
    """That a run was asked to end before its last step.

    Attributes:
        how: STOPPED or PAUSED.
        step: the last one that was done.
        steps: it was to have.
    """

    how: str
    step: int
    steps: int


class Run:
    """One run on disk.

    Attributes:
        folder: for recipe, log, states and pictures.
        adapters, embeddings: folders for what it saves; the host's loaders do not list them (see saves.py).
        damaged: the states that the last `load` passed over, each {"state": step, "reason": text}.
        followers: called with each event after it was logged.
    """

    def __init__(self, folder: str, adapters: str, embeddings: str):
        self.folder = folder
        self.adapters = adapters
        self.embeddings = embeddings
        self.name = os.path.basename(folder)
        self.damaged: list[dict[str, Any]] = []
        self.followers: list[Callable[[dict], None]] = []
        self._lock: run_lock.RunLock | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run within the block: no other process trains or deletes it meanwhile.

        Raises:
            RunHeldError: another process holds it.
            RunError: the lock cannot be written.
        """
        self._lock = run_lock.acquire(self.folder)
        try:
            for folder in self._folders:
                # Whoever wrote here held the run before, and is gone.
                files.sweep(folder, older_than=0.0)
            yield
        finally:
            lock, self._lock = self._lock, None
            lock.release()

    def _check_held(self) -> None:
        """Raise RunHeldError where another process took the run over."""
        if self._lock is not None:
            self._lock.check()

    @property
    def recipe_path(self) -> str:
        """What the run is made with; a folder that has none is no run."""
        return os.path.join(self.folder, _RECIPE)

    @property
    def _folders(self) -> tuple[str, ...]:
        return self.folder, self.adapters, self.embeddings

    @classmethod
    def open(cls, folders: Folders, recipe: Recipe, identity: str, label: str) -> Run:
        """The run of an identity, as the recipe's `on_existing` wants it.

        Args:
            label: name when the user gave none.
        """
        base = f"{safe_name(recipe.name or label)}-{identity[:8]}"
        run = cls.named(folders, base)
        number = 2
        while recipe.on_existing == "new" and (os.path.exists(run.folder) or run_lock.find_holder(run.folder)):
            # A new run that was interrupted is the one to go on with, or each attempt would start another.
            done = run.reached(recipe.steps) or run.halted_as(STOPPED, recipe.steps)
            interrupted = (number > 2 and not done) or run.halted_as(PAUSED, recipe.steps)
            if interrupted and not run_lock.find_holder(run.folder):
                break
            run = cls.named(folders, f"{base}-{number}")
            number += 1
        run.check_identity(identity)
        return run

    @classmethod
    def named(cls, folders: Folders, name: str) -> Run:
        """The run of a folder's name, whether it is there or not."""
        folder = os.path.join(folders.runs, name)
        return cls(folder, os.path.join(folder, "adapters"), os.path.join(folder, "embeddings"))

    def reached(self, steps: int) -> bool:
        """Whether a state of at least so many steps is kept."""
        return max(self.states(), default=0) >= steps

    def identity(self) -> str:
        """The identity in its recipe; empty where the folder holds none."""
        try:
            value = files.read_json(self.recipe_path) if os.path.exists(self.recipe_path) else {}
        except RunError as error:
            log.warning("Graft: %s", error)
            return ""
        found = value.get("identity") if isinstance(value, dict) else None
        return found if isinstance(found, str) else ""

    def check_identity(self, identity: str) -> None:
        """Raises RunError when the folder belongs to something else (a hash of eight digits may collide)."""
        path = self.recipe_path
        if not os.path.exists(path):
            return
        value = files.read_json(path)
        if not isinstance(value, dict) or not isinstance(value.get("identity"), str):
            raise RunError(f"The file '{path}' is no recipe.", "Restore it, or remove the run's folder.")
        try:
            files.read_own_json(path)
            damaged = ""
        except RunError as error:
            damaged = error.message
        if value["identity"] != identity:
            raise RunError(
                f"The run folder '{self.folder}' belongs to another run{', or its recipe is damaged' * bool(damaged)}.",
                f"Give this run a name of its own.{f' To go on with it, remove {path}.' * bool(damaged)}",
            )
        if damaged:
            log.warning("Graft: %s It will be written anew.", damaged)

    def clear(self) -> None:
        """Remove the files that an earlier run of the same identity wrote, and folders that are then empty.

        Files of other names stay: the user has put them there.

        Raises:
            RunError: a file cannot be removed, and would be taken for the new run's, or there is a link.
        """
        self._check_held()
        self.refuse_links()
        for path in self._written():
            try:
                os.remove(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise RunError(
                    f"The file '{path}' cannot be removed ({error}).", "Close what holds it open, or remove it."
                ) from error
        inner = [os.path.join(self.folder, name) for name in ("samples", "tensorboard")]
        for folder in (*inner, *self._folders):
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)

    def _written(self) -> Iterator[str]:
        """Paths of the files there that a run writes, by their names."""
        plain = {_RECIPE, _GRAPH, _HALT, _LOG}
        for name in _listed(self.folder):
            if name in plain or _STATE.fullmatch(name):
                yield os.path.join(self.folder, name)
        for inner, pattern in (("samples", _SAMPLE), ("tensorboard", _EVENTS)):
            folder = os.path.join(self.folder, inner)
            yield from (os.path.join(folder, name) for name in _listed(folder) if pattern.fullmatch(name))
        for folder in (self.adapters, self.embeddings):
            yield from (os.path.join(folder, name) for name in _listed(folder) if _PRODUCT.fullmatch(name))

    def refuse_links(self) -> None:
        """Refuse a link in place of one of the run's folders, or anywhere in the folder of its states.

        Raises:
            RunError: naming the link.
        """
        self._check_folders()
        link = files.find_link(self.folder)
        if link is not None:
            files.refuse_links(self.folder, link)

    def _check_folders(self) -> None:
        for folder in self._folders:
            files.refuse_links(os.path.dirname(folder), folder)

    def write_recipe(self, recipe: Recipe, identity: str, facts: dict) -> None:
        """Keeps what the run is made with.

        Raises:
            RunError: the file cannot be written, or a link takes the place of something of the run's.
        """
        self._check_held()
        self.refuse_links()
        value = {"identity": identity, "recipe": recipe.as_json(), **facts}
        files.write_own_json(self.recipe_path, value)

    @property
    def graph_path(self) -> str:
        """What the run was queued as, where the host said so."""
        return os.path.join(self.folder, _GRAPH)

    def write_graph(self, graph: dict) -> None:
        """Keeps what the run was queued as last, which decides nothing of it."""
        files.write_own_json(self.graph_path, graph)

    def note_halt(self, how: str, step: int, steps: int) -> None:
        """Keeps that the run was asked to end at a step, STOPPED or PAUSED."""
        self._check_held()
        files.write_own_json(os.path.join(self.folder, _HALT), {"how": how, "step": step, "steps": steps})

    def halted_as(self, how: str, steps: int) -> Halt | None:
        """How the run was asked to end while it was to have so many steps, None if it was not or else."""
        halt = self.halt()
        return halt if halt is not None and halt.how == how and halt.steps == steps else None

    def halt(self) -> Halt | None:
        """How the run was asked to end, if nothing was trained since."""
        path = os.path.join(self.folder, _HALT)
        if not os.path.exists(path):
            return None
        try:
            value = files.read_own_json(path)
            halt = Halt(value["how"], value["step"], value["steps"])
            if halt.how not in (STOPPED, PAUSED) or type(halt.step) is not int or type(halt.steps) is not int:
                raise ValueError("no such values")
            return halt
        except (RunError, KeyError, TypeError, ValueError) as error:
            log.warning("Graft: %s is damaged (%s) and counts for nothing.", path, error)
            return None

    def forget_halt(self) -> None:
        """Lets the run go on to its last step.

        Raises:
            RunError: the file that says otherwise cannot be removed.
        """
        path = os.path.join(self.folder, _HALT)
        try:
            if os.path.exists(path):
                os.remove(path)
        except OSError as error:
            raise RunError(f"The file '{path}' cannot be removed ({error}).", "Remove it.") from error

    def states(self) -> list[int]:
        """Steps of which a state is kept, rising."""
        return _numbers(self.folder, _STATE)

    def save(self, state: State, products: Products, keep_last: int) -> str:
        """Writes what was made and the state, then removes those older than the last K; the first product's path."""
        self._check_held()
        from ..formats.adapter import save_adapter
        from ..formats.embedding import save_embedding

        self._check_folders()
        title = f"{self.name}-{state.step}"
        paths = []
        for folder, product, write in (
            (self.adapters, products.adapter, save_adapter),
            (self.embeddings, products.embedding, save_embedding),
        ):
            if product is not None:
                paths.append(os.path.join(folder, f"step-{state.step:08d}.safetensors"))
                write(paths[-1], product, title)
        write_state(self.state_path(state.step), state)
        _prune(self.folder, _STATE, keep_last, state.step)
        for path in paths:
            _prune(os.path.dirname(path), _PRODUCT, keep_last, state.step)
        return paths[0]

    def load(self, limit: int) -> State | None:
        """The latest sound state of at most `limit` steps, None when there is none; `damaged` tells of others."""
        self.damaged = []
        for step in reversed(self.states()):
            if step > limit:
                continue
            try:
                return read_state(self.state_path(step), step)
            except RunError as error:
                log.warning("Graft: %s Trying an earlier state.", error)
                self.damaged.append({"state": step, "reason": error.message})
        return None

    def check_room(self, values: int, slots: int) -> None:
        """Refuses to begin where not even one save could be written.

        Args:
            values: bytes of what is trained.
            slots: how many numbers the optimiser keeps for each, at least.

        Raises:
            RunError: naming the folder.
        """
        files.check_room(self.folder, values * (1 + slots))
        for folder in (self.adapters, self.embeddings):
            files.check_room(folder, 0)

    def log(self, event: dict) -> None:
        """Appends one line to metrics.jsonl, and tells the followers.

        Raises:
            RunError: it cannot be written, or was removed with its folder; no part of the line stays.
        """
        self._check_held()
        path = os.path.join(self.folder, _LOG)
        before = None
        files.refuse_links(os.path.dirname(self.folder), path)
        try:
            with open(path, "ab") as file:
                before = file.tell()
                file.write(json.dumps(event).encode() + b"\n")
        except OSError as error:
            if before is not None:
                os.truncate(path, before)
            raise RunError(
                f"The file '{path}' cannot be written ({error}).",
                "Free space on that disk, or make the folder writable; if it was removed, queue the graph again.",
            ) from error
        for follow in self.followers:
            follow(event)

    def forget_after(self, step: int) -> None:
        """Drops the log's lines of steps that will be done again."""
        path = os.path.join(self.folder, _LOG)
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            lines = [line for line in file if _step_of(line) <= step]
        with files.replacing(path) as temporary:
            with open(temporary, "wb") as file:
                file.writelines(lines)

    def save_samples(self, step: int, pictures: list[Image.Image]) -> list[str]:
        """Writes sample pictures; their paths."""
        self._check_held()
        paths = []
        folder = os.path.join(self.folder, "samples")
        files.refuse_links(os.path.dirname(self.folder), folder)
        for index, picture in enumerate(pictures):
            path = os.path.join(folder, f"step-{step:08d}-{index + 1}.png")
            with files.replacing(path) as temporary:
                picture.save(temporary, format="PNG")
            paths.append(path)
        return paths

    def samples(self) -> list[str]:
        """Paths of the sample pictures, in the order of their steps and prompts."""
        folder = os.path.join(self.folder, "samples")
        return [os.path.join(folder, name) for name in sorted(_listed(folder)) if _SAMPLE.fullmatch(name)]

    def last_sample(self, step: int) -> str | None:
        """Path of the last sample picture up to a step, the first prompt's; None where there is none."""
        folder = os.path.join(self.folder, "samples")
        names = [name for name in _listed(folder) if _SAMPLE.fullmatch(name)]
        names = [name for name in names if int(_SAMPLE.fullmatch(name).group(1)) <= step]
        if not names:
            return None
        last = max(name.rpartition("-")[0] for name in names)
        return os.path.join(folder, f"{last}-1.png")

    def thumbnail(self, step: int) -> str | None:
        """The last sample picture up to a step as a small data URI, None where there is none."""
        path = self.last_sample(step)
        return None if path is None else data_uri(path)

    def state_path(self, step: int) -> str:
        """Of the state after a step."""
        return os.path.join(self.folder, f"state-{step:08d}.safetensors")


def is_name(text: str) -> bool:
    """Whether a text can be the name of a run's folder: one part of a path, on any system."""
    return _NAME.fullmatch(text) is not None and not is_windows_reserved(text)


def _listed(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _numbers(folder: str, pattern: re.Pattern) -> list[int]:
    matches = (pattern.fullmatch(name) for name in _listed(folder))
    return sorted(int(match.group(1)) for match in matches if match)


def _prune(folder: str, pattern: re.Pattern, keep: int, written: int) -> None:
    """Leaves the last `keep` files up to the one just written; those of a longer run lie beyond it and stay."""
    stem = pattern.pattern.split("-")[0]
    older = [number for number in _numbers(folder, pattern) if number <= written]
    for number in older[:-keep]:
        path = os.path.join(folder, f"{stem}-{number:08d}.safetensors")
        try:
            os.remove(path)
        except OSError as error:
            log.warning("Graft: the old file %s cannot be removed: %s", path, error)


def _step_of(line: bytes) -> int:
    try:
        step = files.parse_json(line).get("step", 0)
    except (ValueError, AttributeError):
        step = None
    return step if type(step) is int else 1 << 62
