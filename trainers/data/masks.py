"""Mask files in a folder, and the pictures that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError
from .examples import LeftOut, reason_of
from .listing import File, Listing, Owners, list_folder, stem_of
from .pictures import AlphaSource, FileSource, MaskSource, are_facts, is_clear, is_picture, measure_facts, why_unread

if TYPE_CHECKING:
    from .examples import Dataset, Source
    from .index import Index
    from .scan import ScanOptions

MASK_FOLDERS = ("masks", "mask")
SUFFIX = "-masklabel"
_MOVING = "a mask that is a clip; save one of its frames as PNG, which then masks all frames"


@dataclass(frozen=True)
class OwnMasks:
    """Masks in a listing.

    Attributes:
        by_stem: the mask of each picture, by the picture's stem.
        lonely: names of masks without a picture.
        moving: names of masks that are clips.
    """

    by_stem: dict[str, File]
    files: set[str]
    lonely: list[str]
    moving: list[str]


def own_masks(listing: Listing, takes: Callable[[str], bool] = is_picture) -> OwnMasks:
    """Find masks by their names: a suffix beside the picture, or a folder of masks.

    `a/name-masklabel.png` is the mask of the picture `a/name`, and `a/masks/b/name.png` that of `a/b/name`.

    Args:
        takes: reports whether a file of a name can be trained on.
    """
    owners = Owners(stem_of(name) for name in listing.files if takes(name))
    by_stem: dict[str, File] = {}
    files: set[str] = set()
    folders: dict[str, list[tuple[str, str]]] = {}
    lonely, moving = [], []
    for name in listing.files:
        if not (is_picture(name) or takes(name)):
            continue
        stem = stem_of(name)
        if stem.lower().endswith(SUFFIX):
            files.add(name)
            if not is_picture(name):
                moving.append(name)
                continue
            of = owners.of(mask_owner(name))
            by_stem.update(dict.fromkeys(of, listing.files[name]))
            if not of:
                lonely.append(name)
            continue
        parts = stem.split("/")
        for depth, part in enumerate(parts[:-1]):
            if part.lower() in MASK_FOLDERS:
                owner = "/".join(parts[:depth] + parts[depth + 1 :])
                folders.setdefault("/".join(parts[: depth + 1]), []).append((name, owner))
                break
    for members in folders.values():
        # If none of its files matches a picture, it is a folder of pictures that happens to be called so.
        if not any(owners.of(owner) for _, owner in members):
            continue
        for name, owner in members:
            files.add(name)
            if not is_picture(name):
                moving.append(name)
                continue
            of = owners.of(owner)
            for stem in of:
                by_stem.setdefault(stem, listing.files[name])
            if not of:
                lonely.append(name)
    return OwnMasks(by_stem, files, lonely, moving)


def mask_owner(name: str) -> str:
    """Return the stem of the picture that a file in a folder of masks belongs to."""
    stem = stem_of(name)
    return stem[: -len(SUFFIX)] if stem.lower().endswith(SUFFIX) else stem


class Masks:
    """Masks of a folder's pictures, from the folder itself or from a folder of masks.

    Attributes:
        pictures: the folder's pictures that are no masks.
        by_stem: mask files by the stems of their pictures.
        without_picture: masks in the folder that belong to no picture.
        left_out: files in the folder of masks that are not used.
    """

    def __init__(self, listing: Listing, options: ScanOptions):
        own = own_masks(listing, options.takes)
        self.pictures = [file for name, file in listing.files.items() if options.takes(name) and name not in own.files]
        self.without_picture = [LeftOut(name, "a mask without its picture") for name in own.lonely]
        self.without_picture += [LeftOut(name, _MOVING) for name in own.moving]
        self.left_out: list[LeftOut] = []
        self._takes = options.takes
        self._use_alpha = options.masks == "alpha"
        self.by_stem = {} if options.masks == "off" else own.by_stem
        self._root = listing.root
        if options.masks != "off" and options.mask_folder:
            folder = list_folder(options.mask_folder)
            self._root = folder.root
            self.by_stem = self._match(folder, listing)

    def _match(self, folder: Listing, listing: Listing) -> dict[str, File]:
        owners = Owners(stem_of(name) for name in listing.files if self._takes(name))
        by_stem: dict[str, File] = {}
        self.left_out += folder.left_out
        for name, file in folder.files.items():
            stems = owners.of(mask_owner(name)) if is_picture(name) else ()
            by_stem.update(dict.fromkeys(stems, file))
            if is_picture(name):
                reason = "a mask without its picture"
            else:
                reason = _MOVING if self._takes(name) else why_unread(name)
            if not stems and reason:
                self.left_out.append(LeftOut(name, reason))
        return by_stem

    def of(self, source: Source, has_alpha: bool, index: Index) -> Source | None:
        """Return the mask of a picture. Raise DatasetError if it cannot be read."""
        file = self.by_stem.get(stem_of(source.name))
        if file is not None:
            try:
                return _mask_source(file, self._root, index)
            except DatasetError as error:
                reason = f"its mask {file.name} {reason_of(error, file.name)}"
                raise DatasetError(reason, "Save the mask again, or remove it.") from error
        return AlphaSource(source) if self._use_alpha and has_alpha else None


def _mask_source(file: File, root: str, index: Index) -> MaskSource:

    def measure() -> dict:
        facts = measure_facts(file)
        # The file's head says only that a mask may be transparent. Check the pixels, since most masks are opaque.
        clear = facts["alpha"] and is_clear(FileSource(file.path, file.name, root, facts["digest"]))
        return {**facts, "clear": clear}

    facts = index.get_or_make(file.path, file.stat, measure, _are_mask_facts)
    return MaskSource(FileSource(file.path, file.name, root, facts["digest"]), facts.get("clear", False))


def _are_mask_facts(facts: dict) -> bool:
    """Return True if facts are those of a mask; earlier versions did not store `clear`."""
    return are_facts(facts) and (not facts["alpha"] or isinstance(facts.get("clear"), bool))


def check_masks(dataset: Dataset, prior_weight: float) -> None:
    """Raise DatasetError if training preserves the base's prediction outside masks, but no picture has a mask."""
    if prior_weight and all(example.mask is None for example in dataset.examples):
        raise DatasetError(
            "masked_prior_weight is set, but no picture of the dataset has a mask: it would have no effect.",
            "Add masks to the dataset, or leave masked_prior_weight in Graft Objective Options unset.",
            "dataset",
        )
