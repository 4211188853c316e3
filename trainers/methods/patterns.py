"""Patterns that choose layers by their paths, as users write them: one a line, some with a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from ..errors import SettingsError
from ..regex import Patterns, regex_problem, search_patterns

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

Value = TypeVar("Value", int, float)
Pairs = tuple[tuple[str, float], ...]

# Each is searched for in the path of each layer.
_MOST = 256


def parse_patterns(text: str, input: str) -> tuple[str, ...]:
    """Regular expressions, apart by lines or spaces.

    Raises:
        SettingsError: one is none.
    """
    patterns = tuple(_words(text, input))
    for pattern in patterns:
        _check_pattern(pattern, input)
    return patterns


def parse_pairs(text: str, kind: Callable[[str], Value], low: Value, high: Value, input: str) -> tuple:
    """`pattern=value` pairs, apart by lines or spaces, as ((pattern, value), ...).

    Raises:
        SettingsError: no pair, no pattern, or a value out of range.
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
                f"'{word[:80]}' in {input} is no pattern=value with a value between {low} and {high}.",
                "Write one a line, such as middle_block=8.",
                input,
            )
        _check_pattern(pattern, input)
        pairs.append((pattern, number))
    return tuple(pairs)


def _words(text: str, input: str) -> list[str]:
    words = text.split()
    if len(words) > _MOST:
        raise SettingsError(
            f"{input} holds {len(words)} patterns.", f"At most {_MOST} are taken: use some that fit more layers.", input
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


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a path holds one of the patterns."""
    return search_patterns(tuple(patterns)).first(path) is not None


def value_for(path: str, pairs: Iterable[tuple[str, Value]], default: Value) -> Value:
    """The value of the first pair whose pattern is in a path."""
    pairs = tuple(pairs)
    place = search_patterns(tuple(pattern for pattern, _ in pairs)).first(path) if pairs else None
    return default if place is None else pairs[place][1]


def rank_of(path: str, recipe: Recipe) -> int:
    """A layer's rank; 0 where it is left out."""
    return value_for(path, recipe.block_ranks, recipe.rank)


def check_used(recipe: Recipe, paths: Iterable[str]) -> None:
    """Refuses patterns that choose nothing: a slip of the pen would otherwise train something else in silence.

    Args:
        paths: of all modules that could have been meant.

    Raises:
        SettingsError: naming the pattern.
    """
    paths = list(paths)
    check_pairs([(pattern, None) for pattern in recipe.target_patterns], paths, "target_patterns")
    check_pairs(recipe.block_ranks, paths, "block_ranks")
    check_pairs(recipe.block_learning_rates, paths, "block_learning_rates")


def check_pairs(pairs: Iterable[tuple], paths: list[str], input: str) -> None:
    """Refuses a pattern that is in no path.

    Raises:
        SettingsError: naming it.
    """
    for pattern, _ in pairs:
        search = Patterns([pattern])
        if not any(search.first(path) is not None for path in paths):
            raise SettingsError(
                f"The pattern '{pattern}' of {input} is in no layer's path.",
                f"The paths look like {paths[0]}." if paths else "",
                input,
            )
