"""Option nodes: settings that most users never touch, chained in front of a trainer."""

from comfy_api.latest import io

from ..trainers.engine.resolve import Options
from .checks import checked
from .host import paths
from .host.model.sampling import SAMPLERS, SCHEDULERS
from .option_fields import OptionNode, option_schema, rules
from .schema import advanced, execution_id, named


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
                cls.widget("name", "Name of the run's folder. Empty: the dataset's name."),
                cls.widget(
                    "on_existing",
                    "What to do if the same run exists already. auto: resume it, or return it if it is finished.",
                ),
                cls.widget("save_every", "Steps between saves of the adapter and of the state for a resume. 0: 500."),
                cls.widget("keep_last", "Number of saves to keep. 0: 2."),
                cls.widget(
                    "validation_fraction",
                    "Fraction of the pictures held out from training, to measure with. 0: none.",
                    step=0.01,
                ),
                cls.widget("validate_every", "Steps between measurements on the held-out pictures. 0: 50."),
                advanced(
                    cls.widget(
                        "gradient_check",
                        "Compare the gradient with finite differences before step 1. auto: only for models that "
                        "Graft has no description of.",
                    )
                ),
            ],
            (
                cls.widget(
                    "tensorboard",
                    "Also write TensorBoard's event files. This needs the Python package tensorboard. auto: off.",
                ),
                advanced(
                    cls.widget(
                        "processes",
                        "Number of processes on this machine, one per GPU. batch_size counts the pictures of all "
                        "together. 0: 1.",
                    )
                ),
                cls.widget(
                    "keep_best", "Also keep the step with the lowest validation loss, as best.safetensors. auto: off."
                ),
                cls.widget("stop_when", "When to stop and keep before the last step. auto: off."),
                cls.widget(
                    "patience", "Validations in a row without a new lowest loss, after which stop_when stops. 0: 5."
                ),
                cls.widget(
                    "prompt_node",
                    "For models that edit pictures: the node that encodes your prompts. Training encodes captions and "
                    "source pictures as it does. auto: CLIPTextEncode, which reads the text alone.",
                ),
                advanced(
                    cls.widget(
                        "tag_frequency",
                        "Write the captions' tags into the saved files, for LoRA managers. Captions may be private. "
                        "auto: off.",
                    )
                ),
                cls.widget(
                    "give_way",
                    "Waiting prompts for which the training pauses; it continues behind them by itself. Short prompts "
                    "have no training. auto: as in the settings, at first off.",
                ),
                advanced(
                    cls.widget(
                        "communication",
                        "Gradients between processes: exact, or rounded to bf16, which halves what is sent and makes "
                        "another run. auto: exact.",
                    )
                ),
                cls.widget(
                    "first_frame_probability",
                    "Image to video with LTX-Video, Wan 2.2 5B and Cosmos: part of a clip's visits whose first frame "
                    "is given without noise. 0: text to video.",
                    step=0.01,
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
            "Draws sample pictures during training, the first ones before step 1. Without prompts it draws "
            "none during training.",
            [
                cls.widget(
                    "prompts",
                    "One prompt per line. Settings of its own: --n negative --w width --h height --s steps --l cfg "
                    "--g guidance --d seed --c source picture. # begins a comment.",
                    multiline=True,
                ),
                cls.widget("every", "Steps between drawings. 0: 100."),
                cls.widget("steps", "Sampling steps. 0: 20."),
                cls.widget("cfg", "Guidance. 0: the default of the model's family.", step=0.1),
                cls.widget("sampler_name", "auto: euler.", options=list(SAMPLERS)),
                cls.widget("scheduler", "auto: the default of the model's family.", options=list(SCHEDULERS)),
                cls.widget("seed", "Noise of the first picture. -1: 0.", control_after_generate=False),
            ],
            later=[
                cls.widget("negative_prompt", "Negative prompt of all pictures without --n.", multiline=True),
                io.Model.Input(
                    "model", tooltip="Draw on this model instead of the trained one, such as its turbo version."
                ),
                cls.widget("strength", "Strength of the adapter on that model.", step=0.01),
            ],
            words="Samples",
        )

    validate_inputs = checked(**rules("preview"))

    @classmethod
    def execute(cls, options=None, model=None, **values) -> io.NodeOutput:
        from .host.model.preview_model import PreviewChoice

        with named(cls, options=options, model=model):
            chosen = (options or Options()).adding(cls.kind, values)
            if model is not None:
                chosen.preview_model = PreviewChoice(model, execution_id(cls))
            return io.NodeOutput(chosen)


class GraftOptimizerOptions(OptionNode):
    """Node that sets optimizer, schedule, gradient accumulation and clipping."""

    kind = "optimizer"

    @classmethod
    def define_schema(cls) -> io.Schema:
        return option_schema(
            "GraftOptimizerOptions",
            "Graft Optimizer Options",
            ["optimiser", "adamw", "prodigy", "adafactor", "lr scheduler", "ema"],
            "Sets the optimizer, the learning-rate schedule, accumulation and clipping. Untouched fields "
            "change nothing.",
            [
                cls.widget(
                    "optimizer", "auto: AdamW. Most others need a Python package; if it is missing, the error names it."
                ),
                cls.widget(
                    "weight_decay",
                    "Pulls the weights towards zero. -1: the optimizer's own, 0.01 for AdamW.",
                    step=0.001,
                ),
                cls.widget("schedule", "Course of the learning rate over the steps. auto: constant."),
                cls.widget("warmup_steps", "Steps at the start in which the learning rate rises. -1: none."),
                cls.widget("accumulation", "Batches per training step. 0: 1."),
                cls.widget("max_grad_norm", "Clips longer gradients to this norm; 0 never clips. -1: 1.", step=0.1),
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
                advanced(cls.widget("num_cycles", "Number of falls in the schedule cosine with restarts. 0: 1.")),
                advanced(cls.widget("power", "Exponent of the schedule polynomial. 0: 1, a line.", step=0.1)),
                advanced(
                    cls.widget(
                        "loss_spike_factor",
                        "Skips a step whose loss exceeds the usual loss by this factor, such as 20. 0: none.",
                        step=1.0,
                    )
                ),
                advanced(
                    cls.widget(
                        "warmup_ratio", "Warm-up as a part of all steps, in place of warmup_steps. 0: none.", step=0.01
                    )
                ),
                advanced(
                    cls.widget("min_lr_ratio", "Part of the learning rate at which a schedule ends. 0: 0.", step=0.01)
                ),
                advanced(
                    cls.widget(
                        "decay_ratio",
                        "Part of all steps in which the schedule warmup-stable-decay falls. 0: 0.2.",
                        step=0.01,
                    )
                ),
                advanced(
                    cls.widget(
                        "optimizer_args",
                        "Further arguments of the optimizer, such as d_coef=2 betas=0.9,0.99. The optimizer "
                        "pytorch-optimizer needs name=, such as name=ADOPT.",
                    )
                ),
                advanced(
                    cls.widget(
                        "schedule_points",
                        "Steps and factors of the schedule points, such as 0:1, 500:0.5, 1000:0.1.",
                    )
                ),
                cls.preset(),
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
            "Trades time for memory. A run can continue with other values, except of base_dtype. Untouched fields "
            "change nothing.",
            [
                cls.widget(
                    "checkpointing",
                    "Drop activations and recompute them in the backward pass: less memory, more time. auto: "
                    "on for large models.",
                ),
                cls.widget("compute_dtype", "Precision of the computation. auto: the model's own."),
                cls.widget(
                    "micro_batch", "Pictures computed at once; the batch size stays the same. 0: the whole batch."
                ),
            ],
            (
                cls.widget(
                    "offload",
                    "Keep frozen blocks off the device, except the one that computes and the next. auto: "
                    "after memory ran out.",
                ),
                cls.widget(
                    "shard",
                    "With several processes: each keeps only a shard of the model's weights. hybrid: over the "
                    "processes of a machine. auto: off.",
                ),
                cls.widget("recompute", "The part that checkpointing recomputes. auto: everything."),
                cls.widget(
                    "compile",
                    "Compile the model's blocks with torch.compile, for GPUs. The first step takes minutes; a CPU gets "
                    "slower. auto: off.",
                ),
                cls.widget(
                    "base_dtype",
                    "Quantize the frozen linear weights for less memory. Changes the result, so it makes another run. "
                    "auto: as it is.",
                ),
                cls.preset(),
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
                cls.widget("targets", "Layers to adapt. auto: attention, or linear + conv for LoRA with conv."),
                cls.widget("dropout", "Fraction of the adapter's inputs that each step drops. 0: none.", step=0.01),
                cls.widget("text_encoder", "Train the text encoder too. auto: off."),
                cls.widget("text_encoder_rank", "Rank for the text encoder. 0: the model's."),
                cls.widget(
                    "text_encoder_learning_rate", "Learning rate for the text encoder. 0: the model's.", step=0.0000001
                ),
                cls.widget(
                    "start_from",
                    "Adapter to continue from, with the same type and ranks. auto: none.",
                    options=paths.adapter_choices(),
                ),
                advanced(
                    cls.widget(
                        "target_patterns",
                        "Parts of layer paths, one per line, such as attn2. Regular expressions work.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget(
                        "block_ranks",
                        "Other ranks for some layers, one per line, such as middle_block=8. Rank 0 leaves a layer out.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget(
                        "block_learning_rates",
                        "Other learning rates for some layers, one per line, such as input_blocks=5e-5.",
                        multiline=True,
                    )
                ),
                advanced(
                    cls.widget(
                        "lora_plus_ratio", "LoRA+: learning rate of B divided by that of A, such as 16. 0: 1.", step=0.1
                    )
                ),
            ],
            later=(
                advanced(
                    cls.widget(
                        "weight_dtype",
                        "Precision of the weights in full fine-tuning; bf16 uses stochastic rounding. auto: fp32.",
                    )
                ),
                advanced(
                    cls.widget("adapter_args", "Further arguments of the type, such as factor=8 decompose_both=true.")
                ),
                cls.preset(),
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
            "Sets the noise levels, their weights, the loss and added noise. Untouched fields change nothing.",
            [
                cls.widget(
                    "timesteps", "Distribution of the noise levels. auto: all levels of the model, equally often."
                ),
                cls.widget("min_timestep", "Lowest trained noise level, of 1000. 0: from the first level."),
                cls.widget("max_timestep", "Highest trained noise level, of 1000. 0: to the last level."),
                cls.widget("weighting", "Weight of each noise level in the loss. auto: native, all the same."),
                cls.widget("min_snr_gamma", "Gamma of min-SNR. 0: 5.", step=0.1),
                cls.widget("loss", "The error function. auto: MSE."),
                cls.widget(
                    "noise_offset",
                    "Lets the model learn very dark and very bright pictures, such as 0.05. 0: none.",
                    step=0.01,
                ),
                cls.widget(
                    "input_perturbation",
                    "Noise added to the input but not to the target, such as 0.1. 0: none.",
                    step=0.01,
                ),
                cls.widget("pyramid_discount", "Multi-resolution noise, such as 0.3. 0: none.", step=0.01),
                advanced(
                    cls.widget(
                        "timestep_mean", "Mean of logit-normal timesteps; above 0 for more noise. 0: 0.", step=0.1
                    )
                ),
                advanced(cls.widget("timestep_std", "Deviation of logit-normal timesteps. 0: 1.", step=0.1)),
                advanced(cls.widget("timestep_shift", "Factor of shifted timesteps. 0: 3.", step=0.1)),
                advanced(
                    cls.widget(
                        "huber_c", "Error at which the Huber loss turns from squared to absolute. 0: 0.1.", step=0.01
                    )
                ),
                advanced(
                    cls.widget(
                        "huber_schedule",
                        "How that error falls with noise. auto: snr, or exponential for flow models.",
                    )
                ),
            ],
            later=(
                *map(
                    advanced,
                    (
                        cls.widget("timestep_mode_scale", "Scale of the timesteps mode. 0: 1.29.", step=0.1),
                        cls.widget("timestep_alpha", "Alpha of the timesteps beta. 0: 2.", step=0.1),
                        cls.widget("timestep_beta", "Beta of the timesteps beta. 0: 2.", step=0.1),
                        cls.widget("stratified", "Spread each batch's timesteps over all noise levels. auto: off."),
                        cls.widget("p2_gamma", "Gamma of P2. 0: 1.", step=0.1),
                        cls.widget("l1_fraction", "Part of L1 in MSE + L1. 0: 0.5.", step=0.1),
                        cls.widget(
                            "noise_offset_random_strength", "Draw the offset between 0 and noise_offset. auto: off."
                        ),
                        cls.widget(
                            "adaptive_noise_scale", "Part of each channel's mean to add to noise_offset.", step=0.01
                        ),
                        cls.widget(
                            "masked_prior_weight",
                            "Keeps what the model predicted outside masks, such as 1.",
                            step=0.1,
                        ),
                    ),
                ),
                cls.preset(),
            ),
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
            "Pivotal tuning: trains a new embedding together with the LoRA, then freezes it. Without a name "
            "nothing changes.",
            [
                cls.widget(
                    "name", "Name of the embedding. Prompts write it as embedding:NAME. Empty: no embedding is trained."
                ),
                cls.widget("init_text", "What it shows, in a word or two. Training starts from there."),
                cls.widget("vectors", "Number of a prompt's 75 tokens that the embedding takes. 0: 2."),
                cls.widget("learning_rate", "Learning rate of the embedding alone. 0: 5e-4.", step=0.0000001),
                cls.widget(
                    "stop_fraction", "Fraction of the steps after which the embedding is frozen. 0: 0.5.", step=0.01
                ),
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
