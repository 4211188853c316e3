"""Fields of ai-toolkit.

Sources: `config_modules.py`, `optimizer.py`, `scheduler.py`, `custom_flowmatch_sampler.py` of ai-toolkit 27a03a9.
"""

from typing import Any

from ...errors import SettingsError
from .converters import (
    ADAPTER,
    OWN_LEVELS,
    Converted,
    Converter,
    Fields,
    betas,
    factor,
    in_steps,
    is_on,
    min_snr,
    number,
    optimizer,
    prompt_lines,
    same_as,
    shifted,
    table,
    warmup,
    whole,
)

TABLE = table(
    trainer="batch_size=train.batch_size rank=network.linear rank=network.rank",
    adapter="dropout=network.dropout text_encoder=train.train_text_encoder",
    optimizer="weight_decay=train.optimizer_params.weight_decay accumulation=train.gradient_accumulation "
    "accumulation=train.gradient_accumulation_steps max_grad_norm=train.max_grad_norm",
    objective="noise_offset=train.noise_offset",
    memory="checkpointing=train.gradient_checkpointing compute_dtype=train.dtype offload=model.layer_offloading "
    "compile=model.compile compile=model.block_compile",
    run="name keep_last=save.max_step_saves_to_keep",
    preview="negative_prompt=sample.neg seed=sample.seed steps=sample.sample_steps",
    dataset="trigger=trigger_word folder=datasets.folder_path resolution=datasets.resolution "
    "repeats=datasets.num_repeats caption_dropout=datasets.caption_dropout_rate shuffle_tags=datasets.shuffle_tokens "
    "tag_dropout=datasets.token_dropout_rate keep_tokens=datasets.keep_tokens flip=datasets.flip_x "
    "masks=datasets.alpha_mask mask_folder=datasets.mask_path mask_minimum=datasets.mask_min_value "
    "control_folder=datasets.control_path",
    read="train.ema_config.use_ema train.noise_scheduler model.qtype model.is_flux model.arch sample.width "
    "sample.height",
)
NOTES = {
    "network.pretrained_lora_path": ADAPTER,
    "datasets": "Add the other folders with Graft Combine Datasets.",
}


def check(name: str, fields: Fields) -> None:
    """Refuse nothing."""


def is_flow(fields: Fields) -> bool:
    """Return True if the settings train a flow model."""
    return fields.get("train.noise_scheduler") == "flowmatch" or is_on(fields, "model.is_flux")


def _network(value: Any, fields: Fields) -> Converted:
    kinds = {"lora": "LoRA", "locon": "LoRA with conv", "lycoris": "LoRA with conv", "lokr": "LoKr"}
    if str(value) not in kinds:
        raise SettingsError("Graft has no such choice.")
    kind = kinds[value]
    if kind == "LoRA" and is_on(fields, "network.conv") and not is_flow(fields):
        kind = "LoRA with conv"
    return {
        "adapter.type": kind,
        "adapter.targets": "linear + conv" if kind == "LoRA with conv" else "attention + feed-forward",
    }


def _alpha(value: Any, fields: Fields) -> Converted:
    """Leave out the alpha of a LoKr with whole factors, which has none."""
    whole_factors = fields.get("network.type") == "lokr" and is_on(fields, "network.lokr_full_rank")
    return None if whole_factors else {"adapter.alpha": value}


def _of_lokr(convert: Converter) -> Converter:
    return lambda value, fields: convert(value, fields) if fields.get("network.type") == "lokr" else None


def _unless_flow(convert: Converter) -> Converter:
    return lambda value, fields: None if is_flow(fields) else convert(value, fields)


def _rate(value: Any, fields: Fields) -> Converted:
    """Convert the rate. ai-toolkit takes a small rate of an optimizer that finds its own for 1."""
    rate = number(value)
    finds = str(fields.get("train.optimizer")).lower().startswith(("prodigy", "dadapt"))
    return {"trainer.learning_rate": 1.0 if finds and rate < 0.1 else rate}


def _schedule(value: Any, fields: Fields) -> Converted:
    """Convert the schedule. The linear one rises."""
    if value not in ("constant", "constant_with_warmup", "cosine", "cosine_with_restarts"):
        raise SettingsError("Graft has no such choice.")
    return {"optimizer.schedule": value}


def _loss(value: Any, fields: Fields) -> Converted:
    if value == "pseudo_huber":
        return {"objective.loss": "smooth L1", "objective.huber_c": 0.01, "objective.huber_schedule": "constant"}
    return {"objective.loss": value}


def _levels(value: Any, fields: Fields) -> Converted:
    if not is_flow(fields) or fields.get("train.content_or_style") in ("content", "style"):
        return None
    if value != "sigmoid":
        raise SettingsError(OWN_LEVELS)
    return shifted(1.0, 0.0, 1.0)


def _prompts(value: Any, fields: Fields) -> Converted:
    guidance = "g" if is_flow(fields) else "l"
    return prompt_lines(value, fields, f"w=width h=height n=neg d=seed s=sample_steps {guidance}=guidance_scale")


CONVERTERS: dict[str, Converter] = {
    "train.lr": _rate,
    "train.unet_lr": _rate,
    "train.steps": in_steps("trainer.steps"),
    "network.type": _network,
    "network.alpha": _alpha,
    "network.linear_alpha": _alpha,
    "network.conv": _unless_flow(same_as("network.linear")),
    "network.conv_alpha": _unless_flow(same_as("network.linear_alpha")),
    "network.lokr_full_rank": _of_lokr(lambda value, fields: {"adapter_args.full_matrix": value}),
    "network.lokr_factor": _of_lokr(factor),
    "train.text_encoder_lr": lambda value, fields: (
        {"adapter.text_encoder_learning_rate": value} if is_on(fields, "train.train_text_encoder") else None
    ),
    "train.optimizer": optimizer,
    "train.optimizer_params.betas": betas,
    "train.lr_scheduler": _schedule,
    "train.lr_scheduler_params.num_warmup_steps": warmup,
    "train.ema_config.ema_decay": lambda value, fields: (
        {"optimizer.ema_decay": value} if is_on(fields, "train.ema_config.use_ema") else None
    ),
    "train.min_snr_gamma": min_snr,
    "train.snr_gamma": min_snr,
    "train.loss_type": _loss,
    "train.timestep_type": _levels,
    "train.content_or_style": lambda value, fields: None if value == "balanced" else {"objective.timesteps": value},
    # Levels count from the noise.
    "train.max_denoising_steps": lambda value, fields: {"objective.min_timestep": 999 - whole(value)},
    "train.min_denoising_steps": lambda value, fields: {"objective.max_timestep": 1000 - whole(value)},
    "model.quantize": lambda value, fields: {"memory.base_dtype": fields.get("model.qtype", "qfloat8")},
    "save.save_every": in_steps("run.save_every"),
    "sample.sample_every": in_steps("preview.every"),
    "sample.prompts": _prompts,
    "sample.samples": _prompts,
    "sample.guidance_scale": _unless_flow(lambda value, fields: {"preview.cfg": value}),
}


def defaults(fields: Fields) -> dict[str, Any]:
    """Return the values of absent fields that differ from Graft's defaults."""
    values: dict[str, Any] = {"train.lr": 1e-6}
    if any(name.startswith("network.") for name in fields):
        values |= {"network.type": "lora", "network.linear": fields.get("network.rank", 4)}
        values |= {} if "network.alpha" in fields else {"network.linear_alpha": 1.0}
        values["network.lokr_full_rank"] = True
    if fields.get("train.lr_scheduler") == "constant_with_warmup":
        values["train.lr_scheduler_params.num_warmup_steps"] = 1000
    return values | ({"train.timestep_type": "sigmoid"} if is_flow(fields) else {})
