"""Layers that can be adapted: their kinds, the selection by a recipe, and the data that an export reads.

Users choose layers with regular expressions for their paths, some with a value.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..errors import SettingsError
from ..families import is_attention, is_feed_forward, is_preset, is_trained
from ..formats.kohya import own
from ..regex import Budget, PatternError, Patterns, search_patterns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..recipe.recipe import Recipe

Value = TypeVar("Value", int, float)
Pairs = tuple[tuple[str, float], ...]

_NAME = re.compile(r"(?P<path>.+)\.(?P<stem>\w+)\.default(?P<ending>\.weight)?")

LINEAR = "linear"
POINT = "1x1 convolution"
CONV = "convolution"


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


@dataclass(frozen=True)
class Layer:
    """One adapted layer, as its export sees it.

    Attributes:
        path: of the module in the model.
        values: the trainables by peft's name for them (`lora_A`, `hada_w1_a`, ...), float32 on the CPU.
        rank, alpha: of this layer.
        scale: effective scale of the layer's difference, or None if the method has no alpha.
        adapted: peft's layer, with the frozen one as `base_layer`. None if only the values are known.
    """

    path: str
    values: dict[str, torch.Tensor]
    rank: int
    alpha: float
    scale: float | None
    adapted: nn.Module | None

    def weight(self) -> torch.Tensor:
        """Return the frozen weight, [out, in, ...] float32 on the CPU."""
        return own(self.adapted.base_layer.weight)

    def bias(self) -> torch.Tensor | None:
        """Return the frozen bias, [out] float32 on the CPU, or None if the layer has none."""
        return None if self.adapted.base_layer.bias is None else own(self.adapted.base_layer.bias)


class TrainableName(NamedTuple):
    """A trainable's name as peft gives it.

    Attributes:
        path: of the adapted layer in the model.
        stem: peft's short name, such as `lora_A`.
        ending: ".weight" or empty.
    """

    path: str
    stem: str
    ending: str


def parse_name(name: str) -> TrainableName | None:
    """Split a parameter's name; return None if it is no trainable of peft's."""
    match = _NAME.fullmatch(name)
    return None if match is None else TrainableName(match["path"], match["stem"], match["ending"] or "")


def kind_of(layer: nn.Module) -> str | None:
    """Return the kind of a layer that can be adapted, or None for any other layer."""
    from torch import nn

    if getattr(layer, "weight", None) is None:
        return None
    if isinstance(layer, nn.Linear):
        return LINEAR
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        return POINT if layer.kernel_size == (1, 1) else CONV
    return None


def alpha_of(rank: int, recipe: Recipe) -> float:
    """Return a layer's alpha. It is proportional to the layer's rank, so that every layer has the recipe's scale."""
    return recipe.alpha * rank / recipe.rank


def alphas_of(ranks: dict[str, int], recipe: Recipe) -> dict[str, float]:
    """Return the alphas of layers by path."""
    return {path: alpha_of(rank, recipe) for path, rank in ranks.items()}


def meant_layers(module: nn.Module, family: Family, recipe: Recipe) -> dict[str, str]:
    """Return the kinds of the adaptable layers that the recipe's targets match, by path."""
    kinds = {path: kind_of(layer) for path, layer in module.named_modules() if is_trained(path, family)}
    return {path: kind for path, kind in kinds.items() if kind and is_target(path, kind, family, recipe)}


def is_target(path: str, kind: str, family: Family, recipe: Recipe) -> bool:
    """Return True if the recipe's targets match a layer."""
    if recipe.targets == "patterns":
        return matches(path, recipe.target_patterns)
    if recipe.targets == "linear + conv":
        return True
    if kind != LINEAR:
        return False
    if recipe.targets == "all linear":
        return True
    if recipe.targets in family.presets:
        return is_preset(path, family, recipe.targets)
    if recipe.targets == "attention + feed-forward" and is_feed_forward(path, family):
        return True
    return is_attention(path, family)


def largest_divisor(limit: int, *sizes: int) -> int:
    """Return the largest number up to `limit` that divides all sizes."""
    return max(number for number in range(1, limit + 1) if all(size % number == 0 for size in sizes))
