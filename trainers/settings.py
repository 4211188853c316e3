"""What a run is made with: the options as the user set them, and the recipe with every default filled in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .errors import SettingsError
from .methods import METHODS
from .methods.patterns import parse_pairs, parse_patterns
from .objective import options as objective
from .objective.options import Objective, objective_of

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
        "beta1": -1.0,
        "beta2": -1.0,
        "num_cycles": 0,
        "power": 0.0,
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
    "pivotal": {
        "name": "",
        "init_text": "",
        "vectors": 0,
        "learning_rate": 0.0,
        "stop_fraction": 0.0,
    },
    "objective": objective.UNSET,
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
    "embedding_name": "",
    "embedding_init": "",
    "embedding_vectors": 0,
    "embedding_learning_rate": 0.0,
    "embedding_stop": 0.0,
    "embedding_templates": "",
    "objective": {},
    "beta1": 0.9,
    "beta2": 0.999,
    "num_cycles": 1,
    "power": 1.0,
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
class Word:
    """A word to be learnt.

    Attributes:
        name: what follows `embedding:` in prompts.
        init_text: words whose vectors it starts from.
        vectors: how many stand for it in each text encoder.
        learning_rate: 0 for the default.
        stop: fraction of the run at which it is frozen; 0 for never.
        templates: key of `inversion.TEMPLATES`, for pictures without a caption.
    """

    name: str
    init_text: str
    vectors: int
    learning_rate: float = 0.0
    stop: float = 0.0
    templates: str = "object"


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
    embedding_name: str
    embedding_init: str
    embedding_vectors: int
    embedding_learning_rate: float
    embedding_stop: float
    embedding_templates: str
    objective: Objective
    beta1: float
    beta2: float
    num_cycles: int
    power: float
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

    @property
    def live_text(self) -> bool:
        """Whether what the text encoder gives changes while training, so that captions are encoded at every step."""
        return bool(self.embedding_name)

    def deciding(self) -> dict[str, Any]:
        """The fields that decide the result; those that came later only where they are not at their old value."""
        names = [field.name for field in fields(self)]
        values = {name: getattr(self, name) for name in names[: names.index("steps")]}
        values["objective"] = self.objective.set_fields()
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    def identity(self, dataset: str, base: str) -> str:
        """Hash that names the run: recipe, dataset content and base."""
        text = json.dumps([self.deciding(), dataset, base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def summary(self) -> str:
        """What was chosen or filled in, in one line."""
        scale = METHODS[self.method].scale(self.rank, self.alpha)
        strength = "" if scale is None else f"alpha {self.alpha:g} (effective scale {scale:g}), "
        size = f"rank {self.rank}, {strength}on {self.targets}, " if self.rank else ""
        word = ""
        if self.embedding_name:
            start = f"{self.embedding_vectors} vectors from '{self.embedding_init}'"
            word = f"embedding:{self.embedding_name} ({start}, learning rate {self.embedding_learning_rate:g}), "
        return (
            f"{self.method} for {self.family}, {self.optimizer}, learning rate {self.learning_rate:g} {self.schedule}, "
            f"{size}{word}"
            f"batch {self.batch_size} x {self.accumulation}, resolution {self.resolution}, seed {self.seed}"
            + "".join(f", {name} {value}" for name, value in self.objective.set_fields().items())
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
    word: Word | None = None,
) -> Recipe:
    """The recipe of a node's widgets and its options.

    Args:
        learning_rate: 0 for the family's, method's and optimiser's default.
        rank: 0 where the method has none.
        resolution: 0 for the family's own.
        word: that the node itself trains; None for the one of the pivotal options, if there is one.

    Raises:
        SettingsError: a value out of range, or two that contradict each other.
    """
    from .optimisers import OPTIMISERS, default_learning_rate

    get = options.value
    if method == "LoRA":
        # What trains an adapter trains it of the type that was chosen.
        method = get("adapter", "type", method)
    patterns = parse_patterns(get("adapter", "target_patterns", ""), "target_patterns")
    text_encoder = get("adapter", "text_encoder", "off") == "on"
    alone = word is not None
    word = _pivotal(options, alone) or word or Word("", "", 0, stop=0.0, templates="")
    optimizer = get("optimizer", "optimizer", "AdamW")
    optimiser = OPTIMISERS.get(optimizer, OPTIMISERS["AdamW"])
    usual = EMBEDDING_RATE if alone else family.lora_learning_rate
    rate = learning_rate or default_learning_rate(optimizer, usual)
    recipe = Recipe(
        method=method,
        learning_rate=rate,
        rank=rank,
        alpha=float(get("adapter", "alpha", rank)),
        batch_size=batch_size,
        seed=seed,
        resolution=resolution or family.resolution,
        optimizer=optimizer,
        weight_decay=get("optimizer", "weight_decay", optimiser.weight_decay),
        schedule=get("optimizer", "schedule", "constant"),
        warmup_steps=get("optimizer", "warmup_steps", 0),
        accumulation=get("optimizer", "accumulation", 1),
        max_grad_norm=get("optimizer", "max_grad_norm", 1.0),
        ema_decay=get("optimizer", "ema_decay", 0.0),
        validation_fraction=get("run", "validation_fraction", 0.0),
        family=family.name,
        trigger=trigger,
        embedding_name=word.name,
        embedding_init=word.init_text,
        embedding_vectors=word.vectors,
        embedding_learning_rate=_word_rate(word, optimizer, rate, alone),
        embedding_stop=word.stop,
        embedding_templates=word.templates,
        objective=objective_of({name: value for (kind, name), value in options.items() if kind == "objective"}),
        beta1=get("optimizer", "beta1", optimiser.beta1),
        beta2=get("optimizer", "beta2", optimiser.beta2),
        num_cycles=get("optimizer", "num_cycles", 1),
        power=get("optimizer", "power", 1.0),
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
        text_encoder_learning_rate=(get("adapter", "text_encoder_learning_rate", rate) if text_encoder else 0.0),
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


def _pivotal(options: Options, alone: bool) -> Word | None:
    """The word of the pivotal options, None when none is set.

    Raises:
        SettingsError: they say how, but not which; or the node trains a word of its own.
    """
    fields = {name for kind, name in options if kind == "pivotal"}
    if not fields:
        return None
    if alone:
        raise SettingsError(
            "Graft Pivotal Options are for a trainer of the model, beside which they train a word.",
            "Take them out: this node trains its own word.",
            "options",
        )
    get = options.value
    name = get("pivotal", "name", "").strip()
    if not name:
        raise SettingsError(
            "Graft Pivotal Options say how to train a word, but not its name.", "Set name there.", "options"
        )
    return Word(
        name,
        get("pivotal", "init_text", "").strip(),
        get("pivotal", "vectors", 2),
        get("pivotal", "learning_rate", 0.0),
        get("pivotal", "stop_fraction", 0.5),
    )


def _word_rate(word: Word, optimizer: str, rate: float, alone: bool) -> float:
    """The learning rate of a word's vectors, 0 without a word.

    Args:
        rate: of the recipe; the word's too where it is trained alone, or where the optimiser finds its rate itself.
    """
    from .optimisers import default_learning_rate

    if not word.name:
        return 0.0
    if alone or finds_its_rate(optimizer):
        return word.learning_rate or rate
    return word.learning_rate or default_learning_rate(optimizer, EMBEDDING_RATE)


def finds_its_rate(optimizer: str) -> bool:
    """Whether an optimiser's learning rate is a factor on one that it finds itself (Prodigy)."""
    from .optimisers import default_learning_rate

    return default_learning_rate(optimizer, 0.0) > 0


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


# Of words' vectors (FIELD's consensus for textual inversion); without the weight decay of the rest.
EMBEDDING_RATE = 5e-4

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
    "beta1": (0.0, 0.99999),
    "beta2": (0.0, 0.999999),
    "num_cycles": (1, 10_000),
    "power": (0.01, 100.0),
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
    "embedding_vectors": (1, 64),
    "embedding_learning_rate": (1e-12, 100.0),
    "embedding_stop": (0.0, 1.0),
    "alpha": (1e-4, 1e6),
    "dropout": (0.0, 0.95),
    "lora_plus_ratio": (1e-3, 1e4),
    "text_encoder_rank": (0, 4096),
    "text_encoder_learning_rate": (0.0, 100.0),
}

# The fields of a word, by the recipe's names, and the inputs they are set by.
_WORD = {"embedding_vectors": "vectors", "embedding_learning_rate": "learning_rate", "embedding_stop": "stop_fraction"}


def _check(recipe: Recipe) -> None:
    from .optimisers import OPTIMISERS, SCHEDULES

    for field, known in (("method", METHODS), ("optimizer", OPTIMISERS), ("schedule", SCHEDULES)):
        if getattr(recipe, field) not in known:
            raise SettingsError(
                f"Unknown {field} '{getattr(recipe, field)}'.", f"Choose one of {', '.join(known)}.", field
            )
    absent = set() if METHODS[recipe.method].ranked else {"rank", "alpha"}
    absent |= set() if recipe.embedding_name else set(_WORD)
    for field in [field for field in _RANGES if field not in absent]:
        # The resolution is a widget of the dataset's node, which this one knows by the wire it came over.
        _check_range(field, getattr(recipe, field), "dataset" if field == "resolution" else _WORD.get(field, field))
    _check_name(recipe.name)
    OPTIMISERS[recipe.optimizer].check(recipe)
    if recipe.embedding_name and recipe.optimizer == "AdamWScheduleFree":
        raise SettingsError(
            "AdamWScheduleFree cannot train a word: the norms of its vectors are kept, and its averages are not.",
            "Choose another optimizer in Graft Optimizer Options, such as AdamW.",
            "optimizer",
        )
    for field, schedule, plain in (("num_cycles", "cosine with restarts", 1), ("power", "polynomial", 1.0)):
        if getattr(recipe, field) != plain and recipe.schedule != schedule:
            raise SettingsError(
                f"{field} is set, but schedule is {recipe.schedule}: it would have no effect.",
                f"In Graft Optimizer Options set schedule to {schedule}, or leave {field} alone.",
                field,
            )
    if (recipe.targets == "patterns") != bool(recipe.target_patterns):
        raise SettingsError(
            f"targets is '{recipe.targets}' and target_patterns {'set' if recipe.target_patterns else 'empty'}.",
            "Write patterns and choose 'patterns' or 'auto', or leave target_patterns empty.",
            "target_patterns",
        )
    METHODS[recipe.method].check(recipe)
    if recipe.text_encoder:
        raise SettingsError(
            "Training the text encoder is not there yet.",
            "Set text_encoder to off or auto in Graft Adapter Options; Graft Pivotal Options train a word for it.",
            "text_encoder",
        )


def _check_range(field: str, value: Any, input: str) -> None:
    low, high = _RANGES[field]
    if not low <= value <= high:
        raise SettingsError(f"{field} is {value}.", f"It must lie between {low} and {high}.", input)


def _check_option(kind: str, name: str, value: Any) -> None:
    """Refuses a set field at the node it was set on."""
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
        from .inversion import check_name

        check_name(value.strip())
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
