"""Listing of the files in a folder and below it; reads no file's content."""

import functools
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from ..text import is_below
from .examples import LeftOut
from .pictures import NAMES, is_picture


@dataclass(frozen=True)
class File:
    """Regular file in a listing.

    Attributes:
        name: relative to the listed folder, with forward slashes.
    """

    path: str
    name: str
    stat: os.stat_result


@dataclass(frozen=True)
class Listing:
    """Regular files in a folder and below it.

    Attributes:
        root: the folder, links resolved.
        files: by relative name with forward slashes, in a stable order.
        left_out: skipped files and folders, with reasons.
    """

    root: str
    files: dict[str, File]
    left_out: list[LeftOut]


@functools.lru_cache(maxsize=NAMES)
def stem_of(name: str) -> str:
    """Return a relative name without its suffix."""
    return posixpath.splitext(name)[0]


def fold(name: str) -> str:
    """Return a name with case and Unicode form folded; Windows and macOS treat equal results as the same file."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def path_inside(listing: Listing, root: str) -> str:
    """Return a folder's path relative to a listing's root: "./" for the root itself, empty for a folder outside.

    Args:
        root: the folder, links resolved.
    """
    if not is_below(root, listing.root):
        return ""
    return posixpath.relpath(root.replace("\\", "/"), listing.root.replace("\\", "/")) + "/"


def without_folder(listing: Listing, inside: str) -> Listing:
    """Return a listing without the files in one of its folders, and without the skipped files in it."""
    files = {name: file for name, file in listing.files.items() if not name.startswith(inside)}
    left_out = [row for row in listing.left_out if not row.name.startswith(inside)]
    return Listing(listing.root, files, left_out)


class Owners:
    """Pictures by stem, matched exactly, or else with case and Unicode form folded.

    A file whose stem is a picture's exact stem belongs to no other picture.
    """

    def __init__(self, stems: Iterable[str]):
        self._exact = set(stems)

    @functools.cached_property
    def _folded(self) -> dict[str, list[str]]:
        folded: dict[str, list[str]] = {}
        for stem in sorted(self._exact):
            folded.setdefault(fold(stem), []).append(stem)
        return folded

    def of(self, stem: str) -> tuple[str, ...]:
        """Return the stems of the pictures that a file with this stem belongs to."""
        return (stem,) if stem in self._exact else tuple(self._folded.get(fold(stem), ()))


def list_folder(folder: str) -> Listing:
    """List the files in a folder and below it.

    The listing follows no link that leads out of the folder and no link to a folder. It records skipped files in
    `left_out`, but skips names that begin with a dot silently.
    """
    root = os.path.realpath(folder)
    listing = Listing(root, {}, [])
    pending = [("", root)]
    while pending:
        prefix, directory = pending.pop()
        try:
            with os.scandir(directory) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            listing.left_out.append(LeftOut(prefix or ".", f"the folder cannot be read ({error})"))
            continue
        below = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            try:
                if entry.is_dir(follow_symlinks=False):
                    below.append((f"{name}/", entry.path))
                else:
                    _take(listing, entry, name)
            except OSError as error:
                listing.left_out.append(LeftOut(name, f"it cannot be read ({error})"))
        pending.extend(reversed(below))
    return listing


def _take(listing: Listing, entry: os.DirEntry, name: str) -> None:
    if entry.is_symlink() and not is_below(entry.path, listing.root):
        listing.left_out.append(LeftOut(name, "a link that leads out of the folder"))
        return
    status = entry.stat()
    if stat.S_ISREG(status.st_mode):
        listing.files[name] = File(entry.path, name, status)
    elif entry.is_symlink() and stat.S_ISDIR(status.st_mode):
        listing.left_out.append(LeftOut(name, "a link to a folder; links to folders are not followed"))
    elif is_picture(name):
        listing.left_out.append(LeftOut(name, "not a regular file"))
