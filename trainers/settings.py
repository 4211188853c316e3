"""What a run is made with: the options as the user set them, and the recipe with every default filled in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .errors import SettingsError
from .methods import METHODS
from .methods.patterns import parse_pairs, parse_patterns

if TYPE_CHECKING:
    from .families import Family

# The value of a field that the user left alone: it is then decided by family, method and optimiser.
UNSET: dict[str, dict[str, Any]] = {
    "run": {
        "name": "",
        "on_existing": "auto",
        "save_every": 0,
        "keep_last": 0,
        "validation_fraction": 0.0,
        "validate_every": 0,
        "gradient_check": "auto",
    },
    "preview": {
        "prompts": "",
        "every": 0,
        "steps": 0,
        "cfg": 0.0,
        "sampler_name": "auto",
        "scheduler": "auto",
        "seed": -1,
    },
    "optimizer": {
        "optimizer": "auto",
        "weight_decay": -1.0,
        "schedule": "auto",
        "warmup_steps": -1,
        "accumulation": 0,
        "max_grad_norm": -1.0,
        "ema_decay": -1.0,
    },
    "memory": {
        "checkpointing": "auto",
        "compute_dtype": "auto",
        "micro_batch": 0,
    },
    "adapter": {
        "type": "auto",
        "alpha": 0.0,
        "targets": "auto",
        "dropout": 0.0,
        "text_encoder": "auto",
        "text_encoder_rank": 0,
        "text_encoder_learning_rate": 0.0,
        "start_from": "auto",
        "target_patterns": "",
        "block_ranks": "",
        "block_learning_rates": "",
        "lora_plus_ratio": 0.0,
    },
}

# Which layers an adapter is put on.
TARGETS = ("attention", "attention + feed-forward", "all linear", "linear + conv", "patterns")


# Deciding fields of a recipe that came after the first runs, each with the value that means what was done before it:
# at that value it is no part of a run's identity, so that runs made before are still found.
LATER: dict[str, Any] = {
    "targets": "attention",
    "target_patterns": (),
    "dropout": 0.0,
    "block_ranks": (),
    "block_learning_rates": (),
    "lora_plus_ratio": 1.0,
    "text_encoder": False,
    "text_encoder_rank": 0,
    "text_encoder_learning_rate": 0.0,
}


class Options(dict):
    """Set fields only, as {(kind, field): value}; option nodes chain them."""

    def adding(self, kind: str, values: dict[str, Any]) -> Options:
        """These options with a node's set fields on top: the node nearest the trainer wins.

        Raises:
            SettingsError: a field the kind does not have, or a value out of range.
        """
        merged = Options(self)
        for name, value in values.items():
            if name not in UNSET[kind]:
                raise SettingsError(f"There is no {kind} option '{name}'.", f"Known are {', '.join(UNSET[kind])}.")
            if value != UNSET[kind][name]:
                _check_option(kind, name, value)
                merged[(kind, name)] = value
        return merged

    def value(self, kind: str, name: str, default: Any) -> Any:
        """The field as set, else the default."""
        return self.get((kind, name), default)


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made with. Fields that decide its result make up `identity`; the rest may change.

    Attributes:
        targets: one of TARGETS; with "patterns" the layers of `target_patterns`.
        block_ranks, block_learning_rates: (pattern, value) pairs; the first whose pattern is in a layer's path holds.
        lora_plus_ratio: B's learning rate over A's.
        text_encoder_rank, text_encoder_learning_rate: 0 where no text encoder is trained.
        start_from: an adapter in the host's list, empty for none. What is in it is part of the base it trains on.
    """

    method: str
    learning_rate: float
    rank: int
    alpha: float
    batch_size: int
    seed: int
    resolution: int
    optimizer: str
    weight_decay: float
    schedule: str
    warmup_steps: int
    accumulation: int
    max_grad_norm: float
    ema_decay: float
    validation_fraction: float
    family: str
    trigger: str
    targets: str
    target_patterns: tuple[str, ...]
    dropout: float
    block_ranks: tuple[tuple[str, int], ...]
    block_learning_rates: tuple[tuple[str, float], ...]
    lora_plus_ratio: float
    text_encoder: bool
    text_encoder_rank: int
    text_encoder_learning_rate: float
    # What follows does not decide the result.
    steps: int
    name: str
    on_existing: str
    save_every: int
    keep_last: int
    validate_every: int
    gradient_check: str
    preview_prompts: tuple[str, ...]
    preview_every: int
    preview_steps: int
    preview_cfg: float
    preview_sampler: str
    preview_scheduler: str
    preview_seed: int
    checkpointing: str
    compute_dtype: str
    micro_batch: int
    start_from: str

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the result; those that came later only where they are not at their old value."""
        names = [field.name for field in fields(self)]
        values = {name: getattr(self, name) for name in names[: names.index("steps")]}
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    def identity(self, dataset: str, base: str) -> str:
        """Hash that names the run: recipe, dataset content and base."""
        text = json.dumps([self.deciding(), dataset, base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def summary(self) -> str:
        """What was chosen or filled in, in one line."""
        scale = METHODS[self.method].scale(self.rank, self.alpha)
        strength = "" if scale is None else f"alpha {self.alpha:g} (effective scale {scale:g}), "
        return (
            f"{self.method} for {self.family}, {self.optimizer}, learning rate {self.learning_rate:g} {self.schedule}, "
            f"rank {self.rank}, {strength}on {self.targets}, "
            f"batch {self.batch_size} x {self.accumulation}, resolution {self.resolution}, seed {self.seed}"
        )

    def as_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)


def resolve(
    options: Options,
    family: Family,
    method: str,
    steps: int,
    learning_rate: float,
    rank: int,
    batch_size: int,
    seed: int,
    resolution: int,
    trigger: str,
) -> Recipe:
    """The recipe of a node's widgets and its options.

    Args:
        learning_rate: 0 for the family's and method's default.
        resolution: 0 for the family's own.

    Raises:
        SettingsError: a value out of range, or two that contradict each other.
    """
    get = options.value
    if method == "LoRA":
        # What trains an adapter trains it of the type that was chosen.
        method = get("adapter", "type", method)
    patterns = parse_patterns(get("adapter", "target_patterns", ""), "target_patterns")
    learning_rate = learning_rate or family.lora_learning_rate
    text_encoder = get("adapter", "text_encoder", "off") == "on"
    recipe = Recipe(
        method=method,
        learning_rate=learning_rate,
        rank=rank,
        alpha=float(get("adapter", "alpha", rank)),
        batch_size=batch_size,
        seed=seed,
        resolution=resolution or family.resolution,
        optimizer=get("optimizer", "optimizer", "AdamW"),
        weight_decay=get("optimizer", "weight_decay", 0.01),
        schedule=get("optimizer", "schedule", "constant"),
        warmup_steps=get("optimizer", "warmup_steps", 0),
        accumulation=get("optimizer", "accumulation", 1),
        max_grad_norm=get("optimizer", "max_grad_norm", 1.0),
        ema_decay=get("optimizer", "ema_decay", 0.0),
        validation_fraction=get("run", "validation_fraction", 0.0),
        family=family.name,
        trigger=trigger,
        targets=get("adapter", "targets", "patterns" if patterns else _default_targets(method)),
        target_patterns=patterns,
        dropout=get("adapter", "dropout", 0.0),
        block_ranks=parse_pairs(get("adapter", "block_ranks", ""), int, 0, 4096, "block_ranks"),
        block_learning_rates=parse_pairs(
            get("adapter", "block_learning_rates", ""), float, 0.0, 100.0, "block_learning_rates"
        ),
        lora_plus_ratio=get("adapter", "lora_plus_ratio", 1.0),
        text_encoder=text_encoder,
        text_encoder_rank=get("adapter", "text_encoder_rank", rank) if text_encoder else 0,
        text_encoder_learning_rate=(
            get("adapter", "text_encoder_learning_rate", learning_rate) if text_encoder else 0.0
        ),
        steps=steps,
        name=get("run", "name", "").strip(),
        on_existing=get("run", "on_existing", "resume"),
        save_every=get("run", "save_every", 500),
        keep_last=get("run", "keep_last", 2),
        validate_every=get("run", "validate_every", 50),
        gradient_check=get("run", "gradient_check", "auto"),
        preview_prompts=_lines(get("preview", "prompts", "")),
        preview_every=get("preview", "every", 100),
        preview_steps=get("preview", "steps", 20),
        preview_cfg=get("preview", "cfg", family.preview_cfg),
        preview_sampler=get("preview", "sampler_name", "euler"),
        preview_scheduler=get("preview", "scheduler", family.preview_scheduler),
        preview_seed=get("preview", "seed", 0),
        checkpointing=get("memory", "checkpointing", "auto"),
        compute_dtype=get("memory", "compute_dtype", "auto"),
        micro_batch=get("memory", "micro_batch", 0),
        start_from=get("adapter", "start_from", ""),
    )
    _check(recipe)
    return recipe


def _default_targets(method: str) -> str:
    # An unknown method is refused with the others' names, in `_check`.
    return METHODS[method].default_targets if method in METHODS else "attention"


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


# By the recipe's names; the numbers a run can be made with.
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
    "validation_fraction": (0.0, 0.9),
    "save_every": (1, 10_000_000),
    "keep_last": (1, 10_000),
    "validate_every": (1, 10_000_000),
    "preview_every": (1, 10_000_000),
    "preview_steps": (1, 1000),
    "preview_cfg": (0.0, 1000.0),
    "preview_seed": (0, 2**64 - 1),
    "resolution": (8, 16384),
    "micro_batch": (0, 4096),
    "alpha": (1e-4, 1e6),
    "dropout": (0.0, 0.95),
    "lora_plus_ratio": (1e-3, 1e4),
    "text_encoder_rank": (0, 4096),
    "text_encoder_learning_rate": (0.0, 100.0),
}


def _check(recipe: Recipe) -> None:
    from .optimisers import OPTIMISERS, SCHEDULES

    for field, known in (("method", METHODS), ("optimizer", OPTIMISERS), ("schedule", SCHEDULES)):
        if getattr(recipe, field) not in known:
            raise SettingsError(
                f"Unknown {field} '{getattr(recipe, field)}'.", f"Choose one of {', '.join(known)}.", field
            )
    for field in _RANGES:
        # The resolution is a widget of the dataset's node, which this one knows by the wire it came over.
        _check_range(field, getattr(recipe, field), "dataset" if field == "resolution" else field)
    _check_name(recipe.name)
    if (recipe.targets == "patterns") != bool(recipe.target_patterns):
        raise SettingsError(
            f"targets is '{recipe.targets}' and target_patterns {'set' if recipe.target_patterns else 'empty'}.",
            "Write patterns and choose 'patterns' or 'auto', or leave target_patterns empty.",
            "target_patterns",
        )
    METHODS[recipe.method].check(recipe)


def _check_range(field: str, value: Any, input: str) -> None:
    low, high = _RANGES[field]
    if not low <= value <= high:
        raise SettingsError(f"{field} is {value}.", f"It must lie between {low} and {high}.", input)


def _check_option(kind: str, name: str, value: Any) -> None:
    """Refuses a set field at the node it was set on."""
    field = f"preview_{name}" if kind == "preview" else name
    if field in _RANGES:
        _check_range(field, value, name)
    if (kind, name) == ("run", "name"):
        _check_name(value.strip())
    if name == "target_patterns":
        parse_patterns(value, name)
    if name == "block_ranks":
        parse_pairs(value, int, 0, 4096, name)
    if name == "block_learning_rates":
        parse_pairs(value, float, 0.0, 100.0, name)


def _check_name(name: str) -> None:
    if not name:
        return
    import re

    if not re.fullmatch(r"[\w][\w .-]{0,99}", name) or name.rstrip(". ") != name:
        raise SettingsError(
            f"The run name '{name}' cannot be a folder name.",
            "Use letters, digits, spaces, points, dashes and underscores, and no point or space at the end.",
            "name",
        )
