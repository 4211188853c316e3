"""Values of options from the texts that users write: patterns with or without a value, lines, names of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ..errors import SettingsError
from ..regex import regex_problem

Value = TypeVar("Value", int, float)

_LONGEST_ARGUMENT = 200
_CONSTANTS = {"true": True, "false": False, "none": None}

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


def parse_points(text: str) -> tuple[tuple[int, float], ...]:
    """Parse a text such as "0:1, 500:0.5, 1000:0.1" into (step, factor) pairs, ascending by step.

    Raises:
        SettingsError: a part is not a step and a factor, or a step occurs twice.
    """
    points: dict[int, float] = {}
    for part in text.replace("\n", ",").split(","):
        if not part.strip():
            continue
        step, colon, factor = (piece.strip() for piece in part.partition(":"))
        try:
            value = float(factor)
        except ValueError:
            value = -1.0
        if not (colon and step.isdecimal() and len(step) <= 9 and 0.0 <= value <= 1000.0) or int(step) in points:
            raise SettingsError(
                f"'{part.strip()[:80]}' is not a point of the schedule.",
                "Write a step and a factor of learning_rate for each point: 0:1, 500:0.5, 1000:0.1.",
                "schedule_points",
            )
        points[int(step)] = value
    return tuple(sorted(points.items()))


def parse_arguments(text: str, input: str = "optimizer_args") -> tuple[tuple[str, Any], ...]:
    """Parse a text such as "d_coef=2 betas=0.9,0.99" into (name, value) pairs, sorted by name.

    A value is a number, a switch, none, a text, or a tuple of these.

    Raises:
        SettingsError: a part is not a name with a value, or a name occurs twice.
    """
    arguments: dict[str, Any] = {}
    for word in _words(text, input):
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier() or not value or name in arguments or len(word) > _LONGEST_ARGUMENT:
            raise SettingsError(
                f"'{word[:80]}' is not an argument of {input}.",
                "Write each name once with its value, separated by spaces: d_coef=2 betas=0.9,0.99.",
                input,
            )
        parts = [_argument(part) for part in value.strip("()[]").split(",")]
        arguments[name] = parts[0] if len(parts) == 1 else tuple(parts)
    return tuple(sorted(arguments.items()))


def _argument(text: str) -> Any:
    """Return a number, a switch, None, or the text itself."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            number = kind(text)
            return number if math.isfinite(number) else text
    return text


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
