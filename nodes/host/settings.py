"""What the user set in ComfyUI's settings dialog, read where the host keeps it."""

from __future__ import annotations

import logging
import os
from typing import Any

import folder_paths

from ...trainers.errors import RunError
from ...trainers.formats.files import read_json

log = logging.getLogger(__name__)

# With several users only the first one's count: what they allow holds for the whole server.
_USER = "default"
_FILE = "comfy.settings.json"

DATASET_ROOTS = "Graft.DatasetRoots"
CACHE_LIMIT = "Graft.CacheLimit"


def preference(name: str, default: Any) -> Any:
    """The value of a setting, `default` when it was never set or is of another type."""
    path = os.path.join(folder_paths.get_user_directory(), _USER, _FILE)
    if not os.path.isfile(path):
        return default
    try:
        value = read_json(path).get(name, default)
    except (RunError, AttributeError) as error:
        log.warning("Graft: ComfyUI's settings cannot be read, so the usual ones hold: %s", error)
        return default
    same = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
    return value if same and not isinstance(value, bool) else default


def dataset_roots() -> list[str]:
    """Absolute paths of the folders below which the user allowed datasets, links followed."""
    roots = []
    for part in preference(DATASET_ROOTS, "").replace("\n", ";").split(";"):
        path = os.path.expanduser(part.strip().strip('"'))
        if not os.path.isabs(path) or not os.path.isdir(path):
            continue
        real = os.path.realpath(path)
        # A whole disk is no folder of datasets: listing it would take minutes.
        if os.path.dirname(real) != real:
            roots.append(real)
    return list(dict.fromkeys(roots))


def cache_limit() -> int:
    """Bytes that cached latents and texts may take."""
    return int(max(0.0, float(preference(CACHE_LIMIT, 50.0))) * 1024**3)
