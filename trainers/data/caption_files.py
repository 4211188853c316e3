"""Caption files and metadata tables in a folder, and the pictures that they belong to."""

import posixpath
from collections.abc import Callable, Collection

from ..errors import DatasetError
from ..text import join_first
from . import captions
from .examples import LeftOut, reason_of
from .index import Index
from .listing import File, Listing, Owners, stem_of
from .pictures import is_picture
from .source_images import COLUMNS

# Bytes of a caption file whose text the index keeps; longer ones are rare, and would make the index large.
_MOST_KEPT = 4096


class CaptionFiles:
    """Captions of a folder's pictures, from caption files beside them and from metadata tables.

    Args:
        index: keeps the texts; None to read them each time.
        others: names of the folder's further pictures, which tables may name too.
        takes: reports whether a file of a name can be trained on.

    Attributes:
        left_out: caption files without a picture, and tables that cannot be used.
    """

    def __init__(
        self,
        listing: Listing,
        lines_are_variants: bool,
        index: Index | None = None,
        others: Collection[str] = (),
        takes: Callable[[str], bool] = is_picture,
    ):
        self._listing = listing
        self._others = others
        self._takes = takes
        self._index = index
        self._lines_are_variants = lines_are_variants
        self.left_out: list[LeftOut] = []
        self._sidecars = self._find_sidecars()
        self._metadata = self._read_tables()

    def of(self, name: str, without: str = "") -> tuple[str, ...]:
        """Return the captions of a picture: those of its first caption file with any, else of a table; may be empty.

        Args:
            without: name of a caption file to leave out.
        """
        read = (self._read(file) for file in self.files_of(name) if file.name != without)
        return next((texts for texts in read if texts), self._metadata.get(name, ()))

    def file_of(self, name: str) -> File | None:
        """Return a picture's first caption file with any caption, or else its first one; None if it has no file."""
        files = self.files_of(name)
        if len(files) < 2:
            return files[0] if files else None
        return next((file for file in files if self._read(file)), files[0])

    def files_of(self, name: str) -> list[File]:
        """Return all caption files of a picture, in the order to try them."""
        return self._sidecars.get(name, [])

    def read_text(self, file: File) -> str:
        """Return a caption file's text. Raise DatasetError if it cannot be read."""
        if self._index is None or file.stat.st_size > _MOST_KEPT:
            return captions.read_text(file.path, file.name)
        make = lambda: {"text": captions.read_text(file.path, file.name)}  # noqa: E731
        return self._index.get_or_make(file.path, file.stat, make, _is_text)["text"]

    def _read(self, file: File) -> tuple[str, ...]:
        return captions.parse_sidecar(self.read_text(file), file.name, self._lines_are_variants)

    def _find_sidecars(self) -> dict[str, list[File]]:
        """Return the caption files of each picture, by its name, in the order to try them.

        A file belongs to the picture with the file's stem; else to the picture whose whole name is the file's stem, as
        in `a.png.txt`; else to pictures whose names differ only in case or Unicode form. Caption files without a
        picture go to `left_out`.
        """
        # Include unread formats, so that their captions are not reported as captions without a picture.
        owners = _SidecarOwners([name for name in self._listing.files if not captions.is_caption_file(name)])
        ranked: dict[str, list[tuple[tuple[int, int], File]]] = {}
        for name, file in self._listing.files.items():
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() not in captions.SUFFIXES:
                continue
            distance, pictures = owners.of(stem)
            for picture in pictures:
                ranked.setdefault(picture, []).append(((distance, captions.SUFFIXES.index(suffix.lower())), file))
            if not pictures:
                self.left_out.append(LeftOut(name, "a caption without its picture"))
        return {name: [file for _, file in sorted(rows, key=lambda row: row[0])] for name, rows in ranked.items()}

    def _read_tables(self) -> dict[str, tuple[str, ...]]:
        texts: dict[str, tuple[str, ...]] = {}
        owners = Owners(name for name in self._listing.files if self._takes(name))
        for name, file in self._listing.files.items():
            if posixpath.basename(name).lower() in captions.METADATA:
                self._read_table(file, owners, texts)
        return texts

    def _read_table(self, file: File, owners: Owners, texts: dict[str, tuple[str, ...]]) -> None:
        name = file.name
        missing = []
        has_use = False
        try:
            for picture, row in captions.metadata_rows(file.path, name):
                variants = captions.from_json(row, self._lines_are_variants)
                # Look up only among listed files, so that no row leads out of the folder.
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), picture.replace("\\", "/")))
                pictures = owners.of(target)
                if not pictures and target not in self._others:
                    missing.append(picture)
                for owner in pictures if variants else ():
                    texts.setdefault(owner, variants)
                has_use = has_use or bool(variants) or not COLUMNS.isdisjoint(row)
            if not has_use:
                self.left_out.append(LeftOut(name, f"no row has a caption under {captions.FIELDS_IN_WORDS}"))
        except DatasetError as error:
            self.left_out.append(LeftOut(name, reason_of(error, name)))
        if missing:
            reason = f"it names {len(missing)} missing pictures: {join_first(missing, 3)}"
            self.left_out.append(LeftOut(name, reason))


def _is_text(facts: dict) -> bool:
    return isinstance(facts.get("text"), str)


class _SidecarOwners:
    """Pictures that a caption file belongs to, by the file's stem."""

    def __init__(self, names: list[str]):
        self._by_stem: dict[str, list[str]] = {}
        for name in names:
            self._by_stem.setdefault(stem_of(name), []).append(name)
        self._stems, self._names = Owners(self._by_stem), Owners(names)

    def of(self, stem: str) -> tuple[int, list[str]]:
        """Return the distance of a caption file's name to its pictures' names (0 is nearest), and these names."""
        if stem in self._by_stem:
            return 0, self._by_stem[stem]
        same_name = self._names.of(stem)
        kinds = (
            (),
            same_name if (stem,) == same_name else (),
            [name for owner in self._stems.of(stem) for name in self._by_stem[owner]],
            same_name,
        )
        return next(((distance, list(pictures)) for distance, pictures in enumerate(kinds) if pictures), (0, []))
