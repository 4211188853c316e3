"""Checks of files that were just added to a dataset's folder."""

import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..data.caption_files import CaptionFiles
from ..data.captions import is_caption_file
from ..data.clips import VideoSource, is_clip
from ..data.examples import LeftOut, reason_of
from ..data.listing import File, Listing, list_folder, stem_of
from ..data.masks import own_masks
from ..data.pictures import is_picture, measure_file, why_unread
from ..errors import DatasetError
from ..formats.atomic import file_hash
from .folder import EDITING
from .picture_edits import move_to_trash


@dataclass(frozen=True)
class Added:
    """Result of adding files.

    Attributes:
        kept: names of the files that stay.
        duplicates: (name, name of the same picture) of files that were moved to the trash.
        unreadable: files that stay and cannot be used, with reasons.
    """

    kept: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]
    unreadable: tuple[LeftOut, ...]


def check_added(folder: str, names: Sequence[str]) -> Added:
    """Move those of the new pictures to the trash whose content the folder holds, and name the unreadable files.

    A picture with a caption or a mask of its own stays.

    Args:
        folder: absolute path.
        names: names of the new files, relative to the folder. Names that it does not hold are ignored.
    """
    with EDITING:
        listing = list_folder(folder)
        new = {name: None for name in names if name in listing.files}
        originals = _originals(listing, new)
        captions = CaptionFiles(listing, lines_are_variants=False)
        masks = own_masks(listing).by_stem
        kept, duplicates, unreadable = [], [], []
        for name in new:
            file = listing.files[name]
            original = originals.get(name)
            if original is not None and not captions.files_of(name) and stem_of(name) not in masks:
                move_to_trash(listing.root, name)
                duplicates.append((name, original))
                continue
            kept.append(name)
            try:
                reason = "" if is_caption_file(name) or is_clip(name) else why_unread(name)
                if is_picture(name):
                    measure_file(file.path, name)
                elif is_clip(name):
                    VideoSource(file.path, name, listing.root).measure()
            except DatasetError as error:
                reason = reason_of(error, name)
            if reason:
                unreadable.append(LeftOut(name, reason))
        return Added(tuple(kept), tuple(duplicates), tuple(unreadable))


def _originals(listing: Listing, new: Collection[str]) -> dict[str, str]:
    """Return the picture with the same content for each new picture that has one in its own folder.

    Masks and source pictures may be equal; masks are not compared, and source pictures lie in another folder.
    """
    masks = own_masks(listing).files
    by_kind: dict[tuple[str, int], list[File]] = {}
    # Older files first: of two equal new files, the first one stays.
    names = [*(name for name in listing.files if name not in new), *new]
    originals: dict[str, str] = {}
    for name in names:
        if not is_picture(name) or name in masks:
            continue
        file = listing.files[name]
        alike = by_kind.setdefault((posixpath.dirname(name), file.stat.st_size), [])
        if name in new:
            digest = file_hash(file.path) if alike else ""
            original = next((other.name for other in alike if file_hash(other.path) == digest), None)
            if original is not None:
                originals[name] = original
                continue
        alike.append(file)
    return originals
