"""Source pictures: input, beside the noise, of a model that edits them into the training pictures."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DatasetError
from .examples import Example, LeftOut
from .listing import File, Listing, fold, list_folder, path_inside, stem_of, without_folder
from .pictures import FileSource, is_picture, why_unread

if TYPE_CHECKING:
    from .examples import Source

# Two pictures have the same shape, so that positions match, if their aspect ratios differ by at most this fraction.
_ALIKE = 0.02


class SourceImages:
    """Source pictures in a folder, each named like the picture that it becomes.

    Args:
        folder: absolute path; empty for no source pictures.
        listing: of the dataset's folder, which may contain the folder of source pictures.
    """

    def __init__(self, folder: str, listing: Listing):
        self.wanted = bool(folder)
        self._by_stem: dict[str, File] = {}
        self._folded: dict[str, File] = {}
        self._used: set[str] = set()
        self._left_out: list[LeftOut] = []
        self._root = listing.root
        self._inside = ""
        if not folder:
            return
        files = list_folder(folder)
        self._root = files.root
        self._inside = path_inside(listing, files.root)
        if self._inside == "./":
            raise DatasetError(
                "The folder of source pictures is the dataset's own folder.",
                "Put the source pictures into another folder, each under the name of the picture it becomes.",
                "control_folder",
            )
        for name, file in files.files.items():
            if is_picture(name):
                self._by_stem.setdefault(stem_of(name), file)
                self._folded.setdefault(fold(stem_of(name)), file)
        unread = (LeftOut(name, reason) for name in files.files if (reason := why_unread(name)))
        self._left_out += [*files.left_out, *unread]
        self._stems = {stem_of(name) for name in self.outside(listing).files if is_picture(name)}

    def outside(self, listing: Listing) -> Listing:
        """Return the listing of the dataset's folder without the source pictures in it."""
        return without_folder(listing, self._inside) if self._inside else listing

    def of(self, name: str, measure: Callable[[File], dict]) -> Example | None:
        """Return the source picture of a picture, by its relative name; None if no folder of them was chosen.

        Args:
            measure: returns the size and digest of a file.

        Raises:
            DatasetError: the picture has no source picture, or its source picture cannot be read.
        """
        if not self.wanted:
            return None
        stem = stem_of(name)
        # Match the bare name too, in any folder, as other trainers do.
        file = self._by_stem.get(stem) or self._by_stem.get(posixpath.basename(stem)) or self._by_folded_name(stem)
        if file is None:
            raise DatasetError("it has no source picture of its name", "Add one, or remove the picture.", "folder")
        self._used.add(file.name)
        try:
            facts = measure(file)
        except DatasetError as error:
            reason = f"its source picture {file.name}: {error.message}"
            raise DatasetError(reason, "Save it again.", "control_folder") from error
        source = FileSource(file.path, f"{file.name} (source)", self._root, facts["digest"])
        return source_image_of(source, tuple(facts["size"]))

    def _by_folded_name(self, stem: str) -> File | None:
        """Return the source picture whose name differs only in case or Unicode form, unless it is another's own."""
        for wanted in (stem, posixpath.basename(stem)):
            file = self._folded.get(fold(wanted))
            if file is not None and stem_of(file.name) not in self._stems:
                return file
        return None

    def lonely(self) -> list[LeftOut]:
        """Return the source pictures without a picture, and the files that are not source pictures."""
        names = sorted(file.name for file in self._by_stem.values() if file.name not in self._used)
        return self._left_out + [LeftOut(name, "a source picture without the picture it becomes") for name in names]


def source_image_of(source: Source, size: tuple[int, int]) -> Example:
    """Return a source picture as an example with an empty caption."""
    return Example(source, ("",), size, source.digest)


def is_alike(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Return True if pictures of two sizes (width, height) have the same shape."""
    return abs(first[0] / first[1] - second[0] / second[1]) <= _ALIKE * first[0] / first[1]
