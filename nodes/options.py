"""Option nodes: settings that most users never touch, chained in front of a trainer."""

from __future__ import annotations

from comfy_api.latest import io

from ..trainers.engine.resolve import TARGETS
from ..trainers.methods import ADAPTERS
from ..trainers.objective.losses import HUBER_SCHEDULES, LOSSES
from ..trainers.objective.timesteps import TIMESTEPS
from ..trainers.objective.weighting import WEIGHTINGS
from ..trainers.optimizers import OPTIMIZERS, SCHEDULES
from ..trainers.recipe.recipe import RECOMPUTED
from .checks import checked
from .host import paths
from .host.model.sampling import SAMPLERS, SCHEDULERS
from .inputs import TOP_SEED
from .option_fields import OptionNode, auto, count, number, option_schema, rules
from .schema import advanced


class GraftRunOptions(OptionNode):
    """Node that sets name, saves and validation of a run."""

    kind = "run"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftRunOptions",
            "Graft Run Options",
            ["save every", "checkpoints", "validation", "resume"],
            "Names a run, and sets how often it is saved and validated. Untouched fields change nothing.",
            [
                io.String.Input("name", default="", tooltip="Name of the run's folder. Empty: the dataset's name."),
                auto(
                    "on_existing",
                    ["resume", "start over", "new"],
                    "What to do if the same run exists already. auto: resume it, or return it if it is finished.",
                ),
                count("save_every", "Steps between saves of the adapter and of the state for a resume. 0: 500."),
                count("keep_last", "Number of saves to keep. 0: 2.", top=10_000),
                number(
                    "validation_fraction",
                    "Fraction of the pictures held out from training, to measure with. 0: none.",
                    0.0,
                    0.9,
                    0.01,
                ),
                count("validate_every", "Steps between measurements on the held-out pictures. 0: 50."),
                advanced(
                    auto(
                        "gradient_check",
                        ["on", "off"],
                        "Compare the gradient with finite differences before step 1. auto: only for models that Graft "
                        "has no description of.",
                    )
                ),
            ],
            (
                auto(
                    "tensorboard",
                    ["on", "off"],
                    "Also write TensorBoard's event files. This needs the Python package tensorboard. auto: off.",
                ),
                advanced(
                    count(
                        "processes",
                        "Number of processes on this machine, one per GPU. batch_size counts the pictures of all "
                        "together. 0: 1.",
                        top=64,
                    )
                ),
            ),
        )

    validate_inputs = checked(
        **rules("run", "name", "validation_fraction"), on_existing=None, gradient_check=None, tensorboard=None
    )


class GraftPreviewOptions(OptionNode):
    """Node that sets the preview images during training."""

    kind = "preview"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftPreviewOptions",
            "Graft Preview Options",
            ["sample images", "preview while training", "samples"],
            "Draws sample pictures during training, the first ones before step 1. Without prompts it draws none "
            "during training.",
            [
                io.String.Input("prompts", default="", multiline=True, tooltip="One prompt per line."),
                count("every", "Steps between drawings. 0: 100."),
                count("steps", "Sampling steps. 0: 20.", top=1000),
                number("cfg", "Guidance. 0: the default of the model's family.", 0.0, 100.0, 0.1),
                auto("sampler_name", list(SAMPLERS), "auto: euler."),
                auto("scheduler", list(SCHEDULERS), "auto: the default of the model's family."),
                io.Int.Input(
                    "seed",
                    default=-1,
                    min=-1,
                    max=TOP_SEED,
                    control_after_generate=False,
                    tooltip="Noise of the first picture. -1: 0.",
                ),
            ],
            words="Samples",
        )

    validate_inputs = checked(**rules("preview", "prompts", "cfg"), sampler_name=None, scheduler=None)


class GraftOptimizerOptions(OptionNode):
    """Node that sets optimizer, schedule, gradient accumulation and clipping."""

    kind = "optimizer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftOptimizerOptions",
            "Graft Optimizer Options",
            ["optimiser", "adamw", "prodigy", "adafactor", "lr scheduler", "ema"],
            "Sets the optimizer, the learning-rate schedule, accumulation and clipping. Untouched fields change "
            "nothing.",
            [
                auto(
                    "optimizer",
                    list(OPTIMIZERS),
                    "auto: AdamW. Most others need a Python package; if it is missing, the error names it.",
                ),
                number(
                    "weight_decay",
                    "Pulls the weights towards zero. -1: the optimizer's own, 0.01 for AdamW.",
                    -1.0,
                    10.0,
                    0.001,
                ),
                auto("schedule", list(SCHEDULES), "Course of the learning rate over the steps. auto: constant."),
                count("warmup_steps", "Steps at the start in which the learning rate rises. -1: none.", unset=-1),
                count("accumulation", "Batches per training step. 0: 1.", top=4096),
                number("max_grad_norm", "Clips longer gradients to this norm; 0 never clips. -1: 1.", -1.0, 1e6, 0.1),
                number(
                    "ema_decay",
                    "Moving average of the weights, such as 0.999; 0: none. -1: none.",
                    -1.0,
                    0.99999,
                    0.001,
                ),
            ],
            (
                advanced(
                    number("beta1", "Decay of the momentum. -1: the optimizer's own, mostly 0.9.", -1.0, 0.99999, 0.001)
                ),
                advanced(
                    number(
                        "beta2",
                        "Decay of the second moment. -1: the optimizer's own, mostly 0.999.",
                        -1.0,
                        0.999999,
                        0.0001,
                    )
                ),
                advanced(
                    count("num_cycles", "Number of falls in the schedule cosine with restarts. 0: 1.", top=10_000)
                ),
                advanced(number("power", "Exponent of the schedule polynomial. 0: 1, a line.", 0.0, 100.0, 0.1)),
                advanced(
                    number(
                        "loss_spike_factor",
                        "Skips a step whose loss exceeds the usual loss by this factor, such as 20. 0: none.",
                        0.0,
                        1e6,
                        1.0,
                    )
                ),
            ),
        )

    validate_inputs = checked(
        **rules("optimizer", "weight_decay", "max_grad_norm", "ema_decay", "beta1", "beta2", "power"),
        **rules("optimizer", "loss_spike_factor"),
        optimizer=None,
        schedule=None,
    )


class GraftMemoryOptions(OptionNode):
    """Node that sets the trade of speed for memory."""

    kind = "memory"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftMemoryOptions",
            "Graft Memory Options",
            ["vram", "gradient checkpointing", "block swap", "low vram", "offload"],
            "Trades time for memory. A run can continue with other values. Untouched fields change nothing.",
            [
                auto(
                    "checkpointing",
                    ["on", "off"],
                    "Drop activations and recompute them in the backward pass: less memory, more time. auto: on for "
                    "large models.",
                ),
                auto("compute_dtype", ["fp32", "bf16", "fp16"], "Precision of the computation. auto: the model's own."),
                count(
                    "micro_batch",
                    "Pictures computed at once; the batch size stays the same. 0: the whole batch.",
                    top=4096,
                ),
            ],
            (
                auto(
                    "offload",
                    ["on", "off"],
                    "Keep frozen blocks off the device, except the one that computes and the next. auto: after memory "
                    "ran out.",
                ),
                auto(
                    "shard",
                    ["on", "off"],
                    "With several processes: each keeps only a shard of the blocks' frozen weights. auto: off.",
                ),
                auto("recompute", list(RECOMPUTED), "The part that checkpointing recomputes. auto: everything."),
            ),
            words="VRAM",
        )

    validate_inputs = checked(checkpointing=None, compute_dtype=None, offload=None, shard=None, recompute=None)


class GraftAdapterOptions(OptionNode):
    """Node that sets the type of adapter, its layers, ranks and learning rates."""

    kind = "adapter"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftAdapterOptions",
            "Graft Adapter Options",
            ["network type", "dora", "locon", "loha", "lokr", "pissa", "rank", "alpha", "lycoris"],
            "Type, layers, ranks and rates of the adapter. Untouched fields change nothing.",
            [
                auto("type", list(ADAPTERS), "auto: LoRA."),
                number("alpha", "The effective scale is alpha / rank. 0: alpha equals the rank.", 0.0, 1e6, 0.1),
                auto(
                    "targets", list(TARGETS), "Layers to adapt. auto: attention, or linear + conv for LoRA with conv."
                ),
                number("dropout", "Fraction of the adapter's inputs that each step drops. 0: none.", 0.0, 0.95, 0.01),
                auto("text_encoder", ["on", "off"], "Train the text encoder too. auto: off."),
                count("text_encoder_rank", "Rank for the text encoder. 0: the model's.", top=1024),
                number(
                    "text_encoder_learning_rate",
                    "Learning rate for the text encoder. 0: the model's.",
                    0.0,
                    10.0,
                    0.0000001,
                ),
                auto(
                    "start_from",
                    paths.adapter_choices(),
                    "Adapter to continue from, with the same type and ranks. auto: none.",
                ),
                advanced(
                    io.String.Input(
                        "target_patterns",
                        default="",
                        multiline=True,
                        tooltip="Parts of layer paths, one per line, such as attn2. Regular expressions work.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "block_ranks",
                        default="",
                        multiline=True,
                        tooltip="Other ranks for some layers, one per line, such as middle_block=8. Rank 0 leaves a "
                        "layer out.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "block_learning_rates",
                        default="",
                        multiline=True,
                        tooltip="Other learning rates for some layers, one per line, such as input_blocks=5e-5.",
                    )
                ),
                advanced(
                    number(
                        "lora_plus_ratio",
                        "LoRA+: learning rate of B divided by that of A, such as 16. 0: 1.",
                        0.0,
                        1e4,
                        0.1,
                    )
                ),
            ],
            later=(
                advanced(
                    auto(
                        "weight_dtype",
                        ["fp32", "bf16"],
                        "Precision of the weights in full fine-tuning; bf16 uses stochastic rounding. auto: fp32.",
                    )
                ),
            ),
            words="LoRA",
        )

    validate_inputs = checked(
        start_from=lambda name: name == "auto" or paths.adapter_path(name),
        **rules("adapter", "target_patterns", "block_ranks", "block_learning_rates"),
        **rules("adapter", "alpha", "dropout", "text_encoder_learning_rate", "lora_plus_ratio"),
        type=None,
        targets=None,
        text_encoder=None,
        weight_dtype=None,
    )

    @classmethod
    def fingerprint_inputs(cls, start_from, options=None, **values) -> str | float:
        """Return a value that changes with the file of `start_from`. A name from a link is not known yet."""
        if start_from == "auto":
            return ""
        return paths.file_state(start_from, paths.adapter_path)


class GraftObjectiveOptions(OptionNode):
    """Node that sets timesteps, weighting, loss and noise."""

    kind = "objective"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftObjectiveOptions",
            "Graft Objective Options",
            ["min snr", "noise offset", "timestep sampling", "huber", "loss"],
            "Sets the noise levels, their weights, the loss and added noise. Untouched fields change nothing.",
            [
                auto(
                    "timesteps",
                    list(TIMESTEPS),
                    "Distribution of the noise levels. auto: all levels of the model, equally often.",
                ),
                count("min_timestep", "Lowest trained noise level, of 1000. 0: from the first level.", top=1000),
                count("max_timestep", "Highest trained noise level, of 1000. 0: to the last level.", top=1000),
                auto(
                    "weighting", list(WEIGHTINGS), "Weight of each noise level in the loss. auto: native, all the same."
                ),
                number("min_snr_gamma", "Gamma of min-SNR. 0: 5.", 0.0, 1000.0, 0.1),
                auto("loss", list(LOSSES), "The error function. auto: MSE."),
                number(
                    "noise_offset",
                    "Lets the model learn very dark and very bright pictures, such as 0.05. 0: none.",
                    0.0,
                    1.0,
                    0.01,
                ),
                number(
                    "input_perturbation",
                    "Noise added to the input but not to the target, such as 0.1. 0: none.",
                    0.0,
                    1.0,
                    0.01,
                ),
                number("pyramid_discount", "Multi-resolution noise, such as 0.3. 0: none.", 0.0, 0.99, 0.01),
                advanced(
                    io.Float.Input(
                        "timestep_mean",
                        default=0.0,
                        min=-10.0,
                        max=10.0,
                        step=0.1,
                        round=False,
                        tooltip="Mean of logit-normal timesteps; above 0 for more noise. 0: 0.",
                    )
                ),
                advanced(number("timestep_std", "Deviation of logit-normal timesteps. 0: 1.", 0.0, 10.0, 0.1)),
                advanced(number("timestep_shift", "Factor of shifted timesteps. 0: 3.", 0.0, 100.0, 0.1)),
                advanced(
                    number(
                        "huber_c",
                        "Error at which the Huber loss turns from squared to absolute. 0: 0.1.",
                        0.0,
                        1.0,
                        0.01,
                    )
                ),
                advanced(
                    auto(
                        "huber_schedule",
                        [name for name in HUBER_SCHEDULES if name != "auto"],
                        "How that error falls with noise. auto: snr, or exponential for flow models.",
                    )
                ),
            ],
        )

    validate_inputs = checked(
        **rules("objective", "min_snr_gamma", "noise_offset", "input_perturbation", "pyramid_discount"),
        **rules("objective", "timestep_mean", "timestep_std", "timestep_shift", "huber_c"),
        timesteps=None,
        weighting=None,
        loss=None,
        huber_schedule=None,
    )


class GraftPivotalOptions(OptionNode):
    """Node that sets an embedding that is trained together with the adapter."""

    kind = "pivotal"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftPivotalOptions",
            "Graft Pivotal Options",
            ["pivotal tuning", "textual inversion", "ti"],
            "Pivotal tuning: trains a new embedding together with the LoRA, then freezes it. Without a name nothing "
            "changes.",
            [
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the embedding. Prompts write it as embedding:NAME. Empty: no embedding is "
                    "trained.",
                ),
                io.String.Input(
                    "init_text", default="", tooltip="What it shows, in a word or two. Training starts from there."
                ),
                count("vectors", "Number of a prompt's 75 tokens that the embedding takes. 0: 2.", top=64),
                number("learning_rate", "Learning rate of the embedding alone. 0: 5e-4.", 0.0, 10.0, 0.0000001),
                number(
                    "stop_fraction",
                    "Fraction of the steps after which the embedding is frozen. 0: 0.5.",
                    0.0,
                    1.0,
                    0.01,
                ),
            ],
            words="Tuning",
        )

    validate_inputs = checked(**rules("pivotal", "name", "init_text", "learning_rate", "stop_fraction"))


NODES = [
    GraftRunOptions,
    GraftPreviewOptions,
    GraftOptimizerOptions,
    GraftMemoryOptions,
    GraftAdapterOptions,
    GraftObjectiveOptions,
    GraftPivotalOptions,
]
