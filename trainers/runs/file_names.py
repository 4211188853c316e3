"""Names of the files in a run's folder, and which of them are kept."""

from __future__ import annotations

import logging
import os
import re

from ..formats import json_files
from ..text import is_windows_reserved

log = logging.getLogger(__name__)

STATE_FILE = re.compile(r"state-(\d{8})\.safetensors")
SAMPLE_FILE = re.compile(r"step-(\d{8})-\d+\.(?:png|webp)")
SAVE_FILE = re.compile(r"step-(\d{8})\.safetensors")
BEST_FILE = "best.safetensors"  # the step with the lowest validation loss
EVENT_FILE = re.compile(r"events\.out\.tfevents\..+")


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


_NAME = re.compile(r"\w[\w.-]{0,63}-[0-9a-f]{8}(?:-[0-9]{1,6})?")


def is_name(text: str) -> bool:
    """Report whether a text is a valid name of a run's folder: a single path component on every system."""
    return _NAME.fullmatch(text) is not None and not is_windows_reserved(text)
