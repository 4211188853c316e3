"""Captions edited in a page, written beside their pictures."""

import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..data import captions
from ..data.caption_files import CaptionFiles
from ..data.clips import is_media
from ..data.index import Index
from ..data.listing import Listing, list_folder, stem_of
from ..data.masks import own_masks
from ..data.scan import class_tokens_of
from ..errors import DatasetError, GraftError
from ..formats.atomic import replacing, write_bytes
from .folder import EDITING, find_picture, path_to_write

BACKUP = ".bak"


@dataclass(frozen=True)
class Caption:
    """Caption of a picture as its folder holds it.

    Attributes:
        text: as it stands in its file; several captions of other origins have a line each.
        origin: "file" for a text beside the picture, "table" for JSON and metadata files, "none".
        file: name of the text file that an edit writes.
    """

    text: str
    origin: str
    file: str


@dataclass(frozen=True)
class CaptionEdit:
    """Edit of a caption.

    Attributes:
        was: the text that the page showed before the edit.
    """

    name: str
    text: str
    was: str


@dataclass(frozen=True)
class EditResult:
    """Result of an edit.

    Attributes:
        status: "saved"; "conflict" if another page or program has changed the caption; "failed".
        text: the caption that the folder now holds.
    """

    name: str
    status: str
    text: str = ""
    file: str = ""
    error: str = ""


class CaptionReader:
    """Reader of the captions in a listing, as texts to edit; an index keeps the texts."""

    def __init__(self, listing: Listing, index: Index | None = None):
        self._listing = listing
        self._files = CaptionFiles(listing, False, index, is_media)
        masks = own_masks(listing, is_media).files
        self._stems = Counter(stem_of(name) for name in listing.files if is_media(name) and name not in masks)

    def read(self, name: str) -> Caption:
        """Return a picture's caption. Raise DatasetError if its file cannot be read."""
        file = self._files.file_of(name)
        is_text = file is not None and not file.name.lower().endswith(".json")
        text = self._files.read_text(file).rstrip("\r\n") if is_text else ""
        if text.strip():
            return Caption(text, "file", file.name)
        # Training, too, takes a table's caption if the file has none.
        texts = self._files.of(name)
        # A file with the stem would be the caption of all pictures with that stem.
        own = name if file is None and self._stems[stem_of(name)] > 1 else stem_of(name)
        return Caption("\n".join(texts), "table" if texts else "none", file.name if is_text else f"{own}.txt")

    def without(self, name: str, file: str) -> str:
        """Return the caption that training takes for a picture if a caption file of it is empty; empty for none."""
        return "\n".join(self._files.of(name, without=file)) or class_tokens_of(self._listing, name)


def edit_captions(folder: str, edits: Sequence[CaptionEdit], lines_are_variants: bool = False) -> list[EditResult]:
    """Write captions beside their pictures, each atomically, and keep the first text that an edit replaces as .bak.

    Args:
        folder: absolute path.
    """
    with EDITING:
        listing = list_folder(folder)
        reader = CaptionReader(listing)
        return [_edit(listing, reader, edit, lines_are_variants) for edit in edits]


def _edit(listing: Listing, reader: CaptionReader, edit: CaptionEdit, lines_are_variants: bool) -> EditResult:
    try:
        find_picture(listing, edit.name)
        current = reader.read(edit.name)
        text = edit.text.rstrip("\r\n")
        # Without a text of the picture's own, nothing can be lost.
        if current.origin != "none" and current.text not in (edit.was, text):
            return EditResult(edit.name, "conflict", current.text, current.file)
        if current.text != text or current.origin != "file":
            # Raises for a text that training would refuse.
            if not captions.variants_of(text, lines_are_variants):
                _refuse_empty(reader.without(edit.name, current.file))
            write_caption(path_to_write(listing.root, current.file), text)
        return EditResult(edit.name, "saved", text, current.file)
    except GraftError as error:
        return EditResult(edit.name, "failed", edit.was, error=str(error))


def _refuse_empty(other: str) -> None:
    """Raise DatasetError if training takes another caption in place of an empty one."""
    if other:
        raise DatasetError(
            f"Without a text of its own, training takes the caption '{other[:80]}' for it, from another caption file, "
            "a table or the folder's name.",
            "Write a text, or change it there.",
            "text",
        )


def write_caption(path: str, text: str) -> bool:
    """Write a caption file, and keep the text that it replaces unless an earlier one is kept. Return if it changed."""
    backup = path + BACKUP
    with EDITING:
        if os.path.exists(path) and not os.path.lexists(backup):
            with replacing(backup) as temporary:
                shutil.copyfile(path, temporary)
        return write_bytes(path, text.encode())
