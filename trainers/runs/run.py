"""Folder of a run: its recipe, log, states, saves and sample pictures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..formats import atomic, json_files
from ..formats.metadata import data_uri
from ..text import safe_name
from . import run_lock
from .checkpoint import State, read_state, write_state
from .folders import (
    BEST_FILE,
    EVENT_FILE,
    SAMPLE_FILE,
    SAVE_FILE,
    STATE_FILE,
    Folders,
    Halt,
    Products,
    list_names,
    list_steps,
    prune,
    step_of,
)

if TYPE_CHECKING:
    from PIL import Image

    from ..recipe.recipe import Recipe

log = logging.getLogger(__name__)

STOPPED = "stopped"  # the steps done so far are the result
PAUSED = "paused"  # the run resumes when the same graph is queued again

_HALT = "halted.json"
_GRAPH = "workflow.json"
_LOG = "metrics.jsonl"
_RECIPE = "recipe.json"


class Run:
    """One run on disk.

    Attributes:
        adapters, embeddings: folders for its saves, which the host's loaders do not list (see saves.py).
        damaged: damaged states that the last `load` skipped, each {"state": step, "reason": text}.
        followers: functions that `log` calls with each event after writing it.
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
        """Hold the run's lock inside the context, so that no other process trains or deletes the run.

        Raises:
            RunHeldError: another process holds it.
            RunError: the lock cannot be written.
        """
        self._lock = run_lock.acquire(self.folder)
        try:
            for folder in self._folders:
                # Temporary files are left over from an earlier holder, because only the holder writes here.
                atomic.sweep(folder, older_than=0.0)
            yield
        finally:
            lock, self._lock = self._lock, None
            lock.release()

    def _check_held(self) -> None:
        if self._lock is not None:
            self._lock.check()

    @property
    def recipe_path(self) -> str:
        """Path of the recipe. A folder without a recipe is not a run."""
        return os.path.join(self.folder, _RECIPE)

    @property
    def _folders(self) -> tuple[str, ...]:
        return self.folder, self.adapters, self.embeddings

    @classmethod
    def open(cls, folders: Folders, recipe: Recipe, identity: str, label: str) -> Run:
        """Return the run with an identity. If `on_existing` is "new", return a new run or an interrupted new one.

        Args:
            recipe: supplies the name, the number of steps and `on_existing`.
            identity: the recipe's identity; its first eight digits are part of the folder's name.
            label: name of the run if the recipe has none.

        Raises:
            RunError: the folder belongs to another run.
        """
        base = f"{safe_name(recipe.name or label)}-{identity[:8]}"
        run = cls.named(folders, base)
        number = 2
        while recipe.on_existing == "new" and (os.path.exists(run.folder) or run_lock.find_holder(run.folder)):
            # Resume a new run that was interrupted; otherwise each attempt would start another run.
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
        """Return the run with a folder name, whether the folder exists or not."""
        folder = os.path.join(folders.runs, name)
        return cls(folder, os.path.join(folder, "adapters"), os.path.join(folder, "embeddings"))

    def reached(self, steps: int) -> bool:
        """Report whether a state of at least this many steps exists."""
        return max(self.states(), default=0) >= steps

    def identity(self) -> str:
        """Return the identity in the run's recipe file, empty if there is none."""
        return str(self.fact("identity") or "")

    def fact(self, name: str) -> Any:
        """Return a value in the run's recipe file, None if there is none."""
        return json_files.read_object(self.recipe_path).get(name)

    def check_identity(self, identity: str) -> None:
        """Raise RunError if the folder belongs to another run. Hashes of eight digits can collide."""
        path = self.recipe_path
        if not os.path.exists(path):
            return
        value = json_files.read_json(path)
        if not isinstance(value, dict) or not isinstance(value.get("identity"), str):
            raise RunError(f"The file '{path}' is not a recipe.", "Restore it, or remove the run's folder.")
        try:
            json_files.read_own_json(path)
            damaged = ""
        except RunError as error:
            damaged = error.message
        if value["identity"] != identity:
            raise RunError(
                f"The run folder '{self.folder}' belongs to another run{', or its recipe is damaged' * bool(damaged)}.",
                f"Give this run another name.{f' To resume the run of that folder, remove {path}.' * bool(damaged)}",
            )
        if damaged:
            log.warning("Graft: %s Graft writes it again.", damaged)

    def clear(self) -> None:
        """Remove the files that an earlier run with the same identity wrote, and the folders that become empty.

        Files with other names stay, because the user put them there.

        Raises:
            RunError: a link is in the folder, or a file cannot be removed and would count as the new run's.
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
        plain = {_RECIPE, _GRAPH, _HALT, _LOG}
        for name in list_names(self.folder):
            if name in plain or STATE_FILE.fullmatch(name):
                yield os.path.join(self.folder, name)
        for inner, pattern in (("samples", SAMPLE_FILE), ("tensorboard", EVENT_FILE)):
            folder = os.path.join(self.folder, inner)
            yield from (os.path.join(folder, name) for name in list_names(folder) if pattern.fullmatch(name))
        for folder in (self.adapters, self.embeddings):
            names = (name for name in list_names(folder) if name == BEST_FILE or SAVE_FILE.fullmatch(name))
            yield from (os.path.join(folder, name) for name in names)

    def refuse_links(self) -> None:
        """Check that no folder of the run is a link and that its main folder contains no link.

        Raises:
            RunError: there is a link.
        """
        self._check_folders()
        link = atomic.find_link(self.folder)
        if link is not None:
            atomic.refuse_links(self.folder, link)

    def _check_folders(self) -> None:
        for folder in self._folders:
            atomic.refuse_links(os.path.dirname(folder), folder)

    def write_recipe(self, recipe: Recipe, identity: str, facts: dict) -> None:
        """Write the recipe with the run's identity and further facts.

        Raises:
            RunError: the file cannot be written, or a file or folder of the run is a link.
        """
        self._check_held()
        self.refuse_links()
        value = {"identity": identity, "recipe": recipe.as_json(), **facts}
        json_files.write_own_json(self.recipe_path, value)

    @property
    def graph_path(self) -> str:
        """Path of the workflow that the run was queued with, if the host provided it."""
        return os.path.join(self.folder, _GRAPH)

    def write_graph(self, graph: dict) -> None:
        """Write the workflow that the run was queued with last. It does not affect the training."""
        json_files.write_own_json(self.graph_path, graph)

    def note_halt(self, how: str, step: int, steps: int) -> None:
        """Record that the user ended the run at a step.

        Args:
            how: STOPPED or PAUSED.
        """
        self._check_held()
        json_files.write_own_json(os.path.join(self.folder, _HALT), {"how": how, "step": step, "steps": steps})

    def halted_as(self, how: str, steps: int) -> Halt | None:
        """Return the run's halt if it has this kind and this number of steps, else None."""
        halt = self.halt()
        return halt if halt is not None and halt.how == how and halt.steps == steps else None

    def halt(self) -> Halt | None:
        """Return the record of an early end, None if there is none or it is damaged. Resuming removes it."""
        path = os.path.join(self.folder, _HALT)
        if not os.path.exists(path):
            return None
        try:
            value = json_files.read_own_json(path)
            halt = Halt(value["how"], value["step"], value["steps"])
            if halt.how not in (STOPPED, PAUSED) or type(halt.step) is not int or type(halt.steps) is not int:
                raise ValueError("invalid values")
            return halt
        except (RunError, KeyError, TypeError, ValueError) as error:
            log.warning("Graft: ignored %s, which is damaged (%s).", path, error)
            return None

    def forget_halt(self) -> None:
        """Remove the record of an early end, so that the run continues to its last step.

        Raises:
            RunError: the file cannot be removed.
        """
        path = os.path.join(self.folder, _HALT)
        try:
            if os.path.exists(path):
                os.remove(path)
        except OSError as error:
            raise RunError(f"The file '{path}' cannot be removed ({error}).", "Remove it.") from error

    def states(self) -> list[int]:
        """Return the steps with a saved state, in ascending order."""
        return list_steps(self.folder, STATE_FILE)

    def save(self, state: State, products: Products, keep_last: int) -> str:
        """Write products and state, then remove all but the last `keep_last` of each.

        Returns:
            Path of the first product.
        """
        self._check_held()
        self._check_folders()
        paths = products.write(self.adapters, self.embeddings, f"step-{state.step:08d}", f"{self.name}-{state.step}")
        write_state(self.state_path(state.step), state)
        prune(self.folder, STATE_FILE, keep_last, state.step)
        for path in paths:
            prune(os.path.dirname(path), SAVE_FILE, keep_last, state.step)
        return paths[0]

    def load(self, limit: int) -> State | None:
        """Return the latest valid state of at most `limit` steps, None if there is none. List others in `damaged`."""
        self.damaged = []
        for step in reversed(self.states()):
            if step > limit:
                continue
            try:
                return read_state(self.state_path(step), step)
            except RunError as error:
                log.warning("Graft: %s Graft tries an earlier state.", error)
                self.damaged.append({"state": step, "reason": error.message})
        return None

    def check_room(self, values: int, slots: int) -> None:
        """Check that the disk has space for at least one save.

        Args:
            values: bytes of the trained weights.
            slots: minimum number of values that the optimizer keeps per trained value.

        Raises:
            RunError: the space is too small.
        """
        atomic.check_room(self.folder, values * (1 + slots))
        for folder in (self.adapters, self.embeddings):
            atomic.check_room(folder, 0)

    def log(self, event: dict) -> None:
        """Append an event as one line to metrics.jsonl and pass it to the followers.

        Raises:
            RunError: the file cannot be written, or its folder was removed. No partial line remains.
        """
        self._check_held()
        path = os.path.join(self.folder, _LOG)
        before = None
        atomic.refuse_links(os.path.dirname(self.folder), path)
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
        """Remove the log's lines after a step, because those steps will be repeated."""
        path = os.path.join(self.folder, _LOG)
        if not os.path.exists(path):
            return
        with open(path, "rb") as file:
            lines = [line for line in file if step_of(line) <= step]
        with atomic.replacing(path) as temporary:
            with open(temporary, "wb") as file:
                file.writelines(lines)

    def save_samples(self, step: int, pictures: list[Image.Image | list[Image.Image]], rate: int = 24) -> list[str]:
        """Write sample pictures as PNG, and clips as animated WebP. Return their paths.

        Args:
            pictures: a clip is the list of its frames.
            rate: frames per second.
        """
        self._check_held()
        paths = []
        folder = os.path.join(self.folder, "samples")
        atomic.refuse_links(os.path.dirname(self.folder), folder)
        for index, picture in enumerate(pictures):
            first, *more = picture if isinstance(picture, list) else [picture]
            path = os.path.join(folder, f"step-{step:08d}-{index + 1}.{'webp' if more else 'png'}")
            moving = {"save_all": True, "append_images": more, "duration": round(1000 / rate), "loop": 0, "quality": 85}
            with atomic.replacing(path) as temporary:
                first.save(temporary, format="WEBP" if more else "PNG", **(moving if more else {}))
            paths.append(path)
        return paths

    def samples(self) -> list[str]:
        """Return the paths of the sample pictures, ordered by step and prompt."""
        folder = os.path.join(self.folder, "samples")
        return [os.path.join(folder, name) for name in sorted(list_names(folder)) if SAMPLE_FILE.fullmatch(name)]

    def last_sample(self, step: int) -> str | None:
        """Return the path of the last sample picture up to a step, for the first prompt; None if there is none."""
        folder = os.path.join(self.folder, "samples")
        names = [name for name in list_names(folder) if SAMPLE_FILE.fullmatch(name)]
        names = [name for name in names if int(SAMPLE_FILE.fullmatch(name).group(1)) <= step]
        if not names:
            return None
        last = max(name.rpartition("-")[0] for name in names)
        return os.path.join(folder, min(name for name in names if name.startswith(f"{last}-1.")))

    def thumbnail(self, step: int) -> str | None:
        """Return the last sample picture up to a step as a small data URI, None if there is none."""
        path = self.last_sample(step)
        return None if path is None else data_uri(path)

    def state_path(self, step: int) -> str:
        """Return the path of the state after a step."""
        return os.path.join(self.folder, f"state-{step:08d}.safetensors")
