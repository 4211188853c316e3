"""JSON files, parsed strictly and written atomically, with checksums for Graft's own."""

import json
import logging
import os
import zlib
from collections.abc import Callable
from typing import Any

from ..errors import RunError
from .atomic import replacing

log = logging.getLogger(__name__)

_CHECKSUM = "checksum"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object and refuse duplicate names, because readers differ in which of them they take."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return value


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None):
    """Parse JSON from an untrusted source.

    Args:
        pairs: builds the value of an object from its pairs; may raise ValueError.

    Raises:
        ValueError: the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_json(path: str, value) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")


def read_json(path: str):
    """Return the value in a JSON file.

    Raises:
        RunError: the file cannot be read or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return parse_json(file.read())
    except (OSError, ValueError) as error:
        raise RunError(f"The file '{path}' cannot be read as JSON ({error}).", "Remove or restore it.") from error


def read_object(path: str) -> dict[str, Any]:
    """Return the JSON object in a file, empty if the file is missing, unreadable or holds something else."""
    if not os.path.exists(path):
        return {}
    try:
        value = read_json(path)
    except RunError as error:
        log.warning("Graft: %s", error)
        return {}
    return value if isinstance(value, dict) else {}


def write_own_json(path: str, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a checksum that `read_own_json` compares."""
    # Convert to JSON and back first: integer keys become strings, which sort differently.
    write_json(path, {**value, _CHECKSUM: _json_sum(json.loads(json.dumps(value)))})


def read_own_json(path: str) -> Any:
    """Return the value in a JSON file without its checksum. Files of earlier versions have no checksum.

    Raises:
        RunError: the file is not JSON or does not match its checksum.
    """
    value = read_json(path)
    if not isinstance(value, dict) or _CHECKSUM not in value:
        return value
    checksum = value.pop(_CHECKSUM)
    if checksum != _json_sum(value):
        raise RunError(
            f"The file '{path}' does not match its checksum: it is damaged, or was edited.",
            f"Restore it or remove it. If you edited it on purpose, remove its entry '{_CHECKSUM}'.",
        )
    return value


def read_own_object(path: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in a file of Graft's, empty if the file is missing, damaged or holds something else.

    Args:
        remedy: sentence for the log: what Graft does without a damaged file.
    """
    if not os.path.exists(path):
        return {}
    try:
        value = read_own_json(path)
    except RunError as error:
        log.warning("Graft: %s %s", error, remedy)
        return {}
    return value if isinstance(value, dict) else {}


def _json_sum(value: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
