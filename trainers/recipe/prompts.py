"""Prompts of sample pictures with settings of their own, in the syntax of sd-scripts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import SettingsError
from ..protocols import MAX_SOURCES

# A flag: white space, two hyphens and lower-case letters, then white space or the end of the line.
_FLAG = re.compile(r"(?:^|(?<=\s))--([a-z]+)(?=\s|$)")
_SIDES = (64, 8192)


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
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
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
