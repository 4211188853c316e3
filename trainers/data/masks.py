"""Mask files in a folder, and the pictures that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError
from .listing import File, Listing, Owners, stem_of
from .pictures import is_picture

if TYPE_CHECKING:
    from .examples import Dataset

_FOLDERS = ("masks", "mask")
SUFFIX = "-masklabel"


@dataclass(frozen=True)
class OwnMasks:
    """Masks in a listing.

    Attributes:
        by_stem: the mask of each picture, by the picture's stem.
        files: names of all mask files.
        lonely: names of masks without a picture.
    """

    by_stem: dict[str, File]
    files: set[str]
    lonely: list[str]


def own_masks(listing: Listing) -> OwnMasks:
    """Find masks by their names: a suffix beside the picture, or a folder of masks.

    `a/name-masklabel.png` is the mask of the picture `a/name`, and `a/masks/b/name.png` that of `a/b/name`.
    """
    owners = Owners(stem_of(name) for name in listing.files if is_picture(name))
    by_stem: dict[str, File] = {}
    files: set[str] = set()
    folders: dict[str, list[tuple[str, str]]] = {}
    lonely = []
    for name in listing.files:
        if not is_picture(name):
            continue
        stem = stem_of(name)
        if stem.lower().endswith(SUFFIX):
            files.add(name)
            of = owners.of(mask_owner(name))
            by_stem.update(dict.fromkeys(of, listing.files[name]))
            if not of:
                lonely.append(name)
            continue
        parts = stem.split("/")
        for depth, part in enumerate(parts[:-1]):
            if part.lower() in _FOLDERS:
                owner = "/".join(parts[:depth] + parts[depth + 1 :])
                folders.setdefault("/".join(parts[: depth + 1]), []).append((name, owner))
                break
    for members in folders.values():
        # If none of its files matches a picture, it is a folder of pictures that happens to be called so.
        if not any(owners.of(owner) for _, owner in members):
            continue
        for name, owner in members:
            files.add(name)
            of = owners.of(owner)
            for stem in of:
                by_stem.setdefault(stem, listing.files[name])
            if not of:
                lonely.append(name)
    return OwnMasks(by_stem, files, lonely)


def mask_owner(name: str) -> str:
    """Return the stem of the picture that a file in a folder of masks belongs to."""
    stem = stem_of(name)
    return stem[: -len(SUFFIX)] if stem.lower().endswith(SUFFIX) else stem


def check_masks(dataset: Dataset, prior_weight: float) -> None:
    """Raise DatasetError if training preserves the base's prediction outside masks, but no picture has a mask."""
    if prior_weight and all(example.mask is None for example in dataset.examples):
        raise DatasetError(
            "masked_prior_weight is set, but no picture of the dataset has a mask: it would have no effect.",
            "Add masks to the dataset, or leave masked_prior_weight in Graft Objective Options unset.",
            "dataset",
        )
