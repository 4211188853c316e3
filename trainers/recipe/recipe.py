"""Recipe: all settings of a run with every default filled in, and the run identity that follows from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..objective.options import Objective

# Fields added after the first release that affect the result, each with the value that reproduces older behavior.
# A field with that value is left out of the run's identity, so that Graft still finds older runs.
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

# Values of `Recipe.recompute`.
EVERYTHING = "everything"
ALL_BUT_ATTENTION = "all but attention"
RECOMPUTED = (EVERYTHING, ALL_BUT_ATTENTION)


@dataclass(frozen=True)
class EmbeddingSpec:
    """Settings of an embedding to train.

    Attributes:
        name: name after `embedding:` in prompts.
        init_text: text whose token vectors initialize the embedding.
        vectors: number of vectors in each text encoder.
        learning_rate: 0 for the default.
        stop: fraction of the run after which the embedding is frozen; 0 for never.
        templates: key of `textual_inversion.TEMPLATES`, for pictures without a caption.
    """

    name: str
    init_text: str
    vectors: int
    learning_rate: float = 0.0
    stop: float = 0.0
    templates: str = "object"


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Fields that affect its result make up `identity`; the others may change on resume.

    Attributes:
        targets: one of TARGETS; with "patterns", the layers that match `target_patterns`.
        block_ranks, block_learning_rates: (pattern, value) pairs; the first pattern found in a layer's path applies.
        lora_plus_ratio: learning rate of B divided by that of A.
        text_encoder_rank, text_encoder_learning_rate: 0 if no text encoder is trained.
        weight_dtype: dtype of full training, "fp32" or "bf16"; adapters always train in fp32.
        loss_spike_factor: skip a step whose loss is this many times the usual loss; 0 skips none.
        offload: "on" to offload frozen weights from the start.
        tensorboard: "on" to write TensorBoard event files next to the log.
        preview_every: steps between previews; 0 draws them only after the last step.
        start_from: an adapter in the host's list, empty for none. Its weights become part of the base model.
        processes: number of processes on one machine that train together.
        shard: "on" to shard the frozen weights of blocks over the processes.
        recompute: part of checkpointed blocks that the backward recomputes, one of RECOMPUTED.
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
    # The fields below do not affect the result.
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
        """Return True if training changes the text encoder's output, so that every step must encode its captions."""
        return bool(self.embedding_name) or self.text_encoder

    @property
    def keeps_attention(self) -> bool:
        """Return True if checkpointed blocks keep the outputs of attention."""
        return self.recompute == ALL_BUT_ATTENTION

    def deciding(self) -> dict[str, Any]:
        """Return the fields that affect the result, without fields of LATER that have their old value."""
        names = [field.name for field in fields(self)]
        values = {name: getattr(self, name) for name in names[: names.index("steps")]}
        values["objective"] = self.objective.set_fields()
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    def identity(self, dataset: str, base: str) -> str:
        """Return the run's identity: the SHA-256 of the deciding fields, the dataset and the base model.

        Args:
            dataset: hash of the dataset's content.
            base: hash of the base model.
        """
        text = json.dumps([self.deciding(), dataset, base], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return all fields as JSON-compatible values."""
        return asdict(self)
