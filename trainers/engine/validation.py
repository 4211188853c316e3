"""Recipe validation: ranges, choices and incompatible options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..families import TARGET_PRESETS, family_of
from ..methods import ADAPTERS, METHODS, textual_inversion
from ..optimizers import OPTIMIZERS, SCHEDULES
from ..recipe.options import AS_IT_IS, HALF, HYBRID, OPTIONS, RECIPE_OPTIONS, SHARDED, TEXT_ALONE

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
    OPTIMIZERS[recipe.optimizer].check_arguments(recipe)
    for declared in RECIPE_OPTIONS.values():
        _check_effect(recipe, declared)
    _check_patterns(recipe)
    _check_preset(recipe)
    _check_spikes(recipe)
    _check_schedule(recipe)
    METHODS[recipe.method].check(recipe)
    _check_precision(recipe)
    _check_shard(recipe)
    _check_base_dtype(recipe)
    _check_prompt_node(recipe)
    _check_preference(recipe)
    _check_slider(recipe)
    _check_objective(recipe)


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
            f"In Graft {declared.node.title()} Options set {other} to {' or '.join(choices)}, or leave {field} unset.",
            field,
        )


def _check_patterns(recipe: Recipe) -> None:
    if (recipe.targets == "patterns") != bool(recipe.target_patterns):
        raise SettingsError(
            f"targets is '{recipe.targets}', but target_patterns is {'set' if recipe.target_patterns else 'empty'}.",
            "Write patterns and choose 'patterns' or 'auto', or leave target_patterns empty.",
            "target_patterns",
        )


def _check_preset(recipe: Recipe) -> None:
    presets = family_of(recipe.family).presets
    if recipe.targets in TARGET_PRESETS and recipe.targets not in presets:
        known = f"{', '.join(presets)}, or " if presets else ""
        raise SettingsError(
            f"targets is '{recipe.targets}', but Graft knows no such layers in {recipe.family} models.",
            f"In Graft Adapter Options choose {known}attention, or name layers with target_patterns.",
            "targets",
        )


def _check_spikes(recipe: Recipe) -> None:
    if 0 < recipe.loss_spike_factor <= 1:
        raise SettingsError(
            f"loss_spike_factor is {recipe.loss_spike_factor:g}: it would skip ordinary steps too.",
            "Set it above 1, such as 10, or to 0 for none.",
            "loss_spike_factor",
        )


def _check_prompt_node(recipe: Recipe) -> None:
    if recipe.prompt_node != TEXT_ALONE and recipe.live_text:
        raise SettingsError(
            f"prompt_node is {recipe.prompt_node}, but this training changes the text encoder or an embedding: Graft "
            "can encode pictures only once, before the first step.",
            "Leave prompt_node in Graft Run Options unset, or train neither text encoder nor embedding.",
            "prompt_node",
        )


def _check_preference(recipe: Recipe) -> None:
    if not recipe.preference_beta:
        return
    for name in ("weighting", "loss", "masked_prior_weight"):
        if name in recipe.objective.set_fields():
            raise SettingsError(
                f"{name} is {getattr(recipe.objective, name)}, but a preference has a loss of its own.",
                f"Leave {name} in Graft Objective Options unset.",
                name,
            )
    if recipe.embedding_name:
        raise SettingsError(
            "A preference compares with the frozen base, which does not know the embedding of Graft Pivotal Options.",
            "Remove Graft Pivotal Options from the options.",
            "options",
        )


def _check_slider(recipe: Recipe) -> None:
    if not recipe.slider_strength:
        return
    if not METHODS[recipe.method].is_linear:
        raise SettingsError(
            f"The effect of {recipe.method} is not proportional to its strength, so a slider cannot use it.",
            f"In Graft Adapter Options set type to {', '.join(name for name in ADAPTERS if METHODS[name].is_linear)}.",
            "options",
        )
    if recipe.embedding_name:
        raise SettingsError(
            "Graft Pivotal Options add an embedding, which has no strength to slide.",
            "Remove them from this node's options.",
            "options",
        )
    # From prompts, the base draws what the network sees.
    for name in ("masked_prior_weight", *(("input_perturbation",) if recipe.slider_prompts else ())):
        if name in recipe.objective.set_fields():
            raise SettingsError(
                f"{name} is set, but a slider does not use it.",
                f"Leave {name} in Graft Objective Options unset.",
                name,
            )
    if recipe.validation_fraction and len(recipe.slider_anchors) > 1:
        raise SettingsError(
            "validation_fraction is set, but a slider repeats its pictures for each anchor: they cannot be held out.",
            "Leave validation_fraction in Graft Run Options unset, or write one anchor.",
            "validation_fraction",
        )
    if not recipe.slider_prompts:
        return
    if recipe.prompt_node != TEXT_ALONE:
        raise SettingsError(
            f"prompt_node is {recipe.prompt_node}, but a slider without pictures has none to show to it.",
            "Leave prompt_node in Graft Run Options unset.",
            "options",
        )
    if recipe.validation_fraction or recipe.keep_best == "on" or recipe.stop_when != "off":
        raise SettingsError(
            "validation_fraction, keep_best or stop_when is set, but there are no pictures to measure a validation "
            "loss with.",
            "Leave all three in Graft Run Options unset.",
            "options",
        )


def _check_objective(recipe: Recipe) -> None:
    if recipe.objective.stratified == "on" and recipe.batch_size == 1:
        raise SettingsError(
            "stratified is on, but batch_size is 1: it would have no effect.",
            "Leave stratified in Graft Objective Options unset"
            + ("." if recipe.slider_strength else ", or raise batch_size."),
            "stratified",
        )
    if recipe.objective.masked_prior_weight and not METHODS[recipe.method].trains_model:
        raise SettingsError(
            "masked_prior_weight is set, but training an embedding alone changes no weights.",
            "Leave masked_prior_weight in Graft Objective Options unset.",
            "masked_prior_weight",
        )


def _check_schedule(recipe: Recipe) -> None:
    if recipe.schedule == "points" and not recipe.schedule_points:
        raise SettingsError(
            "schedule is 'points', but schedule_points is empty.",
            "In Graft Optimizer Options write points, such as 0:1, 500:0.5, 1000:0.1, or choose another schedule.",
            "schedule_points",
        )
    if recipe.warmup_ratio and recipe.warmup_steps:
        raise SettingsError(
            f"warmup_steps is {recipe.warmup_steps} and warmup_ratio is {recipe.warmup_ratio:g}: both set the warm-up.",
            "In Graft Optimizer Options leave one of them unset.",
            "warmup_ratio",
        )


def _check_shard(recipe: Recipe) -> None:
    if recipe.shard not in SHARDED:
        return
    if METHODS[recipe.method].in_backward:
        _check_trained_shards(recipe)
    if recipe.offload == "on":
        raise SettingsError(
            f"shard is {recipe.shard} and offload is on, but Graft can only do one of them with frozen weights.",
            "Set one of them in Graft Memory Options to off.",
            "options",
        )


def _check_trained_shards(recipe: Recipe) -> None:
    names = ", ".join(name for name, optimizer in OPTIMIZERS.items() if optimizer.elementwise)
    refused = {
        "shard is hybrid": (recipe.shard == HYBRID, "Set shard in Graft Memory Options to on."),
        f"{recipe.optimizer} needs whole weights": (
            not OPTIMIZERS[recipe.optimizer].elementwise,
            f"In Graft Optimizer Options choose one of {names}.",
        ),
        "the text encoder or an embedding is trained too": (recipe.live_text, "Train neither, or set shard to off."),
        "communication is bf16": (recipe.communication == HALF, "Leave it unset in Graft Run Options."),
        "gradient_check is on": (recipe.gradient_check == "on", "Leave it unset, or check with one process."),
        "compile is on": (recipe.compile == "on", "Set compile in Graft Memory Options to off."),
    }
    for what, (applies, cure) in refused.items():
        if applies:
            raise SettingsError(
                f"{what}, but this node trains all weights in shards (shard in Graft Memory Options).", cure, "options"
            )


def _check_base_dtype(recipe: Recipe) -> None:
    if recipe.base_dtype != AS_IT_IS and METHODS[recipe.method].in_backward:
        raise SettingsError(
            f"base_dtype is {recipe.base_dtype}, but this node trains all weights, and quantized ones have no "
            "gradient.",
            "Leave base_dtype in Graft Memory Options unset, or train a LoRA.",
            "base_dtype",
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
