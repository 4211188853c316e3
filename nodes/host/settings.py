"""The user's values from ComfyUI's settings dialog, read from the file that ComfyUI keeps them in."""

import logging
import os
from typing import Any

import folder_paths

from ...trainers.errors import RunError
from ...trainers.formats.json_files import read_json
from ...trainers.recipe.options import GIVE_WAY, GIVE_WAY_OFF

log = logging.getLogger(__name__)

# With several users, only the default user's settings count: they hold for the whole server.
_USER = "default"
_FILE = "comfy.settings.json"

DATASET_ROOTS = "Graft.DatasetRoots"
CACHE_LIMIT = "Graft.CacheLimit"
GIVE_WAY_TO = "Graft.GiveWay"
GIVE_WAY_AFTER = "Graft.GiveWayAfter"
GIVE_WAY_KEEP = "Graft.GiveWayKeep"


def preference(name: str, default: Any) -> Any:
    """Return the value of a setting, or `default` if it was never set or has another type."""
    path = os.path.join(folder_paths.get_user_directory(), _USER, _FILE)
    if not os.path.isfile(path):
        return default
    try:
        value = read_json(path).get(name, default)
    except (RunError, AttributeError) as error:
        log.warning("Graft: cannot read ComfyUI's settings; Graft uses its defaults: %s", error)
        return default
    same = isinstance(value, type(default)) or (isinstance(default, float) and isinstance(value, int))
    return value if same and not isinstance(value, bool) else default


def dataset_roots() -> list[str]:
    """Return the absolute real paths of the folders below which the user allowed datasets."""
    roots = []
    for part in preference(DATASET_ROOTS, "").replace("\n", ";").split(";"):
        path = os.path.expanduser(part.strip().strip('"'))
        if not os.path.isabs(path) or not os.path.isdir(path):
            continue
        real = os.path.realpath(path)
        # Skip the root of a disk: listing it would take minutes.
        if os.path.dirname(real) != real:
            roots.append(real)
    return list(dict.fromkeys(roots))


def cache_limit() -> int:
    """Return the limit of the latent and text cache in bytes."""
    return int(max(0.0, float(preference(CACHE_LIMIT, 50.0))) * 1024**3)


def give_way() -> str:
    """Return the prompts that trainings give way to, one of GIVE_WAY."""
    value = preference(GIVE_WAY_TO, GIVE_WAY_OFF)
    return value if value in GIVE_WAY else GIVE_WAY_OFF


def give_way_after() -> float:
    """Return the seconds that a training has at least between two pauses."""
    return max(0.0, float(preference(GIVE_WAY_AFTER, 60.0)))


def give_way_keep() -> float:
    """Return the seconds for which a training that gave way stays prepared in memory, 0 for not at all."""
    return 60 * max(0.0, float(preference(GIVE_WAY_KEEP, 10.0)))
