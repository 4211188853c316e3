"""Saves of a run: one file per step in the run's folder. Picking a save copies it to where the host's loaders look."""

import filecmp
import math
import os
import shutil

from ..errors import RunError
from ..formats import atomic, files
from ..formats.metadata import VALIDATION_LOSS
from ..text import is_below, safe_name
from .folders import BEST_FILE, SAVE_FILE, Folders, Products
from .notes import read_notes
from .run import Run

_MOST_NAMES = 100

# Fact in the recipe file of a run whose saves are all in its own folder. Earlier versions saved elsewhere.
SAVES_IN_FOLDER = "saves_in_folder"


def list_saves(folders: Folders, run: Run) -> dict[int, list[str]]:
    """Return the paths of a run's saves by step, in ascending order: its adapter, its embedding or both.

    Earlier versions put them into subfolders of the folders that the host's loaders read. Such a subfolder may hold the
    saves of a run that was started over since; they are not this run's.
    """
    places = ((run.adapters, run.folder), (run.embeddings, run.folder))
    earlier = ((os.path.join(root, run.name), root) for root in (folders.adapters, folders.embeddings))
    saves: dict[int, list[str]] = {}
    for folder, root in places if run.fact(SAVES_IN_FOLDER) is True else (*places, *earlier):
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            match = SAVE_FILE.fullmatch(name)
            path = os.path.join(folder, name)
            if match and is_below(path, root) and os.path.isfile(path):
                saves.setdefault(int(match.group(1)), []).append(path)
    best = read_best(run)
    if best is not None and best[0] not in saves:
        saves[best[0]] = _best_files(run)
    return dict(sorted(saves.items()))


def _best_files(run: Run) -> list[str]:
    paths = (os.path.join(folder, BEST_FILE) for folder in (run.adapters, run.embeddings))
    return [path for path in paths if os.path.isfile(path) and is_below(path, run.folder)]


def save_best(run: Run, products: Products, step: int, loss: float) -> None:
    """Write the files of the step with the lowest validation loss. Later saves do not remove them.

    Raises:
        RunError: a file or folder of the run is a link, or a file cannot be written.
    """
    run.refuse_links()
    for product in (products.adapter, products.embedding):
        if product is not None:
            product.metadata[VALIDATION_LOSS] = repr(loss)
    products.write(run.adapters, run.embeddings, BEST_FILE.removesuffix(".safetensors"), f"{run.name}-{step}")


def read_best(run: Run) -> tuple[int, float] | None:
    """Return step and validation loss of the files that a run keeps as its best; None without them, or if damaged."""
    for path in _best_files(run):
        try:
            metadata = files.read_metadata(path)
            step, loss = int(metadata["ss_steps"]), float(metadata[VALIDATION_LOSS])
        except (RunError, KeyError, ValueError):
            continue
        if step > 0 and math.isfinite(loss):
            return step, loss
    return None


def pick_save(folders: Folders, run: Run, step: int) -> dict[str, str]:
    """Copy the saves of a step to the folders that the host's loaders list.

    The file name consists of the run's title (its name if it has no title) and the step. Saves that are in such a
    folder already are not copied.

    Returns:
        {"adapter" or "embedding": name in the loader's list}.

    Raises:
        RunError: the run has no save of that step, or the file cannot be written.
    """
    paths = list_saves(folders, run).get(step)
    if not paths:
        raise RunError(f"The run {run.name} has no save of step {step}.", "Choose another step.")
    picked: dict[str, str] = {}
    for path in paths:
        is_embedding = is_below(path, run.embeddings) or is_below(path, folders.embeddings)
        root = folders.embeddings if is_embedding else folders.adapters
        listed = path if is_below(path, root) else _copy(path, root, _title(run), step)
        picked.setdefault("embedding" if is_embedding else "adapter", os.path.relpath(listed, root))
    return picked


def _title(run: Run) -> str:
    return safe_name(read_notes(run).title or run.name)


def _copy(path: str, root: str, title: str, step: int) -> str:
    """Copy a save into a folder under a free name and return its path. Reuse an existing copy with the same content."""
    for number in range(1, _MOST_NAMES):
        ending = "" if number == 1 else f"-{number}"
        target = os.path.join(root, f"{title}-step-{step}{ending}.safetensors")
        if not os.path.lexists(target):
            atomic.check_room(root, os.path.getsize(path))
            with atomic.replacing(target) as temporary:
                shutil.copyfile(path, temporary)
            return target
        if os.path.isfile(target) and not os.path.islink(target) and filecmp.cmp(path, target, shallow=False):
            return target
    raise RunError(f"There are {_MOST_NAMES} files named '{title}-step-{step}' in {root}.", "Remove some of them.")
