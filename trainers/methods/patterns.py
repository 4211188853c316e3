"""Regular expressions from users that choose layers by path, one per line, some with a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from ..errors import SettingsError
from ..regex import Patterns, regex_problem, search_patterns

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

Value = TypeVar("Value", int, float)
Pairs = tuple[tuple[str, float], ...]

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


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Return True if one of the patterns occurs in the path."""
    return search_patterns(tuple(patterns)).first(path) is not None


def value_for(path: str, pairs: Iterable[tuple[str, Value]], default: Value) -> Value:
    """Return the value of the first pair whose pattern occurs in the path."""
    pairs = tuple(pairs)
    place = search_patterns(tuple(pattern for pattern, _ in pairs)).first(path) if pairs else None
    return default if place is None else pairs[place][1]


def rank_of(path: str, recipe: Recipe) -> int:
    """Return a layer's rank. 0 excludes the layer."""
    return value_for(path, recipe.block_ranks, recipe.rank)


def check_used(recipe: Recipe, paths: Iterable[str]) -> None:
    """Refuse patterns that match nothing. A typing error would otherwise train other layers without notice.

    Args:
        paths: paths of all modules that a pattern can match.

    Raises:
        SettingsError: a pattern matches no path. The message names it.
    """
    paths = list(paths)
    check_pairs([(pattern, None) for pattern in recipe.target_patterns], paths, "target_patterns")
    check_pairs(recipe.block_ranks, paths, "block_ranks")
    check_pairs(recipe.block_learning_rates, paths, "block_learning_rates")


def check_pairs(pairs: Iterable[tuple], paths: list[str], input: str) -> None:
    """Refuse a pattern that occurs in no path.

    Raises:
        SettingsError: a pattern matches no path. The message names it.
    """
    for pattern, _ in pairs:
        search = Patterns([pattern])
        if not any(search.first(path) is not None for path in paths):
            raise SettingsError(
                f"The pattern '{pattern}' of {input} matches no layer's path.",
                f"The paths look like {paths[0]}." if paths else "",
                input,
            )
