"""Fields of OneTrainer.

Sources: `TrainConfig.py`, `create.py`, `lr_scheduler_util.py`, `ModelSetupNoiseMixin.py` of OneTrainer 23df383.
"""

import math
import re
from typing import Any

from ...errors import SettingsError
from .converters import (
    ADAPTER,
    EPOCHS,
    OWN_LEVELS,
    ZERO_SNR,
    Converted,
    Converter,
    Fields,
    factor,
    in_steps,
    is_on,
    min_snr,
    number,
    optimizer,
    prompt_lines,
    shifted,
    table,
    warmup,
    whole,
)

TABLE = table(
    trainer="learning_rate batch_size rank=lora_rank rank=lokr_dim",
    adapter="alpha=lora_alpha dropout=dropout_probability",
    adapter_args="decompose_both=lokr_decompose_both use_tucker=lokr_use_tucker dora_wd=lokr_weight_decompose "
    "full_matrix=lokr_full_matrix",
    optimizer="weight_decay=optimizer.weight_decay beta1=optimizer.beta1 beta2=optimizer.beta2 "
    "num_cycles=learning_rate_cycles min_lr_ratio=learning_rate_min_factor accumulation=gradient_accumulation_steps "
    "max_grad_norm=clip_grad_norm",
    optimizer_args="d_coef=optimizer.d_coef use_bias_correction=optimizer.use_bias_correction "
    "safeguard_warmup=optimizer.safeguard_warmup",
    objective="noise_offset=offset_noise_weight input_perturbation=perturbation_noise_weight "
    "masked_prior_weight=masked_prior_preservation_weight",
    memory="compute_dtype=train_dtype checkpointing=gradient_checkpointing offload=layer_offload_fraction compile",
    run="tensorboard",
    dataset="resolution folder=concepts",
    read="peft_type lora_decompose text_encoder.learning_rate text_encoder_2.learning_rate ema model_type "
    "ema_update_step_interval loss_weight_strength mae_strength log_cosh_strength huber_strength huber_delta "
    "vb_loss_strength noising_weight noising_bias timestep_shift dynamic_timestep_shifting save_every_unit "
    "sample_after_unit",
)
NOTES = {
    "epochs": EPOCHS,
    "lora_model_name": ADAPTER,
    "rescale_noise_scheduler_to_zero_terminal_snr": ZERO_SNR,
}


def check(name: str, fields: Fields) -> None:
    """Refuse a field of another type of adapter, which full files have too."""
    if name.startswith("lokr_") != (fields.get("peft_type") == "LOKR") and re.match("lokr_|lora_rank", name):
        raise SettingsError("OneTrainer does not use it for this type.")


def of_unet(fields: Fields) -> bool:
    """Return True for SD1, SD2 and SDXL."""
    return bool(re.match(r"STABLE_DIFFUSION_(1|2|XL)", str(fields.get("model_type", "STABLE_DIFFUSION_15"))))


def _method(value: Any, fields: Fields) -> None:
    nodes = {"FINE_TUNE": "Graft Fine-tune", "EMBEDDING": "Graft Textual Inversion"}
    if value != "LORA":
        raise SettingsError(f"Train with {nodes.get(str(value), 'another program')}.")


def _layers(value: Any, fields: Fields) -> Converted:
    """Convert type and layers of the adapter."""
    if fields.get("training_method", "LORA") != "LORA":
        return None
    kinds = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "OFT_2": "OFT"}
    kind = kinds.get(str(fields.get("peft_type", "LORA")), "")
    conv = of_unet(fields) and kind != "OFT"
    targets = {"attn-only": "attention", "attn-mlp": "attention + feed-forward"}
    targets["full"] = "linear + conv" if conv else "all linear"
    if not kind or str(value) not in targets:
        raise SettingsError("Graft does not know these layers. target_patterns of Graft Adapter Options takes any.")
    if kind == "LoRA":
        kind = "DoRA" if is_on(fields, "lora_decompose") else "LoRA with conv" if conv and value == "full" else kind
    return {"adapter.type": kind, "adapter.targets": targets[value]}


def _text_encoder(value: Any, fields: Fields) -> Converted:
    names = ("text_encoder.learning_rate", "text_encoder_2.learning_rate")
    rate = next((fields[name] for name in names if is_on(fields, name)), None)
    return {"adapter.text_encoder": "on", **({"adapter.text_encoder_learning_rate": rate} if rate else {})}


def _second_text_encoder(value: Any, fields: Fields) -> Converted:
    """Leave out the second text encoder of SD1 and SD2, which full files have."""
    return None if of_unet(fields) and "XL" not in str(fields.get("model_type")) else _text_encoder(value, fields)


def _schedule(value: Any, fields: Fields) -> Converted:
    if value in ("COSINE_WITH_RESTARTS", "REX"):
        raise SettingsError("Graft's curve is another one. schedule_points of Graft Optimizer Options takes any.")
    return {"optimizer.schedule": value}


def _ema(value: Any, fields: Fields) -> Converted:
    """Convert the decay for some steps to that of one step."""
    interval = max(1, whole(fields.get("ema_update_step_interval", 5)))
    return {"optimizer.ema_decay": number(value) ** (1 / interval)} if is_on(fields, "ema") else None


def _weighting(value: Any, fields: Fields) -> Converted:
    strength = number(fields.get("loss_weight_strength", 5))
    kinds = {
        "CONSTANT": None,
        "MIN_SNR_GAMMA": min_snr(strength, fields),
        "DEBIASED_ESTIMATION": {"objective.weighting": "debiased"},
        "P2": {"objective.weighting": "P2", "objective.p2_gamma": strength} if strength else None,
    }
    if str(value) not in kinds:
        raise SettingsError("Graft has no such choice.")
    return kinds[value]


def _loss(value: Any, fields: Fields) -> Converted:
    """Convert the strengths of losses. `value` is that of the squared error."""
    strengths = {"MSE": number(value)}
    for name, field in (("L1", "mae"), ("log-cosh", "log_cosh"), ("Huber", "huber")):
        strengths[name] = number(fields.get(f"{field}_strength", 0))
    parts = {name: strength for name, strength in strengths.items() if strength}
    if set(parts) == {"MSE", "L1"} and math.isclose(sum(parts.values()), 1):
        return {"objective.loss": "MSE + L1", "objective.l1_fraction": parts["L1"]}
    if list(parts.values()) != [1.0] or "Huber" in parts:
        raise SettingsError("Graft has no such mix of losses.")
    return {"objective.loss": next(iter(parts))}


def _levels(value: Any, fields: Fields) -> Converted:
    """Convert the distribution of timesteps, which a shift moves."""
    weight, bias = number(fields.get("noising_weight", 0)), number(fields.get("noising_bias", 0))
    shift, dynamic = number(fields.get("timestep_shift", 1)), is_on(fields, "dynamic_timestep_shifting")
    if value == "LOGIT_NORMAL":
        factored = shifted(shift, bias, weight + 1)
        if not dynamic:
            return factored
        del factored["objective.timestep_shift"]
        return {**factored, "objective.timesteps": "resolution-shifted"}
    if dynamic or shift != 1 or (value == "UNIFORM" and not of_unet(fields)):
        raise SettingsError(OWN_LEVELS)
    if value == "HEAVY_TAIL" and weight:
        return {"objective.timesteps": "mode", "objective.timestep_mode_scale": weight}
    if value == "COS_MAP":
        return {"objective.timesteps": "cosmap"}
    if value == "BETA":
        low = 1e-4
        shape = {"objective.timestep_alpha": max(low, weight), "objective.timestep_beta": max(low, bias)}
        return {"objective.timesteps": "beta", **shape}
    if value not in ("UNIFORM", "HEAVY_TAIL"):
        raise SettingsError("Graft has no such choice.")
    return None


def _of_model(part: str, target: str) -> Converter:
    """Return a converter that leaves out a part that the model does not have."""
    return lambda value, fields: {target: value} if (part == "unet") == of_unet(fields) else None


def _interval(target: str, unit: str) -> Converter:
    def convert(value: Any, fields: Fields) -> Converted:
        if is_on(fields, unit) and fields[unit] != "STEP":
            raise SettingsError("Graft counts steps.")
        return in_steps(target)(value, fields) if is_on(fields, unit) else None

    return convert


CONVERTERS: dict[str, Converter] = {
    "training_method": _method,
    "layer_filter_preset": _layers,
    "lokr_decompose_factor": factor,
    "text_encoder.train": _text_encoder,
    "text_encoder_2.train": _second_text_encoder,
    "optimizer.optimizer": optimizer,
    "learning_rate_scheduler": _schedule,
    "learning_rate_warmup_steps": warmup,
    "ema_decay": _ema,
    "loss_weight_fn": _weighting,
    "mse_strength": _loss,
    "timestep_distribution": _levels,
    "min_noising_strength": lambda value, fields: {"objective.min_timestep": round(1000 * number(value))},
    "max_noising_strength": lambda value, fields: {"objective.max_timestep": round(1000 * number(value))},
    "save_every": _interval("run.save_every", "save_every_unit"),
    "sample_after": _interval("preview.every", "sample_after_unit"),
    "samples": lambda value, fields: prompt_lines(
        value, fields, "w=width h=height n=negative_prompt s=diffusion_steps l=cfg_scale d=seed"
    ),
    **{
        f"{part}.{field}": _of_model(part, target)
        for part in ("unet", "prior", "transformer")
        for field, target in (
            ("learning_rate", "trainer.learning_rate"),
            ("gradient_checkpointing", "memory.checkpointing"),
            ("weight_dtype", "memory.base_dtype"),
            ("offload_fraction", "memory.offload"),
        )
    },
}


def defaults(fields: Fields) -> dict[str, Any]:
    """Return the values of absent fields that differ from Graft's defaults."""
    values: dict[str, Any] = {"learning_rate": 3e-6, "learning_rate_warmup_steps": 200, "train_dtype": "FLOAT_16"}
    values |= {"timestep_distribution": "UNIFORM", "mse_strength": 1.0, "ema_decay": 0.999}
    if fields.get("training_method") == "LORA":
        values |= {"lora_rank": 16, "lora_alpha": 1.0, "layer_filter_preset": "full"}
        values |= {"text_encoder.train": True, "text_encoder_2.train": True} if of_unet(fields) else {}
    return values
