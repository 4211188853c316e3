"""Option nodes: settings that most users never touch, chained in front of a trainer."""

from __future__ import annotations

from comfy_api.latest import io

from .checks import checked
from .host import paths
from .host.model.sampling import SAMPLERS, SCHEDULERS
from .option_fields import OptionNode, option_schema, rules
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
            "Names a run, and says how often it is saved and validated. Untouched fields change nothing.",
            [
                cls.widget("name", "Name of the run's folder. Empty: the dataset's name."),
                cls.widget(
                    "on_existing", "What to do when this very run exists. auto: resume, or return it when finished."
                ),
                cls.widget("save_every", "Save state and adapter every so many steps. 0: 500."),
                cls.widget("keep_last", "How many of those are kept. 0: 2."),
                cls.widget("validation_fraction", "Share of the pictures held out to measure on. 0: none.", step=0.01),
                cls.widget("validate_every", "Measure on them every so many steps. 0: 50."),
                advanced(
                    cls.widget(
                        "gradient_check",
                        "Compare the gradient with finite differences before step 1. "
                        "auto: only for models the pack has no description for.",
                    )
                ),
            ],
            (
                cls.widget(
                    "tensorboard", "Write TensorBoard's event files too. They need the package tensorboard. auto: off."
                ),
                advanced(
                    cls.widget(
                        "processes",
                        "Train by so many processes on this machine, one for each GPU; batch_size is of all together. "
                        "0: 1.",
                    )
                ),
            ),
        )

    validate_inputs = checked(**rules("run"))


class GraftPreviewOptions(OptionNode):
    """Node that sets the preview images during training."""

    kind = "preview"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftPreviewOptions",
            "Graft Preview Options",
            ["sample images", "preview while training", "samples"],
            "Draws sample pictures while training, the first before step 1. Without prompts there are none.",
            [
                cls.widget("prompts", "One prompt a line.", multiline=True),
                cls.widget("every", "Draw every so many steps. 0: 100."),
                cls.widget("steps", "Sampling steps. 0: 20."),
                cls.widget("cfg", "Guidance. 0: the family's own.", step=0.1),
                cls.widget("sampler_name", "auto: euler.", options=list(SAMPLERS)),
                cls.widget("scheduler", "auto: the family's own.", options=list(SCHEDULERS)),
                cls.widget("seed", "Noise of the first picture. -1: 0.", control_after_generate=False),
            ],
            words="Samples",
        )

    validate_inputs = checked(**rules("preview"))


class GraftOptimizerOptions(OptionNode):
    """Node that sets optimizer, schedule, gradient accumulation and clipping."""

    kind = "optimizer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftOptimizerOptions",
            "Graft Optimizer Options",
            ["optimiser", "adamw", "prodigy", "adafactor", "lr scheduler", "ema"],
            "Optimiser, schedule, accumulation and clipping. Untouched fields change nothing.",
            [
                cls.widget(
                    "optimizer", "auto: AdamW. Most others need a package; the error names it where it is missing."
                ),
                cls.widget("weight_decay", "-1: the optimizer's own, 0.01 for AdamW.", step=0.001),
                cls.widget("schedule", "How the learning rate goes over the steps. auto: constant."),
                cls.widget("warmup_steps", "Steps of rising learning rate at the start. -1: none."),
                cls.widget("accumulation", "Batches for one optimiser step. 0: 1."),
                cls.widget("max_grad_norm", "Gradients are clipped to this norm; 0 never clips. -1: 1.", step=0.1),
                cls.widget("ema_decay", "Moving average of the weights, such as 0.999; 0: none. -1: none.", step=0.001),
            ],
            (
                advanced(
                    cls.widget("beta1", "Decay of the momentum. -1: the optimizer's own, mostly 0.9.", step=0.001)
                ),
                advanced(
                    cls.widget(
                        "beta2", "Decay of the second moment. -1: the optimizer's own, mostly 0.999.", step=0.0001
                    )
                ),
                advanced(cls.widget("num_cycles", "Falls of the schedule cosine with restarts. 0: 1.")),
                advanced(cls.widget("power", "Exponent of the schedule polynomial. 0: 1, a line.", step=0.1)),
                advanced(
                    cls.widget(
                        "loss_spike_factor",
                        "A step whose loss is over so many times the usual one is left out, such as 20. 0: none.",
                        step=1.0,
                    )
                ),
            ),
        )

    validate_inputs = checked(**rules("optimizer"))


class GraftMemoryOptions(OptionNode):
    """Node that sets the trade of speed for memory."""

    kind = "memory"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftMemoryOptions",
            "Graft Memory Options",
            ["vram", "gradient checkpointing", "block swap", "low vram", "offload"],
            "Trades time for memory; a run may go on with other values. Untouched fields change nothing.",
            [
                cls.widget(
                    "checkpointing",
                    "Forget activations and compute them again in the backward. auto: on for large models.",
                ),
                cls.widget("compute_dtype", "auto: what the model computes in anyway."),
                cls.widget("micro_batch", "Pictures computed at once; the batch stays as it is. 0: the whole batch."),
            ],
            (
                cls.widget(
                    "offload",
                    "Keep frozen blocks off the device but for the one that is computed and the next. "
                    "auto: when memory ran out.",
                ),
                cls.widget(
                    "shard", "With several processes: each keeps its share of the frozen weights of blocks. auto: off."
                ),
                cls.widget("recompute", "What checkpointing computes again. auto: everything."),
            ),
            words="VRAM",
        )

    validate_inputs = checked(**rules("memory"))


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
                cls.widget("type", "auto: LoRA."),
                cls.widget("alpha", "The effective scale is alpha / rank. 0: alpha equals the rank.", step=0.1),
                cls.widget("targets", "Which layers. auto: attention; with LoRA with conv all of them."),
                cls.widget("dropout", "Share of an adapter's inputs that a step drops. 0: none.", step=0.01),
                cls.widget("text_encoder", "Train the text encoder too. auto: off."),
                cls.widget("text_encoder_rank", "Its own rank. 0: the model's."),
                cls.widget("text_encoder_learning_rate", "Its own learning rate. 0: the model's.", step=0.0000001),
                cls.widget(
                    "start_from",
                    "An adapter of the same type and ranks to go on from. auto: none.",
                    options=paths.adapter_choices(),
                ),
                advanced(
                    cls.widget(
                        "target_patterns",
                        "Parts of layers' paths, one a line, such as attn2; regular expressions work.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget(
                        "block_ranks",
                        "Other ranks for some layers, one a line, such as middle_block=8. Rank 0 leaves out.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget(
                        "block_learning_rates",
                        "Other learning rates for some layers, one a line, such as input_blocks=5e-5.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget("lora_plus_ratio", "LoRA+: B's learning rate over A's, such as 16. 0: 1.", step=0.1)
                ),
            ],
            later=(
                advanced(
                    cls.widget(
                        "weight_dtype", "What all weights are trained in; bf16 is rounded stochastically. auto: fp32."
                    )
                ),
            ),
            words="LoRA",
        )

    # The widget's list of files may be outdated, so the rule looks for the file.
    validate_inputs = checked(
        **{**rules("adapter"), "start_from": lambda name: name == "auto" or paths.adapter_path(name)}
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
            "Noise levels, weights, loss and noise, in place of the model's own. Untouched fields change nothing.",
            [
                cls.widget("timesteps", "Which noise levels are drawn. auto: all the model has, alike."),
                cls.widget("min_timestep", "Least noise, of 1000. 0: from the first level."),
                cls.widget("max_timestep", "Most noise, of 1000. 0: to the last level."),
                cls.widget("weighting", "What a noise level counts for. auto: native, all the same."),
                cls.widget("min_snr_gamma", "Gamma of min-SNR. 0: 5.", step=0.1),
                cls.widget("loss", "How an error is measured. auto: MSE."),
                cls.widget("noise_offset", "Lets brightness be learnt, such as 0.05. 0: none.", step=0.01),
                cls.widget(
                    "input_perturbation", "Noise that the target does not know of, such as 0.1. 0: none.", step=0.01
                ),
                cls.widget("pyramid_discount", "Multi-resolution noise, such as 0.3. 0: none.", step=0.01),
                advanced(
                    cls.widget(
                        "timestep_mean", "Mean of logit-normal timesteps; above 0 for more noise. 0: 0.", step=0.1
                    )
                ),
                advanced(cls.widget("timestep_std", "Deviation of logit-normal timesteps. 0: 1.", step=0.1)),
                advanced(cls.widget("timestep_shift", "Factor of shifted timesteps. 0: 3.", step=0.1)),
                advanced(cls.widget("huber_c", "Where Huber turns from square to absolute. 0: 0.1.", step=0.01)),
                advanced(
                    cls.widget(
                        "huber_schedule",
                        "How Huber's width falls with noise. auto: snr, or exponential for flow models.",
                    )
                ),
            ],
        )

    validate_inputs = checked(**rules("objective"))


class GraftPivotalOptions(OptionNode):
    """Node that sets an embedding that is trained together with the adapter."""

    kind = "pivotal"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftPivotalOptions",
            "Graft Pivotal Options",
            ["pivotal tuning", "textual inversion", "ti"],
            "Pivotal tuning: trains a word together with the LoRA, then freezes it. Without a name nothing changes.",
            [
                cls.widget("name", "The word, written in prompts as embedding:NAME. Empty: none is trained."),
                cls.widget("init_text", "What it is, in a word or two: where learning starts."),
                cls.widget("vectors", "How many of a prompt's 75 places it takes. 0: 2."),
                cls.widget("learning_rate", "Of the word alone. 0: 5e-4.", step=0.0000001),
                cls.widget("stop_fraction", "Share of the steps after which it is frozen. 0: 0.5.", step=0.01),
            ],
            words="Tuning",
        )

    validate_inputs = checked(**rules("pivotal"))


NODES = [
    GraftRunOptions,
    GraftPreviewOptions,
    GraftOptimizerOptions,
    GraftMemoryOptions,
    GraftAdapterOptions,
    GraftObjectiveOptions,
    GraftPivotalOptions,
]
