"""All options of a run, each declared once: unset value, range or choices, default, part in the run's identity.

Recipe, defaults, validation, identity and widgets follow from this table. The options of the objective are declared
likewise in `objective/options.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..families import TARGET_PRESETS
from ..objective.options import NATIVE, OBJECTIVE_OPTIONS, Objective
from ..option import Option, option, options_of
from .parsing import check_run_name, is_on, parse_arguments, parse_pairs, parse_patterns, parse_points, parse_prompts
from .presets import PRESETS

if TYPE_CHECKING:
    from ..families import Family

# Values of `recompute`.
EVERYTHING = "everything"
ALL_BUT_ATTENTION = "all but attention"
RECOMPUTED = (EVERYTHING, ALL_BUT_ATTENTION)

# Values of `base_dtype`.
AS_IT_IS = "as it is"
# Values of `shard` that shard the weights.
HYBRID = "hybrid"
SHARDED = ("on", HYBRID)
FP8, INT8, NF4 = BASE_DTYPES = ("fp8 (scaled)", "int8", "nf4")

# Values of `prompt_node`: ComfyUI's node that reads the text alone, and the nodes that show source pictures to the text
# encoder, with the largest number of pictures that each takes.
TEXT_ALONE = "CLIPTextEncode"
PROMPT_NODES = {
    "TextEncodeQwenImageEdit": 1,
    "TextEncodeQwenImageEditPlus": 3,
    "TextEncodeBooguEdit": 16,
    "TextEncodeJoyImageEdit": 6,
    "TextEncodeMageFlowEdit": 16,
}

# Values of `communication`.
EXACT = "exact"
HALF = "bf16"

# The layers that get an adapter. Full fine-tuning also knows ALL_WEIGHTS, its default.
TARGETS = ("attention", "attention + feed-forward", "all linear", "linear + conv", "patterns", *TARGET_PRESETS)
ALL_WEIGHTS = "all weights"

# Value of `stop_when`.
STOPS_FALLING = "validation stops falling"

# Values of `give_way`.
GIVE_WAY_OFF = "off"
GIVE_WAY_EVERYTHING = "to everything"
GIVE_WAY_SHORT = "to short prompts"
GIVE_WAY = (GIVE_WAY_OFF, GIVE_WAY_EVERYTHING, GIVE_WAY_SHORT)

# Schedules that fall, and so may end above 0.
FALLING = (
    *("linear", "cosine", "cosine with restarts", "polynomial", "REX", "warmup-stable-decay"),
    "inverse square root",
)

_STEPS = (1, 10_000_000)
_RATE = (1e-12, 100.0)


class MethodDefaults(Protocol):
    """Defaults of a training method, see `methods.Method`."""

    default_targets: str
    max_grad_norm: float
    ema_decay: float


class OptimizerDefaults(Protocol):
    """Defaults of an optimizer, see `optimizers.registry.Optimizer`."""

    weight_decay: float
    beta1: float
    beta2: float
    averages: bool


@dataclass(frozen=True)
class Basis:
    """Basis of the defaults: what they depend on.

    Attributes:
        learning_rate: the default of family, method and optimizer.
        embedding_learning_rate: the default for an embedding beside or in place of the method.
        settled: the recipe's fields that are set or have a default already: all that are declared above.
    """

    family: Family
    method: MethodDefaults
    optimizer: OptimizerDefaults
    learning_rate: float
    embedding_learning_rate: float
    settled: Mapping[str, Any]


# `Recipe` has the methods: to build those of so many fields twice would delay ComfyUI's start.
@dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)
class RecipeOptions:
    """Fields of a recipe, with the declarations of the options that set them.

    Attributes:
        targets: one of TARGETS or ALL_WEIGHTS; with "patterns", the layers that match `target_patterns`.
        block_ranks, block_learning_rates: (pattern, value) pairs; the first pattern found in a layer's path applies.
        lora_plus_ratio: learning rate of B divided by that of A.
        text_encoder_rank, text_encoder_learning_rate: 0 if no text encoder is trained.
        adapter_args: (name, value) of the type's further arguments, see `methods.arguments`.
        weight_dtype: dtype of full training, "fp32" or "bf16"; adapters always train in fp32.
        loss_spike_factor: skip a step whose loss is this many times the usual loss; 0 skips none.
        offload: "on" to offload frozen weights from the start.
        tensorboard: "on" to write TensorBoard event files next to the log.
        tag_frequency: "on" to write the captions' tags into the metadata of the saved files.
        preview_every: steps between previews; 0 draws them only after the last step.
        preview_strength: strength of the adapter in previews on another model.
        start_from: an adapter in the host's list, empty for none. Its weights become part of the base model.
        processes: number of processes on one machine that train together.
        preference_beta: how far a preference may lead away from the base (less for higher values); 0 for no preference.
        slider_prompts: (target, positive, negative) of a slider that is trained without pictures.
        slider_anchors: prompts whose predictions a slider keeps.
        slider_strength: strength s of the adapter at which a slider is trained, at +s and -s; 0 for no slider.
        prompt_node: the host's node that encodes the captions, TEXT_ALONE or one of PROMPT_NODES.
        first_frame_probability: part of a clip's visits whose first frame gets no noise, for image to video.
        shard: "on" to shard the frozen weights of blocks over the processes, HYBRID to shard them over those of a
            machine.
        recompute: part of checkpointed blocks that the backward recomputes, one of RECOMPUTED.
        compile: "on" to compile the denoiser's repeated blocks.
        base_dtype: format to which the denoiser's linear weights are quantized, AS_IT_IS or one of BASE_DTYPES.
        keep_best: "on" to keep the files of the step with the lowest validation loss.
        stop_when: STOPS_FALLING to end the run early, "off" to train all steps.
        patience: number of validations without a new lowest loss after which the run ends.
        communication: how several processes send gradients: EXACT, or HALF for bfloat16.
        preset: the preset that has filled unset fields, see `presets`; empty for none.
        give_way: prompts for which the host pauses the training, one of GIVE_WAY; "auto" for the host's setting.
    """

    method: str = option("adapter", input="type", unset="auto", choices="methods", offered="adapters", default="LoRA")
    learning_rate: float = option(unset=0.0, range=_RATE, default=lambda basis: basis.learning_rate)
    rank: int = option(range=(1, 4096))
    alpha: float = option(
        "adapter", unset=0.0, range=(1e-4, 1e6), default=lambda basis: float(basis.settled["rank"]), parse=float
    )
    batch_size: int = option(range=(1, 4096))
    seed: int = option()
    # The dataset node has the widget of the resolution.
    resolution: int = option(
        unset=0, range=(8, 16384), default=lambda basis: basis.family.resolution, trainer_input="dataset"
    )
    optimizer: str = option("optimizer", unset="auto", choices="optimizers", default="AdamW")
    weight_decay: float = option(
        "optimizer", unset=-1.0, range=(0.0, 10.0), default=lambda basis: basis.optimizer.weight_decay
    )
    schedule: str = option("optimizer", unset="auto", choices="schedules", default="constant")
    warmup_steps: int = option("optimizer", unset=-1, range=(0, 10_000_000), default=0)
    accumulation: int = option("optimizer", unset=0, range=(1, 4096), default=1)
    max_grad_norm: float = option(
        "optimizer", unset=-1.0, range=(0.0, 1e6), default=lambda basis: basis.method.max_grad_norm
    )
    ema_decay: float = option(
        "optimizer",
        unset=-1.0,
        range=(0.0, 0.99999),
        default=lambda basis: 0.0 if basis.optimizer.averages else basis.method.ema_decay,
    )
    validation_fraction: float = option("run", unset=0.0, range=(0.0, 0.9), default=0.0)
    family: str = option()
    trigger: str = option()
    target_patterns: tuple[str, ...] = option(
        "adapter", unset="", default=(), parse=lambda text: parse_patterns(text, "target_patterns"), before=()
    )
    targets: str = option(
        "adapter",
        unset="auto",
        choices=(*TARGETS, ALL_WEIGHTS),
        offered=TARGETS,
        default=lambda basis: "patterns" if basis.settled["target_patterns"] else basis.method.default_targets,
        before="attention",
    )
    dropout: float = option("adapter", unset=0.0, range=(0.0, 0.95), default=0.0, before=0.0)
    block_ranks: tuple[tuple[str, int], ...] = option(
        "adapter", unset="", default=(), parse=lambda text: parse_pairs(text, int, 0, 4096, "block_ranks"), before=()
    )
    block_learning_rates: tuple[tuple[str, float], ...] = option(
        "adapter",
        unset="",
        default=(),
        parse=lambda text: parse_pairs(text, float, 0.0, 100.0, "block_learning_rates"),
        before=(),
    )
    lora_plus_ratio: float = option("adapter", unset=0.0, range=(1e-3, 1e4), default=1.0, before=1.0)
    text_encoder: bool = option(
        "adapter", unset="auto", choices=("on", "off"), default=False, parse=is_on, before=False
    )
    text_encoder_rank: int = option(
        "adapter",
        unset=0,
        range=(0, 4096),
        top=1024,
        default=lambda basis: basis.settled["rank"] if basis.settled["text_encoder"] else 0,
        before=0,
    )
    text_encoder_learning_rate: float = option(
        "adapter",
        unset=0.0,
        range=(0.0, 100.0),
        top=10.0,
        default=lambda basis: basis.settled["learning_rate"] if basis.settled["text_encoder"] else 0.0,
        before=0.0,
    )
    embedding_name: str = option("pivotal", input="name", unset="", parse=str.strip, default="", before="")
    embedding_init: str = option("pivotal", input="init_text", unset="", parse=str.strip, default="", before="")
    embedding_vectors: int = option(
        "pivotal", input="vectors", unset=0, range=(1, 64), default=2, before=0, trainer_input="vectors"
    )
    embedding_learning_rate: float = option(
        "pivotal",
        input="learning_rate",
        unset=0.0,
        range=_RATE,
        top=10.0,
        default=lambda basis: basis.embedding_learning_rate,
        before=0.0,
        trainer_input="learning_rate",
    )
    embedding_stop: float = option(
        "pivotal",
        input="stop_fraction",
        unset=0.0,
        range=(0.0, 1.0),
        default=0.5,
        before=0.0,
        trainer_input="stop_fraction",
    )
    embedding_templates: str = option(default="object", before="")
    objective: Objective = option(before=NATIVE)
    beta1: float = option(
        "optimizer", unset=-1.0, range=(0.0, 0.99999), default=lambda basis: basis.optimizer.beta1, before=0.9
    )
    beta2: float = option(
        "optimizer", unset=-1.0, range=(0.0, 0.999999), default=lambda basis: basis.optimizer.beta2, before=0.999
    )
    num_cycles: int = option(
        "optimizer", unset=0, range=(1, 10_000), default=1, before=1, needs=("schedule", ("cosine with restarts",))
    )
    power: float = option(
        "optimizer", unset=0.0, range=(0.01, 100.0), default=1.0, before=1.0, needs=("schedule", ("polynomial",))
    )
    warmup_ratio: float = option("optimizer", unset=0.0, range=(0.0, 1.0), default=0.0, before=0.0)
    min_lr_ratio: float = option(
        "optimizer", unset=0.0, range=(0.0, 1.0), default=0.0, before=0.0, needs=("schedule", FALLING)
    )
    decay_ratio: float = option(
        "optimizer",
        unset=0.0,
        range=(0.0, 1.0),
        default=0.2,
        before=0.2,
        needs=("schedule", ("warmup-stable-decay",)),
    )
    schedule_points: tuple[tuple[int, float], ...] = option(
        "optimizer", unset="", parse=parse_points, default=(), before=(), needs=("schedule", ("points",))
    )
    optimizer_args: tuple[tuple[str, Any], ...] = option(
        "optimizer", unset="", parse=parse_arguments, default=(), before=()
    )
    adapter_args: tuple[tuple[str, Any], ...] = option(
        "adapter", unset="", parse=lambda text: parse_arguments(text, "adapter_args"), default=(), before=()
    )
    weight_dtype: str = option("adapter", unset="auto", choices=("fp32", "bf16"), default="fp32", before="fp32")
    loss_spike_factor: float = option("optimizer", unset=0.0, range=(0.0, 1e6), default=0.0, before=0.0)
    preference_beta: float = option(range=(0.0, 1e6), default=0.0, before=0.0, trainer_input="beta")
    slider_prompts: tuple[tuple[str, str, str], ...] = option(default=(), before=())
    slider_anchors: tuple[str, ...] = option(default=(), before=())
    slider_strength: float = option(range=(0.0, 10.0), default=0.0, before=0.0, trainer_input="strength")
    prompt_node: str = option("run", unset="auto", choices=tuple(PROMPT_NODES), default=TEXT_ALONE, before=TEXT_ALONE)
    base_dtype: str = option(
        "memory", unset="auto", choices=(AS_IT_IS, *BASE_DTYPES), default=AS_IT_IS, before=AS_IT_IS
    )
    first_frame_probability: float = option("run", unset=0.0, range=(0.0, 1.0), default=0.0, before=0.0)
    communication: str = option("run", unset="auto", choices=(EXACT, HALF), default=EXACT, before=EXACT)

    # The fields below do not affect the result: a run may continue with other values.
    steps: int = option(range=_STEPS, decides=False)
    name: str = option("run", unset="", default="", parse=str.strip, check=check_run_name, decides=False)
    on_existing: str = option(
        "run", unset="auto", choices=("resume", "start over", "new"), default="resume", decides=False
    )
    save_every: int = option("run", unset=0, range=_STEPS, default=500, decides=False)
    keep_last: int = option("run", unset=0, range=(1, 10_000), default=2, decides=False)
    validate_every: int = option("run", unset=0, range=_STEPS, default=50, decides=False)
    gradient_check: str = option("run", unset="auto", choices=("on", "off"), default="auto", decides=False)
    preview_prompts: tuple[str, ...] = option(
        "preview", input="prompts", unset="", parse=parse_prompts, default=(), decides=False
    )
    preview_every: int = option("preview", input="every", unset=0, range=(0, 10_000_000), default=100, decides=False)
    preview_steps: int = option("preview", input="steps", unset=0, range=(1, 1000), default=20, decides=False)
    preview_cfg: float = option(
        "preview",
        input="cfg",
        unset=0.0,
        range=(0.0, 1000.0),
        top=100.0,
        default=lambda basis: basis.family.preview_cfg,
        decides=False,
    )
    # The host lists the samplers, the schedulers and the adapters to start from.
    preview_sampler: str = option("preview", input="sampler_name", unset="auto", default="euler", decides=False)
    preview_scheduler: str = option(
        "preview",
        input="scheduler",
        unset="auto",
        default=lambda basis: basis.family.preview_scheduler,
        decides=False,
    )
    preview_seed: int = option("preview", input="seed", unset=-1, range=(0, 2**64 - 1), default=0, decides=False)
    checkpointing: str = option("memory", unset="auto", choices=("on", "off"), default="auto", decides=False)
    compute_dtype: str = option("memory", unset="auto", choices=("fp32", "bf16", "fp16"), default="auto", decides=False)
    micro_batch: int = option("memory", unset=0, range=(0, 4096), default=0, decides=False)
    offload: str = option("memory", unset="auto", choices=("on", "off"), default="auto", decides=False)
    # The content of the file counts as part of the base model.
    start_from: str = option("adapter", unset="auto", default="", decides=False)
    tensorboard: str = option("run", unset="auto", choices=("on", "off"), default="off", decides=False)
    processes: int = option("run", unset=0, range=(1, 1024), top=64, default=1, before=1, decides=False)
    shard: str = option(
        "memory", unset="auto", choices=("on", "off", HYBRID), default="auto", before="auto", decides=False
    )
    recompute: str = option(
        "memory", unset="auto", choices=RECOMPUTED, default=EVERYTHING, before=EVERYTHING, decides=False
    )
    preview_negative: str = option(
        "preview", input="negative_prompt", unset="", parse=str.strip, default="", before="", decides=False
    )
    compile: str = option("memory", unset="auto", choices=("on", "off"), default="off", before="off", decides=False)
    keep_best: str = option("run", unset="auto", choices=("on", "off"), default="off", before="off", decides=False)
    stop_when: str = option(
        "run", unset="auto", choices=("off", STOPS_FALLING), default="off", before="off", decides=False
    )
    patience: int = option(
        "run",
        unset=0,
        range=(1, 10_000),
        default=5,
        before=5,
        decides=False,
        needs=("stop_when", (STOPS_FALLING,)),
    )
    tag_frequency: str = option("run", unset="auto", choices=("on", "off"), default="off", before="off", decides=False)
    preview_strength: float = option(
        "preview", input="strength", unset=1.0, range=(-100.0, 100.0), default=1.0, before=1.0, decides=False
    )
    preset: str = option("adapter", unset="auto", choices=tuple(PRESETS), default="", before="", decides=False)
    give_way: str = option("run", unset="auto", choices=GIVE_WAY, default="auto", before="auto", decides=False)


# Options by the recipe's field.
RECIPE_OPTIONS: dict[str, Option] = options_of(RecipeOptions)

# Options by option node and by the name of the node's input.
OPTIONS: dict[str, dict[str, Option]] = {
    node: {entry.input: entry for entry in declared.values() if entry.node == node}
    for declared, nodes in (
        (RECIPE_OPTIONS, ("run", "preview", "optimizer", "memory", "adapter", "pivotal")),
        (OBJECTIVE_OPTIONS, ("objective",)),
    )
    for node in nodes
}
# Each node with fields that presets fill offers them.
for _node in ("optimizer", "memory", "objective"):
    OPTIONS[_node]["preset"] = RECIPE_OPTIONS["preset"]
