"""Index of the files in a folder, kept on disk, so that the next scan reads only the changed files."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import RunError
from ..formats import json_files

if TYPE_CHECKING:
    from .listing import Listing

log = logging.getLogger(__name__)

_VERSION = 1

# In nanoseconds: a file written this shortly before a read may be written again with the same timestamps.
_TIMESTAMP_GRACE_NS = 2_000_000_000


class Index:
    """Facts by file, each valid while the file's size, timestamps and inode stay the same; a context that saves them.

    Args:
        folder: folder of all indices; None to keep nothing.
        of: absolute path of the described folder.
    """

    def __init__(self, folder: str | None, of: str):
        self._path = None
        self._known: dict[str, list] = {}
        self._used: dict[str, list] = {}
        if folder is not None:
            name = hashlib.sha256(os.path.realpath(of).encode("utf-8", "surrogateescape")).hexdigest()[:32]
            self._path = os.path.join(folder, f"{name}.json")
            self._known = self._read()

    def _read(self) -> dict[str, list]:
        value = json_files.read_own_object(self._path, "Graft reads the whole folder again.")
        sound = value.get("version") == _VERSION and isinstance(value.get("files"), dict)
        return {name: row for name, row in value["files"].items() if _is_row(row)} if sound else {}

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error) -> None:
        self.save()

    def get_or_make(
        self,
        name: str,
        stat: os.stat_result,
        make: Callable[[], dict],
        is_valid: Callable[[dict], bool] = lambda facts: True,
    ) -> dict:
        """Return the facts of a file; make them if the file is new or changed.

        Args:
            make: returns the facts, JSON-serializable. Its exceptions pass through, and nothing is stored then.
            is_valid: returns True if stored facts are valid; invalid ones are made again.
        """
        row = self._used.get(name) or self._known.get(name)
        mark = mark_of(stat)
        if row is None or row[0] != mark or not is_valid(row[1]):
            # Use recent files, but do not store them: the mark might also match a later content.
            known_by = mark if is_settled(stat) else None
            row = [known_by, make()]
        self._used[name] = row
        return row[1]

    def save(self) -> None:
        """Store the facts that were used, and forget the others. A failed write only costs time."""
        if self._path is None:
            return
        kept = {name: row for name, row in self._used.items() if row[0] is not None}
        if kept == self._known:
            return
        try:
            json_files.write_own_json(self._path, {"version": _VERSION, "files": kept})
        except RunError as error:
            log.warning("Graft: %s The next scan reads the whole folder again.", error)


def is_settled(stat: os.stat_result) -> bool:
    """Report whether a file was changed so long ago that any later change will change its mark."""
    return time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) >= _TIMESTAMP_GRACE_NS


def _is_row(row) -> bool:
    if not isinstance(row, list) or len(row) != 2 or not isinstance(row[0], list) or not isinstance(row[1], dict):
        return False
    return all(type(number) is int for number in row[0])


def mark_of(stat: os.stat_result) -> list[int]:
    """Return the size, the times (ns) and the inode, which identify a file's state without reading it."""
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def listing_fingerprint(listings: Iterable[Listing]) -> str:
    """Hash names, sizes and times of all files in listings."""
    total = hashlib.sha256()
    for listing in listings:
        for name, file in listing.files.items():
            total.update(f"{name!r} {mark_of(file.stat)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
