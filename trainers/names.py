"""What texts and names of files may hold, whoever wrote them: the same on every system."""

from __future__ import annotations

import re

from .errors import SettingsError

# Names that Windows keeps for devices, with whatever ending.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
# Control characters but for tabs and ends of lines, and halves of characters, which no file and no encoder takes.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
# What no name can hold on Windows, or what leads elsewhere there.
_NO_NAME = re.compile(r'[<>:"|?*\\]')
_LONGEST_PART = 150
_DEEPEST = 20


def is_reserved(name: str) -> bool:
    """Whether Windows keeps a name for a device."""
    return _RESERVED.fullmatch(name) is not None


def check_text(text: str, input: str, most: int) -> None:
    """Refuses what is no text.

    Args:
        most: characters.

    Raises:
        SettingsError: naming the input.
    """
    if len(text) > most:
        raise SettingsError(f"The text has {len(text)} characters.", f"At most {most} are taken: shorten it.", input)
    match = _NO_TEXT.search(text)
    if match is not None:
        raise SettingsError(
            f"The text holds the control character {match.group()!r} at place {match.start() + 1}.",
            "Remove it, or write the text anew.",
            input,
        )


def is_text(text: str) -> bool:
    """Whether each character of a text is a whole one, which files and text encoders can take."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_file_name(name: str, input: str) -> None:
    """Refuses a name, or subfolders and a name, of a file to be written, that would not be one on every system.

    Raises:
        SettingsError: naming the input.
    """
    check_text(name, input, _DEEPEST * _LONGEST_PART)
    parts = name.split("/")
    if len(parts) > _DEEPEST:
        raise _unusable(name, "has too many folders", input)
    for part in parts:
        if _NO_NAME.search(part):
            raise _unusable(name, f"holds {_NO_NAME.search(part).group()}", input)
        if part in ("", ".."):
            raise _unusable(name, f"leads elsewhere or has an empty part ('{part}')", input)
        if part != part.strip() or part.endswith("."):
            raise _unusable(name, f"has a part with a point or a space at an end ('{part}')", input)
        if is_reserved(part):
            raise _unusable(name, f"holds '{part}', which Windows keeps for a device", input)
        if len(part.encode()) > _LONGEST_PART:
            raise _unusable(name, f"has a part of more than {_LONGEST_PART} bytes", input)


def _unusable(name: str, why: str, input: str) -> SettingsError:
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    return SettingsError(
        f"The file name '{shown}' cannot be used: it {why}.",
        "Use a name, or subfolders and a name with / between them, of letters, digits, spaces, dashes and underscores.",
        input,
    )
