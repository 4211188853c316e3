"""Use of files that an earlier version wrote, which identify a base model by a fingerprint of sampled weights.

Two base models may share such a fingerprint. The first one that asks for the files counts as the one that made them,
and `bases.json` records its full fingerprint. From then on, `claim` refuses every other base model.
"""

from __future__ import annotations

import logging
import os

from ..errors import RunError
from ..formats import json_files

log = logging.getLogger(__name__)

_FILE = "bases.json"


def claim(folder: str, sampled: str, whole: str) -> bool:
    """Report whether a base model may use the files that an earlier version wrote into a folder.

    Args:
        folder: the folder, which also holds the record of claims.
        sampled: the fingerprint from sampled weights, which the earlier version used.
        whole: the fingerprint from all weights.
    """
    if sampled == whole:
        return True
    path = os.path.join(folder, _FILE)
    known = _read(path)
    if sampled not in known:
        known[sampled] = whole
        try:
            json_files.write_json(path, known)
        except RunError as error:
            # Continue without the record: an unwritable folder cannot be overwritten either.
            log.debug("Graft: %s", error)
    return known[sampled] == whole


def _read(path: str) -> dict[str, str]:
    if not os.path.exists(path):
        return {}
    try:
        value = json_files.read_json(path)
    except RunError as error:
        log.warning("Graft: %s Graft writes it again.", error)
        return {}
    return {name: base for name, base in value.items() if isinstance(base, str)} if isinstance(value, dict) else {}
