"""The recipe: everything a run is made with, every default filled in, and which of it names the run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..objective.options import Objective

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
    "weight_dtype": "fp32",
    "loss_spike_factor": 0.0,
}

# What checkpointed blocks compute again.
EVERYTHING = "everything"
ALL_BUT_ATTENTION = "all but attention"
RECOMPUTED = (EVERYTHING, ALL_BUT_ATTENTION)


@dataclass(frozen=True)
class EmbeddingSpec:
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
        weight_dtype: what all weights are trained in, "fp32" or "bf16"; adapters are always in fp32.
        loss_spike_factor: a step whose loss is so many times the usual one is left out; 0 for none.
        offload: "on" to keep frozen weights off the device from the start.
        tensorboard: "on" for event files beside the log.
        preview_every: steps between previews; 0 for the last step alone.
        start_from: an adapter in the host's list, empty for none. What is in it is part of the base it trains on.
        processes: how many train it together on one machine.
        shard: "on" for the frozen weights of blocks in shares, one in each process.
        recompute: what checkpointed blocks compute again, of RECOMPUTED.
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
    weight_dtype: str
    loss_spike_factor: float
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
    offload: str
    start_from: str
    tensorboard: str
    processes: int = 1
    shard: str = "auto"
    recompute: str = EVERYTHING

    @property
    def live_text(self) -> bool:
        """Whether what the text encoder gives changes while training, so that captions are encoded at every step."""
        return bool(self.embedding_name) or self.text_encoder

    @property
    def keeps_attention(self) -> bool:
        """Whether checkpointed blocks keep what attention gives."""
        return self.recompute == ALL_BUT_ATTENTION

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

    def as_json(self) -> dict[str, Any]:
        """All fields, JSON-able."""
        return asdict(self)
