"""Use of files that an earlier version wrote, which identify a base model by a fingerprint of sampled weights.

Two base models may share such a fingerprint. The first one that asks for the files counts as the one that made them,
and `bases.json` records its full fingerprint. From then on, `claim` refuses every other base model.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from ..errors import RunError
from ..fingerprints import base_digest, earlier_fingerprint
from ..formats import json_files
from ..formats.metadata import tensors_hash
from ..protocols import HOLE

if TYPE_CHECKING:
    from ..formats.adapter import Adapter
    from ..formats.embedding import Embedding
    from ..protocols import Host
    from .run import Run

log = logging.getLogger(__name__)

_FILE = "bases.json"
# Fact of a run: the rounding that it was begun with. Raise the number when a step's bits change.
_ARITHMETIC = "arithmetic"
ARITHMETIC = 3


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
            json_files.write_own_json(path, known)
        except RunError as error:
            # Continue without the record: an unwritable folder cannot be overwritten either.
            log.debug("Graft: %s", error)
    return known[sampled] == whole


def _read(path: str) -> dict[str, str]:
    value = json_files.read_own_object(path, "Graft writes it again.")
    return {name: digest for name, digest in value.items() if isinstance(digest, str)}


def base_digests(host: Host, start: Adapter | Embedding | None) -> tuple[str, str]:
    """Return the hash of the base and the values to start from, and the same hash as earlier versions computed it."""
    additions = []
    if host.denoiser.conditioning_kind == HOLE:
        # Earlier versions gave inpainting models no inpaint mask. Such a run must not be resumed.
        additions.append("holes")
    if start is not None:
        native = getattr(start, "native", None)
        additions.append(tensors_hash(start if native is None else native.all_tensors()))
    parts = (host.denoiser, host.text, host.codec)
    fingerprints = [part.fingerprint() for part in parts]
    earlier_fingerprints = [earlier_fingerprint(part) for part in parts]
    return base_digest(*fingerprints, *additions), base_digest(*earlier_fingerprints, *additions)


def arithmetic(run: Run, step: int) -> dict[str, int | None]:
    """Return the fact that says how the run's steps are rounded. Warn if a run that resumes was begun otherwise."""
    begun = ARITHMETIC if step == 0 else run.fact(_ARITHMETIC)
    if begun != ARITHMETIC:
        log.warning(
            "Graft: run %s was begun with a version of Graft that rounds in another way. It resumes from its last "
            "save. The result will differ in the last digits from that of a run without the interruption.",
            run.name,
        )
        run.log({"event": "arithmetic", "step": step, "begun": begun, "now": ARITHMETIC})
    return {_ARITHMETIC: begun}
