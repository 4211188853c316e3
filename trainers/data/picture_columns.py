"""Columns of metadata tables that name a picture's source pictures, and the worse picture of a pair."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .listing import File, Listing, Owners
from .pictures import is_picture
from .source_images import CONTROL_FOLDERS, WORSE_FOLDER, read_match

if TYPE_CHECKING:
    from .examples import Example, LeftOut

# By the input that names a folder in their place. In Hugging Face's layout, columns of files end like this.
_BY_INPUT = {name: name.replace("folder", "file_name") for name in (*CONTROL_FOLDERS, WORSE_FOLDER)}
COLUMNS = frozenset(_BY_INPUT.values())


class PictureColumns:
    """Those columns of the metadata tables in a folder."""

    def __init__(self, listing: Listing):
        # By column and picture: the table, and the name of the file that its row names.
        self._rows: dict[str, dict[str, tuple[str, str]]] = {}
        self._listing = listing
        self._owners = Owners(name for name in listing.files if is_picture(name))
        for name, file in listing.files.items():
            if posixpath.basename(name).lower() in captions.METADATA:
                # The captions' reader reports what it cannot read.
                with suppress(DatasetError):
                    self._read(file)

    def _read(self, table: File) -> None:
        if "_file_name" not in captions.read_text(table.path, table.name).lower():
            return
        for picture, row in captions.metadata_rows(table.path, table.name):
            for column in COLUMNS & row.keys():
                value = row[column]
                if isinstance(value, str) and value.strip():
                    for owner in self._owners.of(_beside(table, picture)):
                        named = table.name, _beside(table, value.strip())
                        self._rows.setdefault(column, {}).setdefault(owner, named)

    def of(self, input: str, role: str, kind: str) -> PictureColumn | None:
        """Return the column with the pictures of an input's folder; None if no row has it.

        Args:
            input, role, kind: as in `MatchingFolder`.
        """
        column = _BY_INPUT[input]
        rows = self._rows.get(column)
        return PictureColumn(column, role, kind, rows, self._owners, self._listing) if rows else None


class PictureColumn:
    """Pictures that one column names.

    Args:
        role, kind: as in `MatchingFolder`.
        rows: by picture, the table and the name of the file in its row.
        owners: all pictures of the folder.

    Attributes:
        lacking: reason for not using a picture whose row names none.
    """

    def __init__(
        self, column: str, role: str, kind: str, rows: dict[str, tuple[str, str]], owners: Owners, listing: Listing
    ):
        self.lacking = f"its row has no {column}"
        self._names = role, kind, column
        self._rows, self._owners, self._listing = rows, owners, listing

    def outside(self, listing: Listing) -> Listing:
        """Return a listing without the pictures that the column names, except those that have such a row too."""
        named = {name for _, file in self._rows.values() for name in self._owners.of(file)} - self._rows.keys()
        return replace(listing, files={name: file for name, file in listing.files.items() if name not in named})

    def of(self, name: str, measure: Callable[[File], dict]) -> Example | None:
        """Return the picture that a picture's row names; None for none.

        Args:
            measure: returns the size and digest of a file.

        Raises:
            DatasetError: the folder has no such picture, or it cannot be read.
        """
        if name not in self._rows:
            return None
        table, file = self._rows[name]
        role, kind, column = self._names
        pictures = self._owners.of(file)
        if not pictures:
            raise DatasetError(
                f"its {column} in {table}, '{file}', is no picture of the folder", "Correct it.", "folder"
            )
        return read_match(self._listing.files[pictures[0]], self._listing.root, role, kind, "folder", measure)

    def lonely(self) -> list[LeftOut]:
        """Return nothing: the column names no picture without another."""
        return []


def _beside(table: File, name: str) -> str:
    """Return a file's name in the folder by its name in a row. Look it up only among listed files."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(table.name), name.replace("\\", "/")))
