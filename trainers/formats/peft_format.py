"""Adapters in peft's form: reading and writing of peft's folders and diffusers' LoRA files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RunError
from ..families import LayerSplit
from ..regex import Budget, PatternError, Patterns
from . import atomic, files, json_files
from .diffusers_split import split_layers
from .peft_config import check_config, check_kind, is_of_peft, place_of, starts_at_weight

if TYPE_CHECKING:
    import torch

# Types with a difference that depends on the base's weight.
_RELATIVE = ("DoRA", "OFT", "BOFT", "IA3")
CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
WEIGHTS = "adapter_model.safetensors"

_PEFT = "base_model.model."
_PREFIXES = {"": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
_TRANSFORMER = "transformer."
# Wrapper of CLIP's text transformer, in transformers up to 5.5, in encoders with a projection and in diffusers' files.
_WRAPPER = "text_model."
_PUBLISHED = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
# Blocks of SD3 and PixArt in diffusers, and of HunyuanDiT.
_SINGLE = re.compile(
    r"transformer_blocks\.\d+\.|blocks\.\d+\.(attn1\.(Wqkv|out_proj)|attn2\.(q_proj|kv_proj|out_proj))\."
)
_DIFFUSERS_TYPES = ("LORA",)
_NAMED = ("target_modules", "feedforward_modules", "rank_pattern", "alpha_pattern")
_LORA_CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "bias", "lora_bias")


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
        """Return the adapters by component name. The denoiser has the empty name, and is absent without tensors."""
        return {"": self, **self.text} if self.tensors else dict(self.text)

    @property
    def is_relative(self) -> bool:
        """Report whether the difference of a component depends on the base's weights."""
        parts = self.by_component().values()
        return any(part.method in _RELATIVE or starts_at_weight(part.config) for part in parts)

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of all components by their names in files, `<component> <name>` for text encoders."""
        parts = self.by_component().items()
        return {f"{of} {_as_saved(name)}".lstrip(): value for of, part in parts for name, value in part.tensors.items()}


def write_peft(folder: str, native: PeftAdapter, metadata: dict[str, str]) -> list[str]:
    """Write a folder for `PeftModel.from_pretrained`, with a subfolder for each text encoder.

    Returns:
        Paths of the weight files.
    """
    written = peft_files(native)
    with atomic.new_folder(folder) as temporary:
        for component, part in native.by_component().items():
            files.write_tensors(os.path.join(temporary, component, WEIGHTS), written[component], metadata)
            config = part.config
            if component:
                # peft matches the ends of names, and so these in both generations.
                config = {**config, **{name: _unwrapped(config[name]) for name in _NAMED if name in config}}
            json_files.write_json(os.path.join(temporary, component, CONFIG), config)
    return [os.path.join(folder, component, WEIGHTS) for component in written]


def peft_files(native: PeftAdapter) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of each component's weight file in peft's folder.

    Those of a text encoder are there twice: transformers named CLIP's layers with a wrapper up to 4.57, and names them
    without since. peft ignores the names that its model does not have.
    """
    written = {}
    for component, part in native.by_component().items():
        names = {name: (name,) for name in part.tensors}
        if component:
            names = {name: (_WRAPPER + name.removeprefix(_WRAPPER), name.removeprefix(_WRAPPER)) for name in names}
        written[component] = {
            _PEFT + _as_saved(other): part.tensors[name] for name, others in names.items() for other in others
        }
    return written


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
        native: adapter from `diffusers_form`.
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
        config["rank_pattern"] = config.get("rank_pattern") or {}
        config.update(lora_alpha=config["r"], alpha_pattern=config["rank_pattern"])
        described.update({prefix + name: value for name, value in config.items()})
    text = json.dumps(described, sort_keys=True)
    files.write_tensors(path, tensors, {**metadata, DIFFUSERS_CONFIG: text})


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

    Raises:
        ModelError: peft's configuration is missing or names an unknown adapter type.
    """
    budget = Budget()
    if all(name.startswith(_PEFT) for name in tensors):
        folder = os.path.dirname(path)
        has_config = os.path.basename(path) == WEIGHTS or os.path.exists(os.path.join(folder, CONFIG))
        if not has_config and _is_single_file(tensors):
            return None
        adapter = _native(path, _peft_config(path), tensors, _PEFT, budget)
        return replace(adapter, text=_peft_text(folder, budget), is_split=_is_transformer(adapter))
    if DIFFUSERS_CONFIG not in metadata or not any(is_of_peft(_named_by_peft(name)) for name in tensors):
        # Earlier versions of Graft kept the metadata in kohya's files.
        return None
    prefixes = [("", _TRANSFORMER), *_PREFIXES.items()]
    if not any(name.startswith(prefix) for name in tensors for _, prefix in prefixes):
        # diffusers' save_lora_adapter writes the names and the configuration of one network without a prefix.
        adapter = _native(path, _diffusers_config(path, metadata, ""), tensors, "", budget)
        return replace(adapter, is_split=_is_transformer(adapter))
    if not all(name.startswith(tuple(prefix for _, prefix in prefixes)) for name in tensors):
        return None
    parts = {}
    for component, prefix in prefixes:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own:
            adapter = _native(path, _diffusers_config(path, metadata, prefix), own, prefix, budget)
            adapter = replace(adapter, is_split=prefix == _TRANSFORMER)
            parts[component] = as_published(component, adapter)
    if "" in parts:
        return replace(parts.pop(""), text=parts)
    first = next(iter(parts.values()))
    return replace(first, tensors={}, scales={}, published=True, text=parts)


def _is_single_file(names: Collection[str]) -> bool:
    """Report whether ComfyUI reads these names of peft's without a configuration. It takes the rank as alpha."""
    paths = [name.removeprefix(_PEFT) for name in names]
    is_plain = all(path.endswith((".lora_A.weight", ".lora_B.weight")) for path in paths)
    return is_plain and any(map(_SINGLE.match, paths)) and not any(path.startswith("single_") for path in paths)


def _is_transformer(native: PeftAdapter) -> bool:
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in native.tensors)


def _peft_text(folder: str, budget: Budget) -> dict[str, PeftAdapter]:
    adapters = {}
    for component in _PREFIXES:
        path = os.path.join(folder, component, WEIGHTS)
        if component and os.path.exists(path):
            tensors, _ = files.read_tensors(path)
            native = _native(path, _peft_config(path), tensors, _PEFT, budget)
            adapters[component] = as_published(component, native)
    return adapters


def as_published(component: str, native: PeftAdapter) -> PeftAdapter:
    """Return a text encoder's adapter with layer names of present transformers versions, others unchanged."""
    if not component:
        return native
    # The encoder with a projection still wraps its layers. Files may hold both names of each.
    wrapper = "" if component == "text_encoder" else _WRAPPER
    tensors = {wrapper + name.removeprefix(_WRAPPER): value for name, value in native.tensors.items()}
    scales = {wrapper + name.removeprefix(_WRAPPER): value for name, value in native.scales.items()}
    return replace(native, tensors=tensors, scales=scales, published=True)


def _native(
    path: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], prefix: str, budget: Budget
) -> PeftAdapter:
    method = _method_of(config, path)
    held = {_named_by_peft(name[len(prefix) :]): tensor for name, tensor in tensors.items()}
    places = {place_of(name) for name in held}
    scales = _scales_of(places, config, path, budget)
    published = all(map(is_published, places))
    check_kind(config, held, path)
    return PeftAdapter(method, config, held, published, scales)


def _named_by_peft(name: str) -> str:
    """Return peft's name of a tensor. diffusers' training scripts have another for those of UNets."""
    name = name.replace(".default.", ".")
    return name.replace(".lora.down.weight", ".lora_A.weight").replace(".lora.up.weight", ".lora_B.weight")


def is_published(place: str) -> bool:
    """Report whether a path begins with a module of diffusers' UNets."""
    return bool(_PUBLISHED.match(place))


def _peft_config(path: str) -> dict[str, Any]:
    config_path = os.path.join(os.path.dirname(path), CONFIG)
    if not os.path.exists(config_path):
        raise ModelError(
            f"The file '{path}' has peft's layout, but its {CONFIG}, which holds the alpha, is missing.",
            f"Put the {CONFIG} that belongs to it into the same folder.",
            "adapter_name",
        )
    return check_config(json_files.read_json(config_path), config_path)


def _diffusers_config(path: str, metadata: dict[str, str], prefix: str) -> dict[str, Any]:
    try:
        fields = json_files.parse_json(metadata[DIFFUSERS_CONFIG])
    except ValueError as error:
        raise RunError(f"The metadata of '{path}' is damaged ({error}).", "Restore the file.") from error
    if not isinstance(fields, dict):
        raise RunError(f"The metadata of '{path}' is damaged (it is not an object).", "Restore the file.")
    config = {name[len(prefix) :]: value for name, value in fields.items() if name.startswith(prefix)}
    return check_config({"peft_type": "LORA", **config}, path)


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
