"""Recipes from user settings: chained option nodes, and defaults for the options that the user leaves alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from ..methods import METHODS, Method
from ..methods.patterns import parse_pairs, parse_patterns
from ..methods.textual_inversion import EMBEDDING_RATE
from ..objective import options as objective
from ..objective.options import objective_of
from ..optimizers import OPTIMIZERS, default_learning_rate, finds_its_rate
from ..recipe.recipe import EVERYTHING, EmbeddingSpec, Recipe
from .validation import check_option, check_recipe

if TYPE_CHECKING:
    from ..families import Family

# Each option's value for "not set". Family, method and optimizer then decide.
UNSET: dict[str, dict[str, Any]] = {
    "run": {
        "name": "",
        "on_existing": "auto",
        "save_every": 0,
        "keep_last": 0,
        "validation_fraction": 0.0,
        "validate_every": 0,
        "gradient_check": "auto",
        "tensorboard": "auto",
        "processes": 0,
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
        "loss_spike_factor": 0.0,
    },
    "memory": {
        "checkpointing": "auto",
        "compute_dtype": "auto",
        "micro_batch": 0,
        "offload": "auto",
        "shard": "auto",
        "recompute": "auto",
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
        "weight_dtype": "auto",
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

# The layers that get an adapter.
TARGETS = ("attention", "attention + feed-forward", "all linear", "linear + conv", "patterns")


class Options(dict):
    """Options that the user has set, as {(kind, field): value}. Option nodes chain them."""

    def adding(self, kind: str, values: dict[str, Any]) -> Options:
        """Return these options with a node's set fields on top. The node nearest the trainer wins.

        Raises:
            SettingsError: the kind has no such field, or a value is out of range.
        """
        merged = Options(self)
        for name, value in values.items():
            if name not in UNSET[kind]:
                raise SettingsError(f"There is no {kind} option '{name}'.", f"Known options: {', '.join(UNSET[kind])}.")
            if value != UNSET[kind][name]:
                check_option(kind, name, value)
                merged[(kind, name)] = value
        return merged

    def value(self, kind: str, name: str, default: Any) -> Any:
        """Return the field's value if it is set, else the default."""
        return self.get((kind, name), default)


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
    word: EmbeddingSpec | None = None,
) -> Recipe:
    """Build the recipe from a node's widgets and its options.

    Args:
        learning_rate: 0 for the default of family, method and optimizer.
        rank: ignored if the method has no rank.
        resolution: 0 for the family's default.
        word: the embedding that the node itself trains; None for the embedding of the pivotal options, if any.

    Raises:
        SettingsError: a value is out of range, or two values contradict each other.
    """
    get = options.value
    if method == "LoRA":
        # The node trains an adapter: the adapter options choose its type.
        method = get("adapter", "type", method)
    kind = METHODS.get(method, Method())
    if not kind.ranked:
        rank = 0
    if kind.in_backward and ("adapter", "type") in options:
        raise SettingsError(
            "type is set, but this node trains all weights, not an adapter: it would have no effect.",
            "Leave type unset in Graft Adapter Options, or train a LoRA.",
            "type",
        )
    patterns = parse_patterns(get("adapter", "target_patterns", ""), "target_patterns")
    text_encoder = _trains_text_encoder(options)
    alone = word is not None
    word = _pivotal(options, alone) or word or EmbeddingSpec("", "", 0, stop=0.0, templates="")
    optimizer = get("optimizer", "optimizer", "AdamW")
    optimizer_kind = OPTIMIZERS.get(optimizer, OPTIMIZERS["AdamW"])
    usual = EMBEDDING_RATE if alone else kind.usual_rate(family)
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
        weight_decay=get("optimizer", "weight_decay", optimizer_kind.weight_decay),
        schedule=get("optimizer", "schedule", "constant"),
        warmup_steps=get("optimizer", "warmup_steps", 0),
        accumulation=get("optimizer", "accumulation", 1),
        max_grad_norm=get("optimizer", "max_grad_norm", kind.max_grad_norm),
        ema_decay=get("optimizer", "ema_decay", 0.0 if optimizer_kind.averages else kind.ema_decay),
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
        beta1=get("optimizer", "beta1", optimizer_kind.beta1),
        beta2=get("optimizer", "beta2", optimizer_kind.beta2),
        num_cycles=get("optimizer", "num_cycles", 1),
        power=get("optimizer", "power", 1.0),
        # `check_recipe` refuses an unknown method and lists the known ones.
        targets=get("adapter", "targets", "patterns" if patterns else kind.default_targets),
        target_patterns=patterns,
        dropout=get("adapter", "dropout", 0.0),
        block_ranks=parse_pairs(get("adapter", "block_ranks", ""), int, 0, 4096, "block_ranks"),
        block_learning_rates=parse_pairs(
            get("adapter", "block_learning_rates", ""), float, 0.0, 100.0, "block_learning_rates"
        ),
        lora_plus_ratio=get("adapter", "lora_plus_ratio", 1.0),
        weight_dtype=get("adapter", "weight_dtype", "fp32"),
        loss_spike_factor=get("optimizer", "loss_spike_factor", 0.0),
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
        offload=get("memory", "offload", "auto"),
        start_from=get("adapter", "start_from", ""),
        tensorboard=get("run", "tensorboard", "off"),
        processes=get("run", "processes", 1),
        shard=get("memory", "shard", "auto"),
        recompute=get("memory", "recompute", EVERYTHING),
    )
    check_recipe(recipe)
    return recipe


def _trains_text_encoder(options: Options) -> bool:
    """Report whether the text encoder is trained too.

    Raises:
        SettingsError: text encoder options are set, but `text_encoder` is off.
    """
    wanted = options.value("adapter", "text_encoder", "off") == "on"
    for name in ("text_encoder_rank", "text_encoder_learning_rate"):
        if not wanted and ("adapter", name) in options:
            raise SettingsError(
                f"{name} is set, but text_encoder is off: it would have no effect.",
                f"In Graft Adapter Options set text_encoder to on, or leave {name} unset.",
                name,
            )
    return wanted


def _pivotal(options: Options, alone: bool) -> EmbeddingSpec | None:
    """Return the embedding of the pivotal options; None if none of them is set.

    Args:
        alone: the node trains its own embedding, and nothing else.

    Raises:
        SettingsError: the options have no name, or the node trains its own embedding.
    """
    fields = {name for kind, name in options if kind == "pivotal"}
    if not fields:
        return None
    if alone:
        raise SettingsError(
            "Graft Pivotal Options add an embedding to the training of a model, and this node trains no model.",
            "Remove them from this node's options: it trains its own embedding.",
            "options",
        )
    get = options.value
    name = get("pivotal", "name", "").strip()
    if not name:
        raise SettingsError(
            "Graft Pivotal Options have no name for the embedding.", "Set name in Graft Pivotal Options.", "options"
        )
    return EmbeddingSpec(
        name,
        get("pivotal", "init_text", "").strip(),
        get("pivotal", "vectors", 2),
        get("pivotal", "learning_rate", 0.0),
        get("pivotal", "stop_fraction", 0.5),
    )


def _word_rate(word: EmbeddingSpec, optimizer: str, rate: float, alone: bool) -> float:
    """Return the learning rate of the embedding's vectors; 0 without an embedding.

    Args:
        rate: the recipe's learning rate. It is also the embedding's default if the embedding is trained alone, or if
            the optimizer finds its learning rate itself.
    """
    if not word.name:
        return 0.0
    if alone or finds_its_rate(optimizer):
        return word.learning_rate or rate
    return word.learning_rate or default_learning_rate(optimizer, EMBEDDING_RATE)


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())
