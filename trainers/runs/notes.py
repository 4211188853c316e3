"""Title and note that the user gives a run, stored in its folder."""

import os
from dataclasses import asdict, dataclass

from ..errors import RunError, SettingsError
from ..formats import json_files
from ..text import check_text, is_below
from .run import Run

TITLE_LIMIT = 80
NOTE_LIMIT = 2000

_NAME = "notes.json"
_FILE_LIMIT = 64 * 1024


@dataclass(frozen=True)
class Notes:
    """User's title and note for a run. Both may be empty, and neither affects the training."""

    title: str = ""
    note: str = ""


def parse_notes(title, note) -> Notes:
    """Check the title and the note that a web page sent, and return them as Notes.

    Raises:
        SettingsError: one is not a string, is too long or contains control characters.
    """
    for name, value, limit in (("title", title, TITLE_LIMIT), ("note", note, NOTE_LIMIT)):
        if not isinstance(value, str):
            raise SettingsError(f"The {name} is not a text.", "Send a string.", name)
        check_text(value, name, limit)
    return Notes(" ".join(title.split()), note.strip())


def read_notes(run: Run) -> Notes:
    """Return the notes of a run, empty if the file is missing or invalid."""
    path = _path(run)
    try:
        if not os.path.isfile(path) or not is_below(path, run.folder) or os.path.getsize(path) > _FILE_LIMIT:
            return Notes()
        value = json_files.read_own_json(path)
        return parse_notes(value["title"], value["note"])
    except (OSError, RunError, SettingsError, KeyError, TypeError):
        return Notes()


def write_notes(run: Run, notes: Notes) -> None:
    """Write notes into a run's folder. Restore the folder's modification time, because the history sorts by it.

    Raises:
        RunError: the folder cannot be written.
    """
    before = os.stat(run.folder)
    json_files.write_own_json(_path(run), asdict(notes))
    os.utime(run.folder, ns=(before.st_atime_ns, before.st_mtime_ns))


def _path(run: Run) -> str:
    return os.path.join(run.folder, _NAME)
