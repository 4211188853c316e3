"""Warnings about a dataset that the user sees when a training starts.

A warning is a JSON-serializable dict: `kind`, `text` in English, and the values that the text names. A page that does
not know the kind shows the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.dataset_file import EXCLUDED
from ..families import GENERAL, family_of

if TYPE_CHECKING:
    from ..data.buckets import Crop
    from ..data.examples import Dataset, Example, LeftOut

# Number of names in one warning; the text counts the others.
_NAMED = 8
# A picture that is enlarged by more than this factor looks blurred.
_BLURRED = 1.5
# A resolution that is larger or smaller than the model's own by this factor is unusual.
_UNUSUAL = 1.5


def warn_of_skipped(left_out: Sequence[LeftOut], total: int) -> dict[str, Any] | None:
    """Warn of files that are not trained on, with their names and reasons; not of those that the user excluded."""
    left_out = [row for row in left_out if row.reason != EXCLUDED]
    if not left_out:
        return None
    names = _join([str(row) for row in left_out])
    text = f"{len(left_out)} of {total} files skipped: {names}."
    return {"kind": "skipped", "text": text, "count": len(left_out), "total": total, "names": names}


def warn_of_scan(dataset: Dataset) -> list[dict[str, Any]]:
    """Pass on the warnings of the folder's scan, such as of folder names that repeat their pictures very often."""
    return [{"kind": "scan", "text": text} for text in dataset.warnings]


def warn_of_enlarged(pictures: Sequence[tuple[Example, Crop]]) -> dict[str, Any] | None:
    """Warn of pictures that are enlarged so far that they look blurred; give the smallest side.

    Args:
        pictures: each example with one of its crops, which its worse picture gets too.
    """
    sizes: dict[str, tuple[int, int]] = {}
    worse = [(example.paired, crop) for example, crop in pictures if example.paired is not None]
    for example, crop in [*pictures, *worse]:
        if crop.scaled[0] > _BLURRED * example.size[0]:
            side = min(example.size), min(crop.scaled)
            sizes[example.source.name] = max(side, sizes.get(example.source.name, side), key=lambda sides: sides[1])
    if not sizes:
        return None
    names = _join(sorted(sizes, key=sizes.get))
    smallest, side = min(sizes.values())
    text = f"Enlarged pictures, the smallest from {smallest} to {side} pixels: {names}."
    return {
        "kind": "enlarged",
        "text": text,
        "count": len(sizes),
        "smallest": smallest,
        "side": side,
        "names": names,
    }


def warn_of_resolution(resolution: int, family: str) -> dict[str, Any] | None:
    """Warn of a resolution that is far from the model's own.

    Args:
        resolution: side of the training square in pixels.
        family: name of the model's family; an unknown family has no usual resolution.
    """
    known = family_of(family)
    if known is GENERAL or known.resolution / _UNUSUAL <= resolution <= known.resolution * _UNUSUAL:
        return None
    text = (
        f"resolution {resolution} is far from the {known.resolution} pixels that {known.name} was made for. "
        "Leave resolution at 0 to use those."
    )
    return {
        "kind": "resolution",
        "text": text,
        "resolution": resolution,
        "usual": known.resolution,
        "family": known.name,
    }


def _join(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
