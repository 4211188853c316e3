"""Further pictures of a picture: source pictures, which an editing model gets, and the worse picture of a pair.

They lie in folders, or columns of metadata tables name them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .examples import Example, LeftOut
from .listing import File, Listing, Owners, fold, list_folder, path_inside, stem_of, without_folder
from .pictures import FileSource, is_picture, why_unread

if TYPE_CHECKING:
    from .examples import Source

# Two pictures have the same shape, so that positions match, if their aspect ratios differ by at most this fraction.
_ALIKE = 0.02

# The inputs that name the folders of a picture's first, second and third source picture, and of its worse one.
CONTROL_FOLDERS = ("control_folder", "control_folder_2", "control_folder_3")
WORSE_FOLDER = "worse_folder"
# Columns by the input that names a folder in their place. In Hugging Face's layout, columns of files end like this.
_BY_INPUT = {name: name.replace("folder", "file_name") for name in (*CONTROL_FOLDERS, WORSE_FOLDER)}
COLUMNS = frozenset(_BY_INPUT.values())


class SourceFolders:
    """First, second and third source pictures of a dataset, in folders or named by a metadata table.

    Args:
        folders: absolute paths in the order of CONTROL_FOLDERS; empty to take those that a table names.
        listing: of the dataset's folder, which may contain them.
        are_optional: train on pictures without any source picture too.

    Raises:
        DatasetError: a folder is the dataset's own, or there are later source pictures without earlier ones.
    """

    def __init__(self, folders: Sequence[str], listing: Listing, columns: PictureColumns, are_optional: bool = False):
        roles = ("source", "source 2", "source 3")
        rows = zip_longest(folders, CONTROL_FOLDERS, roles, fillvalue="")
        matches = [matching(folder, input, role, "source", listing, columns) for folder, input, role in rows]
        self._folders = [folder for folder in matches if folder]
        if None in matches[: len(self._folders)]:
            gap = matches.index(None)
            later = next(name for name, folder in zip(CONTROL_FOLDERS[gap:], matches[gap:], strict=False) if folder)
            raise DatasetError(
                f"{CONTROL_FOLDERS[gap]} is empty, but {later} is set.",
                f"Set {CONTROL_FOLDERS[gap]} first.",
                CONTROL_FOLDERS[gap],
            )
        self._are_optional = are_optional

    def outside(self, listing: Listing) -> Listing:
        """Return the listing of the dataset's folder without the source pictures in it."""
        for folder in self._folders:
            listing = folder.outside(listing)
        return listing

    def of(self, name: str, measure: Callable[[File], dict]) -> tuple[Example, ...]:
        """Return the source pictures of a picture, by its relative name.

        Args:
            measure: returns the size and digest of a file.

        Raises:
            DatasetError: the picture needs a source picture and has none, has a later one without an earlier one, or
                one of them cannot be read.
        """
        by_folder = [folder.of(name, measure) for folder in self._folders]
        sources = tuple(source for source in by_folder if source is not None)
        if None in by_folder[: len(sources)]:
            raise DatasetError(
                f"it has no source picture in {CONTROL_FOLDERS[by_folder.index(None)]}, but one in a later folder",
                "Add one, or rename the other.",
                "folder",
            )
        if by_folder and not sources and not self._are_optional:
            raise DatasetError(self._folders[0].lacking, "Add one, or remove the picture.", "folder")
        return sources

    def lonely(self) -> list[LeftOut]:
        """Return the source pictures without a picture, and the files that are not source pictures."""
        return [row for folder in self._folders for row in folder.lonely()]


# Reasons for not using a picture that matches no picture of the dataset.
_LONELY = {
    "source": "a source picture without the picture it becomes",
    "worse": "a worse picture without the better one",
}


def matching(
    folder: str, input: str, role: str, kind: str, listing: Listing, columns: PictureColumns
) -> MatchingFolder | PictureColumn | None:
    """Return the further pictures of an input's folder, or else of the column of its name; None for neither."""
    if folder:
        return MatchingFolder(folder, input, role, kind, listing)
    return columns.of(input, role, kind)


class MatchingFolder:
    """Pictures in a folder, each named like its picture of the dataset.

    Args:
        folder: absolute path.
        role: stands behind the names of its pictures in reports.
        kind: "source" or "worse".
        listing: of the dataset's folder, which may contain this folder.

    Attributes:
        inside: prefix of its files' names in the listing; empty if it lies elsewhere.
        lacking: reason for not using a picture without a match.
    """

    def __init__(self, folder: str, input: str, role: str, kind: str, listing: Listing):
        self.lacking = f"it has no {kind} picture of its name"
        self._input, self._role, self._kind = input, role, kind
        self._by_stem: dict[str, File] = {}
        self._folded: dict[str, File] = {}
        self._used: set[str] = set()
        self._left_out: list[LeftOut] = []
        files = list_folder(folder)
        self._root = files.root
        self.inside = path_inside(listing, files.root)
        if self.inside == "./":
            raise DatasetError(
                f"The folder of {kind} pictures is the dataset's own folder.",
                f"Put the {kind} pictures into another folder, each under the name of its picture.",
                self._input,
            )
        for name, file in files.files.items():
            if is_picture(name):
                self._by_stem.setdefault(stem_of(name), file)
                self._folded.setdefault(fold(stem_of(name)), file)
        unread = (LeftOut(name, reason) for name in files.files if (reason := why_unread(name)))
        self._left_out += [*files.left_out, *unread]
        self._stems = {stem_of(name) for name in self.outside(listing).files if is_picture(name)}

    def outside(self, listing: Listing) -> Listing:
        """Return the listing of the dataset's folder without this folder."""
        return without_folder(listing, self.inside) if self.inside else listing

    def of(self, name: str, measure: Callable[[File], dict]) -> Example | None:
        """Return the picture that matches a picture of the dataset, by its relative name; None for none.

        Args:
            measure: returns the size and digest of a file.

        Raises:
            DatasetError: it cannot be read.
        """
        file = self.find(name)
        if file is None:
            return None
        self._used.add(file.name)
        return read_match(file, self._root, self._role, self._kind, self._input, measure)

    def find(self, name: str) -> File | None:
        """Return the file that matches a picture of the dataset, by its relative name; None for none."""
        stem = stem_of(name)
        # Match the bare name too, in any folder, as other trainers do.
        return self._by_stem.get(stem) or self._by_stem.get(posixpath.basename(stem)) or self._by_folded_name(stem)

    def _by_folded_name(self, stem: str) -> File | None:
        """Return the file whose name differs only in case or Unicode form, unless it is another picture's own."""
        for wanted in (stem, posixpath.basename(stem)):
            file = self._folded.get(fold(wanted))
            if file is not None and stem_of(file.name) not in self._stems:
                return file
        return None

    def lonely(self) -> list[LeftOut]:
        """Return the pictures that match none of the dataset, and the files that are not pictures."""
        names = sorted(file.name for file in self._by_stem.values() if file.name not in self._used)
        return self._left_out + [LeftOut(name, _LONELY[self._kind]) for name in names]


def read_match(file: File, root: str, role: str, kind: str, input: str, measure: Callable[[File], dict]) -> Example:
    """Return a file as a source picture, or a worse one. Raise DatasetError if it cannot be read."""
    try:
        facts = measure(file)
    except DatasetError as error:
        reason = f"its {kind} picture {file.name}: {error.message}"
        raise DatasetError(reason, "Save it again.", input) from error
    return source_image_of(FileSource(file.path, f"{file.name} ({role})", root, facts["digest"]), tuple(facts["size"]))


def source_image_of(source: Source, size: tuple[int, int]) -> Example:
    """Return a source picture, or a worse one, as an example with an empty caption."""
    return Example(source, ("",), size, source.digest)


def is_alike(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Return True if pictures of two sizes (width, height) have the same shape."""
    return abs(first[0] / first[1] - second[0] / second[1]) <= _ALIKE * first[0] / first[1]


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


class PictureColumns:
    """Columns of the metadata tables in a folder that name further pictures."""

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

    inside = "./"  # as of `MatchingFolder`: its files are in the dataset's folder

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
        role, kind, column = self._names
        file = self.find(name)
        if file is None:
            table, named = self._rows[name]
            raise DatasetError(
                f"its {column} in {table}, '{named}', is no picture of the folder", "Correct it.", "folder"
            )
        return read_match(file, self._listing.root, role, kind, "folder", measure)

    def find(self, name: str) -> File | None:
        """Return the file that a picture's row names; None for none."""
        pictures = self._owners.of(self._rows[name][1]) if name in self._rows else ()
        return self._listing.files[pictures[0]] if pictures else None

    def lonely(self) -> list[LeftOut]:
        """Return nothing: the column names no picture without another."""
        return []


def _beside(table: File, name: str) -> str:
    """Return a file's name in the folder by its name in a row. Look it up only among listed files."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(table.name), name.replace("\\", "/")))
