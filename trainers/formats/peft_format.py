"""Adapters in peft's form: reading and writing of peft's folders and diffusers' LoRA files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RunError
from ..families import LayerSplit
from ..regex import Budget, PatternError, Patterns
from . import atomic, files, json_files
from .diffusers_split import split_layers

if TYPE_CHECKING:
    import torch

# Limit on ranks and alphas: far beyond useful values, and safe to multiply in float32.
_LARGEST = 1e9

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PEFT = "base_model.model."
# Key prefixes in a diffusers file, by component.
_PREFIXES = {"": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
_TRANSFORMER = "transformer."
# Wrapper of CLIP's text transformer, in transformers up to 5.5, in encoders with a projection and in diffusers' files.
_WRAPPER = "text_model."
# Top-level modules of UNets in diffusers.
_PUBLISHED = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
# peft types that diffusers' own loader accepts.
_DIFFUSERS_TYPES = ("LORA",)
_LORA_CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "bias")


@dataclass(frozen=True)
class PeftAdapter:
    """Adapter in peft's form.

    Attributes:
        method: name of the training method.
        config: content of `adapter_config.json`.
        tensors: float32 tensors on the CPU by `<module path>.<peft's name>`.
        published: True if module paths are diffusers', False if they are the checkpoint's own.
        scales: effective scale of the low-rank product by module path; empty if there is none.
        text: adapters of the text encoders, by component name in diffusers' pipelines.
        splits: diffusers' layers by the checkpoint's module path; empty if they are unknown.
        is_split: whether the tensors belong to the layers in `splits`.
    """

    method: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    published: bool
    scales: dict[str, float]
    text: dict[str, PeftAdapter] = field(default_factory=dict)
    splits: dict[str, tuple[LayerSplit, ...]] = field(default_factory=dict)
    is_split: bool = False

    def by_component(self) -> dict[str, PeftAdapter]:
        """Return the adapters by component name. The denoiser has the empty name."""
        return {"": self, **self.text}

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of all components, with names `<component> <name>` for text encoders."""
        parts = self.by_component().items()
        return {f"{of} {name}".lstrip(): tensor for of, part in parts for name, tensor in part.tensors.items()}


def write_peft(folder: str, native: PeftAdapter, metadata: dict[str, str]) -> list[str]:
    """Write a folder for `PeftModel.from_pretrained`, with a subfolder for each text encoder.

    Returns:
        Paths of the weight files.
    """
    with atomic.new_folder(folder) as temporary:
        for component, part in native.by_component().items():
            tensors = {_PEFT + _as_saved(name): tensor for name, tensor in part.tensors.items()}
            files.write_tensors(os.path.join(temporary, component, WEIGHTS), tensors, metadata)
            json_files.write_json(os.path.join(temporary, component, CONFIG), part.config)
    return [os.path.join(folder, component, WEIGHTS) for component in native.by_component()]


def diffusers_form(native: PeftAdapter) -> PeftAdapter:
    """Return the adapter for diffusers' layers.

    Raises:
        ModelError: diffusers' loader does not know the adapter type, or diffusers' layers of this model are unknown.
    """
    if native.config["peft_type"] not in _DIFFUSERS_TYPES:
        raise ModelError(
            f"diffusers' loader does not know the adapter type {native.method}.",
            "Save it as 'peft' and load it with peft onto the pipeline's UNet.",
            "format",
        )
    if native.published or native.is_split:
        return native
    if not native.splits:
        raise ModelError(
            "diffusers names or splits this model's layers in an unknown way.",
            "Save it as 'kohya' or as 'peft'.",
            "format",
        )
    return split_layers(native)


def write_diffusers(path: str, native: PeftAdapter, metadata: dict[str, str]) -> None:
    """Write a file for diffusers' `load_lora_weights`. It multiplies B by the scale, so that no reader can miss it.

    Args:
        path: path of the file.
        native: adapter from `diffusers_form`.
        metadata: metadata of the file.
    """
    tensors, described = {}, {}
    for component, part in native.by_component().items():
        prefix = _TRANSFORMER if part.is_split else _PREFIXES[component]
        for name, tensor in part.tensors.items():
            place = name.split(".lora_")[0]
            scaled = tensor * part.scales[place] if ".lora_B." in name else tensor
            wrapped = _WRAPPER + name.removeprefix(_WRAPPER) if component else name
            tensors[prefix + _as_saved(wrapped)] = scaled
        config = {name: _unwrapped(part.config[name]) for name in _LORA_CONFIG if name in part.config}
        config.update(lora_alpha=config["r"], alpha_pattern=config["rank_pattern"])
        described.update({prefix + name: value for name, value in config.items()})
    text = json.dumps(described, sort_keys=True)
    files.write_tensors(path, tensors, {**metadata, "lora_adapter_metadata": text})


def _unwrapped(value: Any) -> Any:
    """Return a config value with CLIP's wrapper removed from layer names, so that they match with and without it."""
    if isinstance(value, dict):
        return {name.removeprefix(_WRAPPER): number for name, number in value.items()}
    return [name.removeprefix(_WRAPPER) for name in value] if isinstance(value, list) else value


def _as_saved(name: str) -> str:
    # peft holds DoRA's magnitude as a module but saves it as a plain tensor.
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def read_native(path: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> PeftAdapter | None:
    """Return the adapter in a file with peft's or diffusers' layout, None for any other layout.

    Args:
        path: path of the file; peft's configuration is in the same folder.
        tensors: tensors of the file.
        metadata: metadata of the file.

    Raises:
        ModelError: peft's configuration is missing or names an unknown adapter type.
    """
    budget = Budget()
    if all(name.startswith(_PEFT) for name in tensors):
        adapter = _native(path, _peft_config(path), tensors, _PEFT, budget)
        return replace(adapter, text=_peft_text(os.path.dirname(path), budget))
    prefixes = [("", _TRANSFORMER), *_PREFIXES.items()]
    if "lora_adapter_metadata" not in metadata or not all(
        name.startswith(tuple(prefix for _, prefix in prefixes)) for name in tensors
    ):
        return None
    parts = {}
    for component, prefix in prefixes:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own:
            adapter = _native(path, _diffusers_config(path, metadata, prefix), own, prefix, budget)
            adapter = replace(adapter, is_split=prefix == _TRANSFORMER)
            parts[component] = _as_published(component, adapter)
    # If the file has only text encoder layers, the host reads it as it is.
    return replace(parts.pop(""), text=parts) if "" in parts else None


def _peft_text(folder: str, budget: Budget) -> dict[str, PeftAdapter]:
    """Read the text encoders' adapters from the subfolders of peft's folder."""
    adapters = {}
    for component in _PREFIXES:
        path = os.path.join(folder, component, WEIGHTS)
        if component and os.path.exists(path):
            tensors, _ = files.read_tensors(path)
            native = _native(path, _peft_config(path), tensors, _PEFT, budget)
            adapters[component] = _as_published(component, native)
    return adapters


def _as_published(component: str, native: PeftAdapter) -> PeftAdapter:
    """Return a text encoder's adapter with layer names of present transformers versions, others unchanged."""
    if not component:
        return native
    cut = len(_WRAPPER) if component == "text_encoder" else 0
    tensors = {name[cut:] if name.startswith(_WRAPPER) else name: value for name, value in native.tensors.items()}
    scales = {name[cut:] if name.startswith(_WRAPPER) else name: value for name, value in native.scales.items()}
    return replace(native, tensors=tensors, scales=scales, published=True)


def _native(
    path: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], prefix: str, budget: Budget
) -> PeftAdapter:
    held = {name[len(prefix) :].replace(".default.", "."): tensor for name, tensor in tensors.items()}
    places = {_place_of(name) for name in held}
    scales = _scales_of(places, config, path, budget)
    published = all(_PUBLISHED.match(place) for place in places)
    return PeftAdapter(_method_of(config, path), config, held, published, scales)


def _place_of(name: str) -> str:
    return re.split(r"\.(?:lora_|hada_|lokr_|oft_|boft_|ia3_)", name)[0]


def _peft_config(path: str) -> dict[str, Any]:
    config_path = os.path.join(os.path.dirname(path), CONFIG)
    if not os.path.exists(config_path):
        raise ModelError(
            f"The file '{path}' has peft's layout, but its {CONFIG}, which holds the alpha, is missing.",
            f"Put the {CONFIG} that belongs to it into the same folder.",
            "adapter_name",
        )
    return _checked(json_files.read_json(config_path), config_path)


def _diffusers_config(path: str, metadata: dict[str, str], prefix: str) -> dict[str, Any]:
    try:
        fields = json_files.parse_json(metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise RunError(f"The metadata of '{path}' is damaged ({error}).", "Restore the file.") from error
    if not isinstance(fields, dict):
        raise RunError(f"The metadata of '{path}' is damaged (it is not an object).", "Restore the file.")
    config = {name[len(prefix) :]: value for name, value in fields.items() if name.startswith(prefix)}
    return _checked({"peft_type": "LORA", **config}, path)


def _checked(config: Any, path: str) -> dict[str, Any]:
    """Check a peft configuration from a file and return it.

    Raises:
        ModelError: a field that Graft reads has an invalid value.
    """
    if not isinstance(config, dict):
        raise _invalid_config(path, "it is not an object")
    if not isinstance(config.get("peft_type", ""), str):
        raise _invalid_config(path, f"peft_type is {config['peft_type']!r:.40}")
    rank = config.get("r")
    if rank is not None and (type(rank) is not int or not 0 <= rank <= 2**20):
        raise _invalid_config(path, f"r is {rank!r:.40}")
    for name in ("lora_alpha", "alpha"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise _invalid_config(path, f"{name} is {config[name]!r:.40}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is not None and not isinstance(pattern, dict):
            raise _invalid_config(path, f"{name} is not an object")
        for key, value in (pattern or {}).items():
            # A rank is a divisor, so it must be positive.
            if not _is_number(value) or (name == "rank_pattern" and value <= 0):
                raise _invalid_config(path, f"the {name} of {key[:80]} is {value!r:.40}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _invalid_config(path: str, why: str) -> ModelError:
    return ModelError(
        f"The configuration of the adapter '{path}' is invalid ({why}).",
        "Restore it, or choose another adapter.",
        "adapter_name",
    )


def _method_of(config: dict[str, Any], path: str) -> str:
    kind = config.get("peft_type")
    if kind == "LORA":
        return "DoRA" if config.get("use_dora") else "rsLoRA" if config.get("use_rslora") else "LoRA"
    known = {"LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT", "BOFT": "BOFT", "IA3": "IA3"}
    if kind not in known:
        raise ModelError(
            f"The adapter '{path}' has peft's type {kind}, which Graft does not support.",
            f"Graft supports LORA, {', '.join(known)}. Load others with peft itself.",
            "adapter_name",
        )
    return known[kind]


def _scales_of(places: set[str], config: dict[str, Any], path: str, budget: Budget) -> dict[str, float]:
    """Return the effective scale of each layer by peft's rules, empty if the adapter type has no scale."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    if not config.get("r") or alpha is None:
        return {}
    rank_of = _by_pattern(places, config, "rank_pattern", config["r"], path, budget)
    alpha_of = _by_pattern(places, config, "alpha_pattern", alpha, path, budget)
    root = 0.5 if config.get("use_rslora") else 1
    return {place: alpha_of[place] / rank_of[place] ** root for place in places}


def _by_pattern(
    places: set[str], config: dict[str, Any], name: str, default: float, path: str, budget: Budget
) -> dict[str, float]:
    """Return each layer's value from `rank_pattern` or `alpha_pattern`: the first key that matches its path's end.

    Raises:
        ModelError: a key is not a usable regular expression.
    """
    pattern = config.get(name)
    if not pattern:
        return dict.fromkeys(places, default)
    values = list(pattern.values())
    try:
        keys = Patterns(list(pattern), whole=True, budget=budget)
        matches = {place: keys.first(place) for place in places}
    except PatternError as error:
        key = f"The key {error.pattern[:80]!r} {error.message}." if error.pattern else error.message
        raise ModelError(
            f"The {name} of the adapter '{path}' cannot be used. {key}",
            "Save it again with the layers' full paths as keys, or choose another adapter.",
            "adapter_name",
        ) from error
    return {place: default if number is None else values[number] for place, number in matches.items()}
