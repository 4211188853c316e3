"""Checks of texts and file names, with the same result on every operating system, and short texts of lists."""

import os
import re
import unicodedata
from collections.abc import Sequence

from .errors import SettingsError

# Names that Windows reserves for devices, with any extension.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
# Control characters except tabs and line ends, and lone surrogates, which no file and no text encoder accepts.
_NO_TEXT = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
# Characters that Windows forbids in names or reads as path separators.
_NO_NAME = re.compile(r'[<>:"|?*\\\x00-\x1f]')
_LONGEST_PART = 150
_DEEPEST = 20


# Letters of scripts that write words without spaces (Thai to Khmer, Chinese, Japanese) or attach endings to words
# (Korean). A word may begin and end anywhere between these letters.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff\u1950-\u19df\u1a20-\u1aad\u3005-\u3007\u3031-\u3035"
    "\u3040-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\ua980-\ua9df\uaa60-\uaadf\uac00-\ud7ff\uf900-\ufaff"
    "\uff66-\uffdc\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
# Characters that modify the one before: accents, vowel signs, joiners and emoji skin tones. None of them matches \w.
_MARKS = (
    "\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc"
    "\u06df-\u06e4\u06e7\u06e8\u06ea-\u06ed\u0900-\u0903\u093a-\u094f\u0951-\u0957\u0962\u0963\u0981-\u0983\u09bc-\u09cd"
    "\u0a01-\u0a03\u0a3c-\u0a51\u0a81-\u0a83\u0abc-\u0acd\u0b01-\u0b03\u0b3c-\u0b57\u0b82\u0bbe-\u0bcd\u0c00-\u0c04"
    "\u0c3c-\u0c56\u0c81-\u0c83\u0cbc-\u0cd6\u0d00-\u0d03\u0d3b-\u0d4d\u0d81-\u0d83\u0dca-\u0df3\u0e31\u0e34-\u0e3a"
    "\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b4-\u17d3\u1ab0-\u1aff\u1dc0-\u1dff\u200d\u20d0-\u20ff"
    "\u3099\u309a\ufe20-\ufe2f\U0001f3fb-\U0001f3ff"
)
# A character inside a word, in a script that puts spaces between words.
SPACED = f"(?:(?![{_UNSPACED}])[\\w{_MARKS}])"


def starts_word(words: str) -> str:
    """Return a regular expression that matches before `words` unless they are the end of a longer word."""
    joined = rf"(?<![\w{_MARKS}])|(?<=[{_UNSPACED}])" if re.match(SPACED, words) else ""
    return rf"(?<!\u200d)(?:{joined})"


def ends_word(words: str) -> str:
    """Return a regular expression that matches after `words` unless they are the start of a longer word."""
    return f"(?![{_MARKS}])" + (f"(?!{SPACED})" if re.match(SPACED, words[-1:]) else "")


def composed(text: str) -> str:
    """Return a text in Unicode's normalization form C, which most systems write: letters with composed accents."""
    return unicodedata.normalize("NFC", text)


def is_windows_reserved(name: str) -> bool:
    """Report whether Windows reserves a name for a device."""
    return _RESERVED.fullmatch(name) is not None


def check_text(text: str, input: str, most: int) -> None:
    """Check that a text is short enough and has no control characters or lone surrogates.

    Args:
        input: name of the node's input, for the error.
        most: maximum number of characters.

    Raises:
        SettingsError: the text is refused; the error names the input.
    """
    if len(text) > most:
        raise SettingsError(f"The text has {len(text)} characters.", f"Shorten it to at most {most}.", input)
    match = _NO_TEXT.search(text)
    if match is not None:
        raise SettingsError(
            f"The text contains the control character {match.group()!r} at position {match.start() + 1}.",
            "Remove it, or write the text again.",
            input,
        )


def is_text(text: str) -> bool:
    """Report whether a text has no lone surrogates, which files and text encoders do not accept."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def check_file_name(name: str, input: str) -> None:
    """Check that a file name, with or without subfolders, is valid on every operating system.

    Raises:
        SettingsError: the name is refused; the error names the input.
    """
    check_text(name, input, _DEEPEST * _LONGEST_PART)
    parts = name.split("/")
    if len(parts) > _DEEPEST:
        raise _unusable(name, "has too many folders", input)
    for part in parts:
        if _NO_NAME.search(part):
            raise _unusable(name, f"contains {_NO_NAME.search(part).group()}", input)
        if part in ("", ".."):
            raise _unusable(name, f"leads elsewhere or has an empty part ('{part}')", input)
        if part != part.strip() or part.endswith("."):
            raise _unusable(name, f"has a part that ends with a dot, or begins or ends with a space ('{part}')", input)
        if is_windows_reserved(part):
            raise _unusable(name, f"contains '{part}', which Windows reserves for a device", input)
        if len(part.encode()) > _LONGEST_PART:
            raise _unusable(name, f"has a part of more than {_LONGEST_PART} bytes", input)


def _unusable(name: str, why: str, input: str) -> SettingsError:
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    return SettingsError(
        f"Cannot use the file name '{shown}': it {why}.",
        "Use a name, or subfolders and a name with / between them, of letters, digits, spaces, dashes and underscores.",
        input,
    )


def safe_name(text: str) -> str:
    """Return a valid folder name made from any text."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-. ")[:60] or "run"
    return f"run-{name}" if is_windows_reserved(name) else name


def counted(number: int, what: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def join_first(names: Sequence[str], most: int) -> str:
    """Join the first `most` names with commas; dots stand for the others."""
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def is_below(path: str, root: str) -> bool:
    """Report whether a path is a folder or lies below it, after links in both are resolved."""
    real = os.path.realpath(path)
    base = os.path.realpath(root)
    try:
        return os.path.commonpath([real, base]) == base
    except ValueError:
        # The paths are on different drives.
        return False
