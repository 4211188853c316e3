"""Values of options from the texts that users write: patterns with or without a value, lines, names of runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from ..errors import SettingsError
from ..regex import regex_problem

Value = TypeVar("Value", int, float)

# Each pattern is searched for in the path of each layer, so their number is limited.
_MOST = 256


def parse_patterns(text: str, input: str) -> tuple[str, ...]:
    """Parse regular expressions, separated by lines or spaces.

    Raises:
        SettingsError: a pattern is invalid, or there are too many.
    """
    patterns = tuple(_words(text, input))
    for pattern in patterns:
        _check_pattern(pattern, input)
    return patterns


def parse_pairs(text: str, kind: Callable[[str], Value], low: Value, high: Value, input: str) -> tuple:
    """Parse `pattern=value` pairs, separated by lines or spaces, into ((pattern, value), ...).

    Raises:
        SettingsError: an item is no pair, a pattern is invalid, a value is out of range, or there are too many.
    """
    pairs = []
    for word in _words(text, input):
        pattern, equals, value = word.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = None
        if not pattern or number is None or not low <= number <= high:
            raise SettingsError(
                f"'{word[:80]}' in {input} is not pattern=value with a value between {low} and {high}.",
                "Write one per line, such as middle_block=8.",
                input,
            )
        _check_pattern(pattern, input)
        pairs.append((pattern, number))
    return tuple(pairs)


def parse_lines(text: str) -> tuple[str, ...]:
    """Return the lines of a text without white space around them, and without empty ones."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def is_on(value: str) -> bool:
    """Return True if a switch is on."""
    return value == "on"


def check_run_name(name: str) -> None:
    """Raise SettingsError if a run's name cannot be a folder name. Empty stands for the dataset's name."""
    if not name:
        return
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name) or name.rstrip(". ") != name:
        raise SettingsError(
            f"The run name '{name}' cannot be a folder name.",
            "Use letters, digits, spaces, dots, dashes and underscores, and no dot or space at the end.",
            "name",
        )


def _words(text: str, input: str) -> list[str]:
    words = text.split()
    if len(words) > _MOST:
        raise SettingsError(
            f"{input} holds {len(words)} patterns.", f"Use at most {_MOST}, each for more layers.", input
        )
    return words


def _check_pattern(pattern: str, input: str) -> None:
    why = regex_problem(pattern)
    if why:
        raise SettingsError(
            f"'{pattern[:80]}' in {input} {why}.",
            "Use a part of the layers' paths, such as middle_block or attn2.",
            input,
        )
