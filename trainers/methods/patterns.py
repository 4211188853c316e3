"""Layers by path: the regular expressions that users choose them with, some with a value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from ..errors import SettingsError
from ..regex import Budget, PatternError, Patterns, search_patterns

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

Value = TypeVar("Value", int, float)
Pairs = tuple[tuple[str, float], ...]


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
        SettingsError: a pattern matches no path. The message names it. Or the search takes too long.
    """
    budget = Budget()
    for pattern, _ in pairs:
        search = Patterns([pattern], budget=budget)
        try:
            is_used = any(search.first(path) is not None for path in paths)
        except PatternError as error:
            raise SettingsError(error.message, error.cure, input) from error
        if not is_used:
            raise SettingsError(
                f"The pattern '{pattern}' of {input} matches no layer's path.",
                f"The paths look like {paths[0]}." if paths else "",
                input,
            )
