"""Pairs of pictures: each picture of the dataset with a worse one for the same caption."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import DatasetError
from .source_images import is_alike, matching

if TYPE_CHECKING:
    from .examples import Example, LeftOut
    from .listing import File, Listing
    from .picture_columns import PictureColumns

WORSE_FOLDER = "worse_folder"


class WorsePictures:
    """Worse pictures in a folder, each named like its better picture, or named by a metadata table.

    Args:
        folder: absolute path; empty to take those that a table names, if any.
        listing: of the dataset's folder, which may contain the folder.
    """

    def __init__(self, folder: str, listing: Listing, columns: PictureColumns):
        self._folder = matching(folder, WORSE_FOLDER, "worse", "worse", listing, columns)

    def outside(self, listing: Listing) -> Listing:
        """Return the listing of the dataset's folder without the worse pictures in it."""
        return self._folder.outside(listing) if self._folder else listing

    def of(self, name: str, size: tuple[int, int], measure: Callable[[File], dict]) -> Example | None:
        """Return the worse picture of a picture, by its relative name; None if the dataset has no pairs.

        Args:
            size: (width, height) of the better picture.
            measure: returns the size and digest of a file.

        Raises:
            DatasetError: there is none, it has another shape, or it cannot be read.
        """
        if self._folder is None:
            return None
        worse = self._folder.of(name, measure)
        if worse is None:
            raise DatasetError(self._folder.lacking, "Add one, or remove the picture.", WORSE_FOLDER)
        check_pair(worse, size, WORSE_FOLDER)
        return worse

    def lonely(self) -> list[LeftOut]:
        """Return the worse pictures without a better one, and the files that are not pictures."""
        return self._folder.lonely() if self._folder else []


def check_pair(worse: Example, size: tuple[int, int], input: str) -> None:
    """Raise DatasetError if a worse picture has another shape than the better one, so that no crop fits both."""
    if not is_alike(worse.size, size):
        width, height = worse.size
        raise DatasetError(
            f"its worse picture {worse.source.name} has another shape, {width}x{height}, not {size[0]}x{size[1]}",
            "Crop both to the same shape.",
            input,
        )
