"""Values of options from the texts that users write: patterns with or without a value, lines, names of runs, prompts.

Prompts of sample pictures have settings of their own, in the syntax of sd-scripts.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..errors import SettingsError
from ..protocols import MAX_SOURCES
from ..regex import regex_problem

Value = TypeVar("Value", int, float)

_LONGEST_ARGUMENT = 200
_CONSTANTS = {"true": True, "false": False, "none": None}

# Each pattern is searched for in the path of each layer, so their number is limited.
_MOST = 256

# A prompt's flag: white space, two hyphens and letters of any case, then white space or the end of the line.
_FLAG = re.compile(r"(?:^|(?<=\s))--([A-Za-z]+)(?=\s|$)")
_SIDES = (64, 8192)


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


@dataclass(frozen=True)
class Prompt:
    """A prompt and the settings that it sets itself; None for those of the option node.

    Attributes:
        negative: the negative prompt, --n.
        width, height: in pixels, --w and --h.
        steps: sampling steps, --s.
        cfg: guidance by a second prediction, --l.
        guidance: for models that were distilled with guidance, --g.
        seed: noise seed, --d.
        sources: names of the source pictures of a model that edits pictures, --c, one flag for each.
    """

    text: str
    negative: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    cfg: float | None = None
    guidance: float | None = None
    seed: int | None = None
    sources: tuple[str, ...] = ()

    def size(self, usual: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height), with the usual value of each that the prompt does not set."""
        return self.width or usual[0], self.height or usual[1]


# (field, type, lowest and highest value) by flag.
_NUMBERS = {
    "w": ("width", int, _SIDES),
    "h": ("height", int, _SIDES),
    "s": ("steps", int, (1, 1000)),
    "l": ("cfg", float, (0.0, 1000.0)),
    "g": ("guidance", float, (0.0, 1000.0)),
    "d": ("seed", int, (0, 2**64 - 1)),
}
FLAGS = ("n", *_NUMBERS, "c")


def parse_prompts(text: str) -> tuple[str, ...]:
    """Return the lines with a prompt: without empty lines, and without comments, which begin with #.

    Raises:
        SettingsError: a line has an unknown flag, or a flag without a valid value.
    """
    lines = {number: line.strip() for number, line in enumerate(text.splitlines(), 1)}
    prompts = {number: line for number, line in lines.items() if line and not line.startswith("#")}
    for number, line in prompts.items():
        _parse(line, f"line {number}")
    return tuple(prompts.values())


def parse_prompt(line: str) -> Prompt:
    """Parse one prompt with its flags.

    The form is that of sd-scripts (docs/train_network_advanced.md): `a dog --n blurry --w 768 --h 512 --s 30`. The
    negative prompt ends at the next flag. A flag that stands twice has its last value; each --c adds a file.

    Raises:
        SettingsError: a flag is unknown, or has no valid value.
    """
    return _parse(line, "the prompt")


def read_prompts(lines: Sequence[str]) -> list[Prompt]:
    """Parse the prompts of a recipe.

    The options refuse a line with unknown flags. If a recipe has one, it comes from a job of an earlier version, which
    had no flags: the whole line is the text.
    """
    prompts = []
    for line in lines:
        try:
            prompts.append(parse_prompt(line))
        except SettingsError:
            prompts.append(Prompt(line))
    return prompts


def text_of(line: str) -> str:
    """Return the part of a line before its first flag, for a text that is no prompt by its writer's intent."""
    return _FLAG.split(line, maxsplit=1)[0].strip()


def _parse(line: str, place: str) -> Prompt:
    text, *flags = (part.strip() for part in _FLAG.split(line))
    prompt = Prompt(text)
    for flag, value in zip(map(str.lower, flags[::2]), flags[1::2], strict=True):
        if flag == "n":
            prompt = replace(prompt, negative=value)
        elif flag in _NUMBERS:
            field, kind, span = _NUMBERS[flag]
            prompt = replace(prompt, **{field: _number(value, kind, span, f"--{flag} in {place}")})
        elif flag == "c":
            prompt = replace(prompt, sources=_with_source(prompt.sources, value, place))
        else:
            known = ", ".join(f"--{name}" for name in FLAGS)
            raise SettingsError(f"Unknown flag --{flag} in {place}: '{line[:80]}'.", f"Use {known}.", "prompts")
    return prompt


def _with_source(sources: tuple[str, ...], name: str, place: str) -> tuple[str, ...]:
    if not name or len(sources) == MAX_SOURCES:
        problem = f"has more than {MAX_SOURCES} --c" if name else "has a --c without a file"
        cure = f"Write the names of at most {MAX_SOURCES} pictures, each after its own --c."
        raise SettingsError(f"{place[0].upper()}{place[1:]} {problem}.", cure, "prompts")
    return (*sources, name)


def _number(text: str, kind: type, span: tuple[float, float], flag: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    low, high = span
    if not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{flag} is '{text[:40]}'.", f"Write {noun} between {low:g} and {high:g}.", "prompts")
    return value
