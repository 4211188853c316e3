"""Recipe validation: ranges, choices and incompatible options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..methods import ADAPTERS, METHODS, textual_inversion
from ..optimizers import OPTIMIZERS, SCHEDULES
from ..recipe.options import OPTIONS, RECIPE_OPTIONS

if TYPE_CHECKING:
    from ..option import Option
    from ..recipe.recipe import Recipe

# Choices that options name by a registry, because `recipe` cannot import it.
_REGISTRIES: dict[str, Mapping[str, Any]] = {
    "methods": METHODS,
    "adapters": ADAPTERS,
    "optimizers": OPTIMIZERS,
    "schedules": SCHEDULES,
}


def choices_of(choices: tuple[str, ...] | str) -> tuple[str, ...]:
    """Return the choices that an option declares, by themselves or by the name of a registry."""
    return tuple(_REGISTRIES[choices]) if isinstance(choices, str) else choices


def check_option(node: str, input: str, value: Any) -> None:
    """Raise SettingsError for an option's value out of range, at the option node that sets it."""
    declared = OPTIONS[node][input]
    declared.check_range(value, input)
    chosen = declared.value_of(value)
    if declared.check is not None:
        declared.check(chosen)
    if declared.name == "embedding_name":
        textual_inversion.check_name(chosen)


def check_recipe(recipe: Recipe) -> None:
    """Raise SettingsError for a value out of range, or for two values that contradict each other."""
    for declared in RECIPE_OPTIONS.values():
        _check_choice(recipe, declared)
    for declared in RECIPE_OPTIONS.values():
        if _is_used(recipe, declared):
            declared.check_range(getattr(recipe, declared.name), declared.trainer_input or declared.name)
        if declared.check is not None:
            declared.check(getattr(recipe, declared.name))
    OPTIMIZERS[recipe.optimizer].check(recipe)
    for declared in RECIPE_OPTIONS.values():
        _check_effect(recipe, declared)
    _check_patterns(recipe)
    _check_spikes(recipe)
    METHODS[recipe.method].check(recipe)
    _check_precision(recipe)
    _check_shard(recipe)


def _is_used(recipe: Recipe, declared: Option) -> bool:
    """Return True unless method or embedding, to which the option belongs, are absent."""
    if declared.name in ("rank", "alpha"):
        return METHODS[recipe.method].ranked
    return bool(recipe.embedding_name) or not declared.name.startswith("embedding_")


def _check_choice(recipe: Recipe, declared: Option) -> None:
    known = choices_of(declared.choices)
    value = getattr(recipe, declared.name)
    # A converted value, such as that of a switch, is no choice any more.
    if known and declared.parse is None and value not in (*known, declared.default):
        raise SettingsError(f"Unknown {declared.name} '{value}'.", f"Choose one of {', '.join(known)}.", declared.name)


def _check_effect(recipe: Recipe, declared: Option) -> None:
    field = declared.name
    if declared.needs is None or getattr(recipe, field) == declared.default:
        return
    other, choices = declared.needs
    if getattr(recipe, other) not in choices:
        raise SettingsError(
            f"{field} is set, but {other} is {getattr(recipe, other)}: it would have no effect.",
            f"In Graft Optimizer Options set {other} to {' or '.join(choices)}, or leave {field} unset.",
            field,
        )


def _check_patterns(recipe: Recipe) -> None:
    if (recipe.targets == "patterns") != bool(recipe.target_patterns):
        raise SettingsError(
            f"targets is '{recipe.targets}', but target_patterns is {'set' if recipe.target_patterns else 'empty'}.",
            "Write patterns and choose 'patterns' or 'auto', or leave target_patterns empty.",
            "target_patterns",
        )


def _check_spikes(recipe: Recipe) -> None:
    if 0 < recipe.loss_spike_factor <= 1:
        raise SettingsError(
            f"loss_spike_factor is {recipe.loss_spike_factor:g}: it would skip ordinary steps too.",
            "Set it above 1, such as 10, or to 0 for none.",
            "loss_spike_factor",
        )


def _check_shard(recipe: Recipe) -> None:
    if recipe.shard != "on":
        return
    if METHODS[recipe.method].in_backward:
        raise SettingsError(
            "shard is on, but this node trains all weights, and Graft can shard only frozen weights.",
            "Set shard in Graft Memory Options to off, or train a LoRA.",
            "options",
        )
    if recipe.offload == "on":
        raise SettingsError(
            "shard and offload are both on, but Graft can only do one of them with frozen weights.",
            "Set one of them in Graft Memory Options to off.",
            "options",
        )


def _check_precision(recipe: Recipe) -> None:
    if recipe.weight_dtype == "fp32":
        return
    if METHODS[recipe.method].ranked or not METHODS[recipe.method].trains_model:
        raise SettingsError(
            f"weight_dtype is {recipe.weight_dtype}, but adapters and embeddings always train in fp32.",
            "Leave weight_dtype unset in Graft Adapter Options: it is for training all weights.",
            "weight_dtype",
        )
    if not OPTIMIZERS[recipe.optimizer].per_parameter:
        raise SettingsError(
            f"weight_dtype is {recipe.weight_dtype}, so Graft updates the weights one by one, but "
            f"{recipe.optimizer} needs all of them at once.",
            "Set weight_dtype to fp32, or choose another optimizer in Graft Optimizer Options, such as AdamW.",
            "weight_dtype",
        )
