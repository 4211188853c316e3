"""A title and a note that the user gives a run, kept in its folder."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from ..errors import RunError, SettingsError
from ..formats import files
from ..text import check_text, is_below
from .run import Run

TITLE_LIMIT = 80
NOTE_LIMIT = 2000

_NAME = "notes.json"
_FILE_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Notes:
    """What the user calls a run, and says of it; both may be empty. Neither decides anything."""

    title: str = ""
    note: str = ""


def parse_notes(title, note) -> Notes:
    """Notes from what a page sent.

    Raises:
        SettingsError: one is no text, too long, or holds control characters.
    """
    for name, value, limit in (("title", title, TITLE_LIMIT), ("note", note, NOTE_LIMIT)):
        if not isinstance(value, str):
            raise SettingsError(f"The {name} is no text.", "Send a string.", name)
        check_text(value, name, limit)
    # A title stands in one line.
    return Notes(" ".join(title.split()), note.strip())


def read_notes(run: Run) -> Notes:
    """Notes of a run; empty where there are none, or where the file holds something else."""
    path = _path(run)
    try:
        if not os.path.isfile(path) or not is_below(path, run.folder) or os.path.getsize(path) > _FILE_LIMIT:
            return Notes()
        value = files.read_json(path)
        return parse_notes(value["title"], value["note"])
    except (OSError, RunError, SettingsError, KeyError, TypeError):
        return Notes()


def write_notes(run: Run, notes: Notes) -> None:
    """Keep notes in a run's folder. The folder's time stays: the history is sorted by it.

    Raises:
        RunError: the folder cannot be written.
    """
    before = os.stat(run.folder)
    files.write_json(_path(run), asdict(notes))
    os.utime(run.folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _path(run: Run) -> str:
    return os.path.join(run.folder, _NAME)
