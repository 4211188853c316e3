"""Detection of pictures that look alike, by a perceptual hash: the DCT hash of imagehash (Zauner 2010)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.examples import Example, LeftOut, reason_of
from ..errors import DatasetError, RunError
from ..formats import json_files

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# Sides of the hash and of the thumbnails.
_LOW = 8
# Maximum distances: bits of 64, and the mean color difference (0..255) of 8x8 thumbnails. The thumbnails
# distinguish flat pictures with the same hash.
_BITS = 8
_COLORS = 16.0


def signature(picture: Image.Image) -> bytes:
    """Return the 8 bytes of DCT hash and the 192 bytes of 8x8 thumbnail of a picture in RGB."""
    import imagehash
    from PIL import Image

    bits = imagehash.phash(picture, hash_size=_LOW).hash
    small = np.asarray(picture.resize((_LOW, _LOW), Image.BOX))
    return np.packbits(bits).tobytes() + small.tobytes()


def signatures(
    examples: Sequence[Example], folder: str | None, tick: Callable[[int, int], None]
) -> tuple[list[bytes | None], list[LeftOut]]:
    """Return the signature of each example, None if it cannot be decoded, and the files that cannot be decoded.

    Args:
        folder: keeps signatures between calls; None to keep none.
        tick: called with (done, total); may raise to interrupt. The folder keeps the signatures made so far.
    """
    path = os.path.join(folder, "likeness.json") if folder else None
    known = {} if path is None else _read(path)
    before = len(known)
    computed: list[bytes | None] = []
    broken = []
    try:
        for number, example in enumerate(examples):
            tick(number, len(examples))
            try:
                if example.digest not in known:
                    known[example.digest] = signature(example.source.open()).hex()
                computed.append(bytes.fromhex(known[example.digest]))
            except DatasetError as error:
                broken.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
                computed.append(None)
    finally:
        if path and len(known) > before:
            _write(path, known)
    tick(len(examples), len(examples))
    return computed, broken


def _read(path: str) -> dict[str, str]:
    value = json_files.read_own_object(path, "Graft computes the signatures again.")
    size = 2 * (_LOW * _LOW // 8 + 3 * _LOW * _LOW)
    return {name: text for name, text in value.items() if isinstance(text, str) and len(text) == size}


def _write(path: str, known: dict[str, str]) -> None:
    try:
        json_files.write_own_json(path, known)
    except RunError as error:
        log.warning("Graft: %s", error)


def find_near_duplicates(marks: Sequence[bytes | None]) -> list[tuple[int, int]]:
    """Return pairs (i, j), i < j, of signatures that differ little; for each j only the first i."""
    rows = [index for index, mark in enumerate(marks) if mark is not None]
    if len(rows) < 2:
        return []
    hashes = np.array([np.frombuffer(marks[index][:8], dtype=np.uint8) for index in rows])
    hashes = np.ascontiguousarray(hashes).view(np.uint64).ravel()
    thumbs = np.array([np.frombuffer(marks[index][8:], dtype=np.uint8) for index in rows]).astype(np.int16)
    pairs = []
    for place in range(1, len(rows)):
        near = np.flatnonzero(_bits(hashes[:place] ^ hashes[place]) <= _BITS)
        for other in near:
            if np.abs(thumbs[other] - thumbs[place]).mean() <= _COLORS:
                pairs.append((rows[other], rows[place]))
                break
    return pairs


# numpy 1 has no bitwise_count.
_COUNTS = np.array([bin(value).count("1") for value in range(256)], dtype=np.uint8)


def _bits(values: np.ndarray) -> np.ndarray:
    """Count the bits that are set in each uint64."""
    return _COUNTS[values.view(np.uint8).reshape(-1, 8)].sum(1)
