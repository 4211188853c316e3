"""Folders that runs are kept in, the names of the files in a run's folder, and the values that they hold."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..formats import json_files
from ..text import is_windows_reserved

if TYPE_CHECKING:
    from ..data.examples import Example
    from ..formats.adapter import Adapter, LazyAdapter
    from ..formats.embedding import Embedding

log = logging.getLogger(__name__)

STATE_FILE = re.compile(r"state-(\d{8})\.safetensors")
SAMPLE_FILE = re.compile(r"step-(\d{8})-\d+\.(?:png|webp)")
SAVE_FILE = re.compile(r"step-(\d{8})\.safetensors")
BEST_FILE = "best.safetensors"  # the step with the lowest validation loss
EVENT_FILE = re.compile(r"events\.out\.tfevents\..+")

_NAME = re.compile(r"\w[\w.-]{0,63}-[0-9a-f]{8}(?:-[0-9]{1,6})?")


@dataclass(frozen=True)
class Folders:
    """Folders that training writes to.

    Attributes:
        runs: contains one folder per run.
        cache: latents and conditionings, shared by all runs.
        adapters: the host's adapter folder; a run's save is copied there when the user picks it.
        embeddings: the host's embedding folder.
        cache_limit: bytes; if the cache grows beyond this, entries of earlier runs are removed.
        adapter_of: returns the path of an adapter by its name in the host's list.
        picture_of: returns the path of a picture in the host's input folders by its name.
        pictures: pictures that a job brings along encoded, by their names in prompts.
    """

    runs: str
    cache: str
    adapters: str
    embeddings: str
    cache_limit: int = 50 * 1024**3
    adapter_of: Callable[[str], str] = str
    picture_of: Callable[[str], str] = str
    pictures: Mapping[str, Example] = field(default_factory=dict)


@dataclass(frozen=True)
class Products:
    """Trained files of a run at one step.

    Attributes:
        adapter: adapter with the host's names; None if the run trains nothing of the model.
        embedding: None if the run trains no embedding.
    """

    adapter: Adapter | LazyAdapter | None = None
    embedding: Embedding | None = None

    def write(self, adapters: str, embeddings: str, stem: str, title: str) -> list[str]:
        """Write the files, named after `stem`, into their folders. Return their paths."""
        from ..formats.adapter import save_adapter
        from ..formats.embedding import save_embedding

        paths = []
        for folder, product, save in (
            (adapters, self.adapter, save_adapter),
            (embeddings, self.embedding, save_embedding),
        ):
            if product is not None:
                paths.append(os.path.join(folder, f"{stem}.safetensors"))
                save(paths[-1], product, title)
        return paths


@dataclass(frozen=True)
class Halt:
    """Record that the user ended a run before its last step.

    Attributes:
        how: STOPPED or PAUSED.
    """

    how: str
    step: int
    steps: int


def list_names(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def list_steps(folder: str, pattern: re.Pattern) -> list[int]:
    matches = (pattern.fullmatch(name) for name in list_names(folder))
    return sorted(int(match.group(1)) for match in matches if match)


def prune(folder: str, pattern: re.Pattern, keep: int, written: int) -> None:
    """Remove all but the last `keep` files up to step `written`. Files of later steps, from a longer run, stay."""
    stem = pattern.pattern.split("-")[0]
    older = [number for number in list_steps(folder, pattern) if number <= written]
    for number in older[:-keep]:
        path = os.path.join(folder, f"{stem}-{number:08d}.safetensors")
        try:
            os.remove(path)
        except OSError as error:
            log.warning("Graft: the old file %s cannot be removed: %s", path, error)


def step_of(line: bytes) -> int:
    try:
        step = json_files.parse_json(line).get("step", 0)
    except (ValueError, AttributeError):
        step = None
    return step if type(step) is int else 1 << 62


def is_name(text: str) -> bool:
    """Report whether a text is a valid name of a run's folder: a single path component on every system."""
    return _NAME.fullmatch(text) is not None and not is_windows_reserved(text)
