"""Recipe validation: ranges and incompatible options."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..methods import METHODS, textual_inversion
from ..methods.patterns import parse_pairs, parse_patterns
from ..objective import options as objective
from ..optimizers import OPTIMIZERS, SCHEDULES

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

# Allowed (lowest, highest) value by recipe field.
_RANGES = {
    "steps": (1, 10_000_000),
    "rank": (1, 4096),
    "batch_size": (1, 4096),
    "accumulation": (1, 4096),
    "learning_rate": (1e-12, 100.0),
    "weight_decay": (0.0, 10.0),
    "warmup_steps": (0, 10_000_000),
    "max_grad_norm": (0.0, 1e6),
    "ema_decay": (0.0, 0.99999),
    "beta1": (0.0, 0.99999),
    "beta2": (0.0, 0.999999),
    "num_cycles": (1, 10_000),
    "power": (0.01, 100.0),
    "loss_spike_factor": (0.0, 1e6),
    "validation_fraction": (0.0, 0.9),
    "save_every": (1, 10_000_000),
    "keep_last": (1, 10_000),
    "validate_every": (1, 10_000_000),
    "preview_every": (0, 10_000_000),
    "preview_steps": (1, 1000),
    "preview_cfg": (0.0, 1000.0),
    "preview_seed": (0, 2**64 - 1),
    "resolution": (8, 16384),
    "micro_batch": (0, 4096),
    "processes": (1, 1024),
    "embedding_vectors": (1, 64),
    "embedding_learning_rate": (1e-12, 100.0),
    "embedding_stop": (0.0, 1.0),
    "alpha": (1e-4, 1e6),
    "dropout": (0.0, 0.95),
    "lora_plus_ratio": (1e-3, 1e4),
    "text_encoder_rank": (0, 4096),
    "text_encoder_learning_rate": (0.0, 100.0),
}

# Recipe fields of an embedding, and the node inputs that set them.
_WORD = {"embedding_vectors": "vectors", "embedding_learning_rate": "learning_rate", "embedding_stop": "stop_fraction"}


def check_recipe(recipe: Recipe) -> None:
    """Raise SettingsError for a value out of range, or for two values that contradict each other."""
    for field, known in (("method", METHODS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if getattr(recipe, field) not in known:
            raise SettingsError(
                f"Unknown {field} '{getattr(recipe, field)}'.", f"Choose one of {', '.join(known)}.", field
            )
    absent = set() if METHODS[recipe.method].ranked else {"rank", "alpha"}
    absent |= set() if recipe.embedding_name else set(_WORD)
    for field in [field for field in _RANGES if field not in absent]:
        # The dataset node has the resolution widget. On the training node, the error belongs to the input `dataset`.
        _check_range(field, getattr(recipe, field), "dataset" if field == "resolution" else _WORD.get(field, field))
    _check_name(recipe.name)
    OPTIMIZERS[recipe.optimizer].check(recipe)
    for field, schedule, plain in (("num_cycles", "cosine with restarts", 1), ("power", "polynomial", 1.0)):
        if getattr(recipe, field) != plain and recipe.schedule != schedule:
            raise SettingsError(
                f"{field} is set, but schedule is {recipe.schedule}: it would have no effect.",
                f"In Graft Optimizer Options set schedule to {schedule}, or leave {field} unset.",
                field,
            )
    if (recipe.targets == "patterns") != bool(recipe.target_patterns):
        raise SettingsError(
            f"targets is '{recipe.targets}', but target_patterns is {'set' if recipe.target_patterns else 'empty'}.",
            "Write patterns and choose 'patterns' or 'auto', or leave target_patterns empty.",
            "target_patterns",
        )
    if 0 < recipe.loss_spike_factor <= 1:
        raise SettingsError(
            f"loss_spike_factor is {recipe.loss_spike_factor:g}: it would skip ordinary steps too.",
            "Set it above 1, such as 10, or to 0 for none.",
            "loss_spike_factor",
        )
    METHODS[recipe.method].check(recipe)
    _check_precision(recipe)
    _check_shard(recipe)


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


def _check_range(field: str, value: Any, input: str) -> None:
    low, high = _RANGES[field]
    if not low <= value <= high:
        raise SettingsError(f"{field} is {value}.", f"It must lie between {low} and {high}.", input)


def check_option(kind: str, name: str, value: Any) -> None:
    """Raise SettingsError for an option's value out of range, at the option node that sets it."""
    field = f"preview_{name}" if kind == "preview" else name
    if kind == "pivotal":
        field = next((theirs for theirs, ours in _WORD.items() if ours == name), name)
    if kind == "objective":
        objective.check_range(name, value)
    elif field in _RANGES:
        _check_range(field, value, name)
    if (kind, name) == ("run", "name"):
        _check_name(value.strip())
    if (kind, name) == ("pivotal", "name"):
        textual_inversion.check_name(value.strip())
    if name == "target_patterns":
        parse_patterns(value, name)
    if name == "block_ranks":
        parse_pairs(value, int, 0, 4096, name)
    if name == "block_learning_rates":
        parse_pairs(value, float, 0.0, 100.0, name)


def _check_name(name: str) -> None:
    if not name:
        return
    if not re.fullmatch(r"[\w][\w .-]{0,99}", name) or name.rstrip(". ") != name:
        raise SettingsError(
            f"The run name '{name}' cannot be a folder name.",
            "Use letters, digits, spaces, dots, dashes and underscores, and no dot or space at the end.",
            "name",
        )
