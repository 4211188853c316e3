"""Fields of kohya's sd-scripts and of their GUI kohya_ss.

Sources: `train_util.py`, `train_network.py`, `networks/`, `flux_train_utils.py` of sd-scripts 48d368f; `lora_gui.py` of
kohya_ss 45088f0.
"""

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
    betas,
    factor,
    is_off,
    is_on,
    min_snr,
    number,
    optimizer,
    same_as,
    shifted,
    split_arguments,
    table,
    warmup,
    whole,
)

TABLE = table(
    trainer="learning_rate learning_rate=unet_lr steps=max_train_steps batch_size=train_batch_size rank=network_dim "
    "seed",
    adapter="alpha=network_alpha dropout=network_dropout lora_plus_ratio=network_args.loraplus_lr_ratio "
    "lora_plus_ratio=network_args.loraplus_unet_lr_ratio",
    adapter_args="full_matrix=network_args.full_matrix decompose_both=network_args.decompose_both "
    "use_tucker=network_args.use_tucker use_tucker=network_args.use_cp dora_wd=network_args.dora_wd "
    "rank_dropout=network_args.rank_dropout module_dropout=network_args.module_dropout scale_weight_norms",
    optimizer="weight_decay=optimizer_args.weight_decay max_grad_norm accumulation=gradient_accumulation_steps "
    "schedule=lr_scheduler num_cycles=lr_scheduler_num_cycles power=lr_scheduler_power",
    objective="noise_offset noise_offset_random_strength adaptive_noise_scale input_perturbation=ip_noise_gamma "
    "min_timestep max_timestep loss=loss_type huber_c huber_schedule",
    memory="checkpointing=gradient_checkpointing compute_dtype=mixed_precision base_dtype=fp8_base "
    "base_dtype=fp8_base_unet offload=blocks_to_swap compile=torch_compile",
    run="name=output_name save_every=save_every_n_steps validation_fraction=validation_split "
    "validate_every=validate_every_n_steps",
    preview="every=sample_every_n_steps sampler_name=sample_sampler",
    dataset="resolution resolution=max_resolution repeats=dataset_repeats shuffle_tags=shuffle_caption keep_tokens "
    "caption_dropout=caption_dropout_rate tag_dropout=caption_tag_dropout_rate wildcards=enable_wildcard flip=flip_aug "
    "masks=alpha_mask folder=train_data_dir",
    read="network_args.algo network_args.preset network_train_unet_only multires_noise_iterations noise_offset_type "
    "sigmoid_scale discrete_flow_shift logit_mean logit_std mode_scale sdxl",
)
NOTES = {
    "max_train_epochs": EPOCHS,
    "epoch": EPOCHS,
    "network_weights": ADAPTER,
    "zero_terminal_snr": ZERO_SNR,
    "clip_skip": "Put CLIP Set Last Layer before the trainer.",
    "prior_loss_weight": "Graft Train DreamBooth has it.",
}
# The first that the name of a module or an algorithm contains; empty for types that Graft does not have.
_TYPES = {
    **dict.fromkeys(("dylora", "native", "lora_fa", "lora-fa"), ""),
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "IA3",
    "glora": "GLoRA",
    "boft": "BOFT",
    "oft": "OFT",
}
_PRESETS = {"full-lin": "all linear", "attn-mlp": "attention + feed-forward", "attn-only": "attention"}
_NO_FLOW = re.compile("min_snr_gamma|debiased|noise_offset(?!_type)|adaptive_noise|multires_noise_d|(min|max)_timestep")
_FLOW = ("timestep_sampling", "model_prediction_type", "discrete_flow_shift", "weighting_scheme", "t5xxl", "ae")


def is_flow(fields: Fields) -> bool:
    """Return True if the settings train a flow model. The GUI writes the fields of all models."""
    if "LoRA_type" in fields:
        return any(name.endswith("_checkbox") and name != "sdxl_checkbox" and is_on(fields, name) for name in fields)
    return any(name in fields for name in _FLOW)


def check(name: str, fields: Fields) -> None:
    """Refuse a field that the trainers of flow models do not read."""
    if _NO_FLOW.match(name) and is_flow(fields):
        raise SettingsError("sd-scripts does not use it for flow models.")


def _network(value: Any, fields: Fields) -> Converted:
    """Convert the type of network. LoRA without convolutions is on attention and feed-forward layers."""
    text = f"{value} {fields.get('network_args.algo', '')}".lower()
    lycoris = "lycoris" in text or str(value) == "LoCon"
    kind = next((kind for name, kind in _TYPES.items() if name in text), None)
    if kind == "" or fields.get("network_args.algo") == "full":
        raise SettingsError("Graft has no such type.")
    conv = lycoris or (is_on(fields, "network_args.conv_dim") and not is_flow(fields))
    dora = lycoris and is_on(fields, "network_args.dora_wd")
    targets = {**_PRESETS, "full": "all linear" if kind in ("OFT", "BOFT", "IA3", "GLoRA") else "linear + conv"}
    preset = str(fields.get("network_args.preset", "full")) if lycoris else "full" if conv else "attn-mlp"
    if preset not in targets:
        raise SettingsError("Graft does not know the layers of this preset.")
    kind = kind or ("DoRA" if dora else "LoRA with conv" if conv else "LoRA")
    return {"adapter.type": kind, "adapter.targets": targets[preset]}


def _text_encoder(value: Any, fields: Fields) -> Converted:
    """Convert the rate of the text encoder, which sd-scripts trains unless it is 0."""
    rates = value if isinstance(value, list) else [value]
    if is_on(fields, "network_train_unet_only") or all(map(is_off, rates)):
        return None
    if any(rate != rates[0] for rate in rates):
        raise SettingsError("Graft has one learning rate for all text encoders.")
    main = fields.get("unet_lr") if is_on(fields, "unet_lr") else fields.get("learning_rate")
    own = {} if number(rates[0]) == number(main) else {"adapter.text_encoder_learning_rate": rates[0]}
    return {"adapter.text_encoder": "on", **own}


def _warmup(value: Any, fields: Fields) -> Converted:
    if fields.get("lr_scheduler", "constant") == "constant":
        raise SettingsError("sd-scripts' constant schedule has no warm-up.")
    return warmup(value, fields)


def _decay(value: Any, fields: Fields) -> Converted:
    steps = number(value)
    return {"optimizer.decay_ratio": steps if steps < 1 else steps / number(fields.get("max_train_steps"))}


def _min_ratio(value: Any, fields: Fields) -> Converted:
    if fields.get("lr_scheduler") not in ("cosine_with_min_lr", "warmup_stable_decay"):
        raise SettingsError("sd-scripts does not use it with this schedule.")
    return {"optimizer.min_lr_ratio": value}


def _sampling(value: Any, fields: Fields) -> Converted:
    """Convert the timesteps of flow models. `sigma` counts levels from the noise."""
    if not is_flow(fields):
        return None
    std, shift = number(fields.get("sigmoid_scale", 1)), number(fields.get("discrete_flow_shift", 3))
    if value == "sigma" and fields.get("weighting_scheme") == "logit_normal":
        return shifted(shift, -number(fields.get("logit_mean", 0)), number(fields.get("logit_std", 1)))
    if value == "sigma" and fields.get("weighting_scheme") == "mode":
        return {"objective.timesteps": "mode", "objective.timestep_mode_scale": fields.get("mode_scale", 1.29)}
    if value in ("sigmoid", "shift"):
        return shifted(shift if value == "shift" else 1.0, 0.0, std)
    if value == "flux_shift":
        return {"objective.timesteps": "resolution-shifted", "objective.timestep_std": std}
    raise SettingsError(OWN_LEVELS)


def _scheme(value: Any, fields: Fields) -> None:
    if is_flow(fields) and value in ("sigma_sqrt", "cosmap"):
        raise SettingsError("Choose a weighting in Graft Objective Options.")


def _prompts(value: Any, fields: Fields) -> Converted:
    """Return the GUI's prompts, which have the same flags. sd-scripts has a file's name."""
    if re.fullmatch(r"\S.*\.(txt|toml|json)", str(value).strip()):
        raise SettingsError("Paste the file's prompts into Graft Preview Options.")
    return {"preview.prompts": value}


def _logger(value: Any, fields: Fields) -> Converted:
    if value not in ("tensorboard", "all"):
        raise SettingsError("Graft has no such choice.")
    return {"run.tensorboard": "on"}


CONVERTERS: dict[str, Converter] = {
    "network_module": _network,
    "LoRA_type": _network,
    "network_args.conv_dim": same_as("network_dim"),
    "network_args.conv_alpha": same_as("network_alpha"),
    "network_args.factor": factor,
    "text_encoder_lr": _text_encoder,
    "use_8bit_adam": lambda value, fields: {"optimizer.optimizer": "AdamW8bit"},
    "optimizer_type": optimizer,
    "optimizer": optimizer,
    "optimizer_args.betas": betas,
    "lr_warmup": lambda value, fields: _warmup(number(value) / 100, fields),
    "lr_warmup_steps": _warmup,
    "lr_decay_steps": _decay,
    "lr_scheduler_min_lr_ratio": _min_ratio,
    "debiased_estimation_loss": lambda value, fields: {"objective.weighting": "debiased"},
    "min_snr_gamma": min_snr,
    "multires_noise_discount": lambda value, fields: (
        {"objective.pyramid_discount": value} if is_on(fields, "multires_noise_iterations") else None
    ),
    "timestep_sampling": _sampling,
    "weighting_scheme": _scheme,
    "save_last_n_steps": lambda value, fields: {
        "run.keep_last": whole(value) // max(1, whole(fields.get("save_every_n_steps") or 1)) + 1
    },
    "log_with": _logger,
    "sample_prompts": _prompts,
}


def fields_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a file, or of one of the GUI, which has the arguments as fields."""
    for group in ("network_args", "optimizer_args"):
        if is_on(fields, group):
            fields |= {f"{group}.{name}": value for name, value in split_arguments(fields.pop(group)).items()}
    if "LoRA_type" not in fields:
        return fields
    kind = str(fields["LoRA_type"])
    fields.pop("multires_noise_iterations" if fields.get("noise_offset_type") != "Multires" else "noise_offset", None)
    if is_off(fields.get("unet_lr")) and is_off(fields.get("text_encoder_lr")):
        fields.pop("text_encoder_lr", None)
    # The GUI keeps values of types that are not chosen.
    conv, lokr, lycoris = re.search("LyCORIS|LoCon|LoHa|LoKr", kind), "LoKr" in kind, "LyCORIS" in kind
    fields["preset"] = fields.pop("LyCORIS_preset", "full")
    for names, used in (
        ("conv_dim conv_alpha use_tucker use_cp", conv),
        ("factor decompose_both", lokr),
        ("preset dora_wd", lycoris),
        ("rank_dropout module_dropout loraplus_lr_ratio loraplus_unet_lr_ratio", True),
    ):
        given = {f"network_args.{name}": fields.pop(name) for name in names.split() if name in fields}
        fields |= given if used else {}
    return fields


def defaults(fields: Fields) -> dict[str, Any]:
    """Return the values of absent fields that differ from Graft's defaults."""
    values: dict[str, Any] = {}
    if not fields.keys() & {"learning_rate", "unet_lr"}:
        values["learning_rate"] = 2e-6
    if not fields.keys() & {"max_train_epochs", "epoch"}:
        values["max_train_steps"] = 1600
    if fields.keys() & {"network_module", "network_dim", "LoRA_type"}:
        values |= {"network_dim": 4, "network_alpha": 1.0, "text_encoder_lr": fields.get("learning_rate", 2e-6)}
        values |= {} if "LoRA_type" in fields else {"network_module": "networks.lora"}
    if str(fields.get("optimizer_type", fields.get("optimizer"))).lower() == "adafactor":
        values["optimizer_args.relative_step"] = True
    if is_on(fields, "multires_noise_iterations"):
        values["multires_noise_discount"] = 0.3
    return values | ({"timestep_sampling": "sigma"} if is_flow(fields) else {})
