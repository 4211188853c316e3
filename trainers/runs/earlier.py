"""Files of earlier versions, which know a base by samples of its weights: two bases may look alike to them.

Whoever asks first is taken for the base that they were made with, and is written down. A base of other weights that
looks alike is refused from then on.
"""

from __future__ import annotations

import logging
import os

from ..errors import RunError
from ..formats import files

log = logging.getLogger(__name__)

_FILE = "bases.json"


def claim(folder: str, sampled: str, whole: str) -> bool:
    """Whether what an earlier version made in a folder may be used.

    Args:
        sampled: the fingerprint that it was made with.
        whole: the fingerprint of all that decides it.
    """
    if sampled == whole:
        return True
    path = os.path.join(folder, _FILE)
    known = _read(path)
    if sampled not in known:
        known[sampled] = whole
        try:
            files.write_json(path, known)
        except RunError as error:
            # Where nothing can be written nothing is overwritten either.
            log.debug("Graft: %s", error)
    return known[sampled] == whole


def _read(path: str) -> dict[str, str]:
    if not os.path.exists(path):
        return {}
    try:
        value = files.read_json(path)
    except RunError as error:
        log.warning("Graft: %s It is written anew.", error)
        return {}
    return {name: one for name, one in value.items() if isinstance(one, str)} if isinstance(value, dict) else {}
