"""An adapter as peft has it, beside the form the host reads: peft's folders and diffusers' files, both ways."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, RunError
from ..families import LayerSplit
from ..regex import PatternError, Patterns
from . import files
from .diffusers_split import cut

if TYPE_CHECKING:
    import torch

# Of what scales a layer: far beyond what is of use, and within what float32 can multiply.
_LARGEST = 1e9
# States of all keys of a pattern over all layers: a key for each layer of a large model takes a tenth.
_MOST_LOOKED_AT = 50_000_000

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PEFT = "base_model.model."
# The prefixes of a diffusers file, by component.
_PREFIXES = {"": "unet.", "text_encoder": "text_encoder.", "text_encoder_2": "text_encoder_2."}
_TRANSFORMER = "transformer."
# Around CLIP's text transformer, up to transformers 5.5 and in encoders with a projection; diffusers' files have it.
_WRAPPER = "text_model."
# The top modules of the UNets that diffusers publishes.
_PUBLISHED = re.compile(r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\b")
# What diffusers' own loader takes.
_DIFFUSERS_TYPES = ("LORA",)
_LORA_CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_dora", "bias")


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in peft's own terms.

    Attributes:
        method: key into the methods.
        config: what `adapter_config.json` holds.
        tensors: by `<module path>.<peft's name>`, float32 on the CPU.
        published: whether paths are those of the model as diffusers publishes it; otherwise the checkpoint's own.
        scales: by module path, the effective scale of the low-rank product; empty where there is none.
        text: the same of each text encoder, by its component's name in diffusers' pipelines.
        cuts: by the checkpoint's own path, the layers that diffusers has for it; empty where that is not known.
        is_cut: whether paths are of those layers.
    """

    method: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    published: bool
    scales: dict[str, float]
    text: dict[str, PeftAdapter] = field(default_factory=dict)
    cuts: dict[str, tuple[LayerSplit, ...]] = field(default_factory=dict)
    is_cut: bool = False

    def by_component(self) -> dict[str, PeftAdapter]:
        """All of it by component; the denoiser's is the empty one."""
        return {"": self, **self.text}

    def all_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of all components, by `<component> <name>` for a text encoder's."""
        parts = self.by_component().items()
        return {f"{of} {name}".lstrip(): tensor for of, one in parts for name, tensor in one.tensors.items()}


def write_peft(folder: str, native: PeftAdapter, metadata: dict[str, str]) -> list[str]:
    """A folder that `PeftModel.from_pretrained` takes, one in it for each text encoder; the paths of the weights."""
    with files.new_folder(folder) as temporary:
        for component, one in native.by_component().items():
            tensors = {_PEFT + _as_saved(name): tensor for name, tensor in one.tensors.items()}
            files.write_tensors(os.path.join(temporary, component, WEIGHTS), tensors, metadata)
            files.write_json(os.path.join(temporary, component, CONFIG), one.config)
    return [os.path.join(folder, component, WEIGHTS) for component in native.by_component()]


def diffusers_form(native: PeftAdapter) -> PeftAdapter:
    """The adapter on the layers that diffusers has.

    Raises:
        ModelError: diffusers has no such type, or it is not known how it cuts the model.
    """
    if native.config["peft_type"] not in _DIFFUSERS_TYPES:
        raise ModelError(
            f"diffusers' loader does not know the adapter type {native.method}.",
            "Save it as 'peft' and load it by peft onto the pipeline's UNet.",
            "format",
        )
    if native.published or native.is_cut:
        return native
    if not native.splits:
        raise ModelError(
            "This model's layers have other names, or are cut otherwise, in diffusers.",
            "Save it as 'kohya' or as 'peft'.",
            "format",
        )
    return cut(native)


def write_diffusers(path: str, native: PeftAdapter, metadata: dict[str, str]) -> None:
    """A file that diffusers' `load_lora_weights` takes, its scale worked into B so that no reader can miss it.

    Args:
        native: as `diffusers_form` has it.
    """
    tensors, described = {}, {}
    for component, one in native.by_component().items():
        prefix = _TRANSFORMER if one.is_cut else _PREFIXES[component]
        for name, tensor in one.tensors.items():
            place = name.split(".lora_")[0]
            scaled = tensor * one.scales[place] if ".lora_B." in name else tensor
            wrapped = _WRAPPER + name.removeprefix(_WRAPPER) if component else name
            tensors[prefix + _as_saved(wrapped)] = scaled
        config = {name: _unwrapped(one.config[name]) for name in _LORA_CONFIG if name in one.config}
        config.update(lora_alpha=config["r"], alpha_pattern=config["rank_pattern"])
        described.update({prefix + name: value for name, value in config.items()})
    text = json.dumps(described, sort_keys=True)
    files.write_tensors(path, tensors, {**metadata, "lora_adapter_metadata": text})


def _unwrapped(value: Any) -> Any:
    """A value of a configuration with layers named by what CLIP's paths end in, with and without the wrapper."""
    if isinstance(value, dict):
        return {name.removeprefix(_WRAPPER): number for name, number in value.items()}
    return [name.removeprefix(_WRAPPER) for name in value] if isinstance(value, list) else value


def _as_saved(name: str) -> str:
    # peft keeps a magnitude as a module and saves it as a plain tensor.
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def read_native(path: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> PeftAdapter | None:
    """What a file of peft's or diffusers' layout holds, None for any other layout.

    Args:
        path: of the file; peft's configuration lies beside it.

    Raises:
        ModelError: peft's configuration is missing, or is of a type that is not known here.
    """
    if all(name.startswith(_PEFT) for name in tensors):
        found = _native(path, _peft_config(path), tensors, _PEFT)
        return replace(found, text=_peft_text(os.path.dirname(path)))
    prefixes = [("", _TRANSFORMER), *_PREFIXES.items()]
    if "lora_adapter_metadata" not in metadata or not all(
        name.startswith(tuple(prefix for _, prefix in prefixes)) for name in tensors
    ):
        return None
    parts = {}
    for component, prefix in prefixes:
        own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own:
            found = _native(path, _diffusers_config(path, metadata, prefix), own, prefix)
            found = replace(found, is_cut=prefix == _TRANSFORMER)
            parts[component] = _as_published(component, found)
    # What is a text encoder's alone is read by the host as it is.
    return replace(parts.pop(""), text=parts) if "" in parts else None


def _peft_text(folder: str) -> dict[str, PeftAdapter]:
    """What lies in the folders inside peft's for the text encoders."""
    found = {}
    for component in _PREFIXES:
        path = os.path.join(folder, component, WEIGHTS)
        if component and os.path.exists(path):
            tensors, _ = files.read_tensors(path)
            found[component] = _as_published(component, _native(path, _peft_config(path), tensors, _PEFT))
    return found


def _as_published(component: str, native: PeftAdapter) -> PeftAdapter:
    """A text encoder's with its layers' names as transformers has them now; anything else as it is."""
    if not component:
        return native
    cut = len(_WRAPPER) if component == "text_encoder" else 0
    tensors = {name[cut:] if name.startswith(_WRAPPER) else name: value for name, value in native.tensors.items()}
    scales = {name[cut:] if name.startswith(_WRAPPER) else name: value for name, value in native.scales.items()}
    return replace(native, tensors=tensors, scales=scales, published=True)


def _native(path: str, config: dict[str, Any], tensors: dict[str, torch.Tensor], prefix: str) -> PeftAdapter:
    held = {name[len(prefix) :].replace(".default.", "."): tensor for name, tensor in tensors.items()}
    places = {_place_of(name) for name in held}
    scales = _scales_of(places, config, path)
    published = all(_PUBLISHED.match(place) for place in places)
    return PeftAdapter(_method_of(config, path), config, held, published, scales)


def _place_of(name: str) -> str:
    return re.split(r"\.(?:lora_|hada_|lokr_|oft_|boft_|ia3_)", name)[0]


def _peft_config(path: str) -> dict[str, Any]:
    beside = os.path.join(os.path.dirname(path), CONFIG)
    if not os.path.exists(beside):
        raise ModelError(
            f"The file '{path}' is peft's and lies without its {CONFIG}, which holds its alpha.",
            f"Put the {CONFIG} it came with beside it.",
            "adapter_name",
        )
    return _checked(files.read_json(beside), beside)


def _diffusers_config(path: str, metadata: dict[str, str], prefix: str) -> dict[str, Any]:
    try:
        found = files.parse_json(metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise RunError(f"The metadata of '{path}' is damaged ({error}).", "Restore the file.") from error
    if not isinstance(found, dict):
        raise RunError(f"The metadata of '{path}' is damaged (no object).", "Restore the file.")
    config = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
    return _checked({"peft_type": "LORA", **config}, path)


def _checked(config: Any, path: str) -> dict[str, Any]:
    """peft's configuration as it comes from a file.

    Raises:
        ModelError: something that is read of it is of another kind.
    """
    if not isinstance(config, dict):
        raise _strange(path, "no object")
    rank = config.get("r")
    if rank is not None and (type(rank) is not int or not 0 <= rank <= 2**20):
        raise _strange(path, f"r is {rank!r:.40}")
    for name in ("lora_alpha", "alpha"):
        if config.get(name) is not None and not _is_number(config[name]):
            raise _strange(path, f"{name} is {config[name]!r:.40}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        if pattern is not None and not isinstance(pattern, dict):
            raise _strange(path, f"{name} is no object")
        for key, value in (pattern or {}).items():
            # A rank divides.
            if not _is_number(value) or (name == "rank_pattern" and value <= 0):
                raise _strange(path, f"the {name} of {key[:80]} is {value!r:.40}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _strange(path: str, why: str) -> ModelError:
    return ModelError(
        f"The configuration of the adapter '{path}' is not peft's ({why}).",
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
            f"The adapter '{path}' is of peft's type {kind}.",
            f"Known are LORA, {', '.join(known)}; load others with peft itself.",
            "adapter_name",
        )
    return known[kind]


def _scales_of(places: set[str], config: dict[str, Any], path: str) -> dict[str, float]:
    """Effective scales of layers by peft's rules; none where the type has none."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    if not config.get("r") or alpha is None:
        return {}
    rank_of = _by_pattern(places, config, "rank_pattern", config["r"], path)
    alpha_of = _by_pattern(places, config, "alpha_pattern", alpha, path)
    root = 0.5 if config.get("use_rslora") else 1
    return {place: alpha_of[place] / rank_of[place] ** root for place in places}


def _by_pattern(places: set[str], config: dict[str, Any], name: str, default: float, path: str) -> dict[str, float]:
    """The value of each layer: of the first key of a pattern of peft's that its path ends with.

    Raises:
        ModelError: a key is no regular expression that can be used.
    """
    pattern = config.get(name)
    if not pattern:
        return dict.fromkeys(places, default)
    values = list(pattern.values())
    try:
        keys = Patterns(list(pattern), whole=True, budget=_MOST_LOOKED_AT)
        found = {place: keys.first(place) for place in places}
    except PatternError as error:
        key = f"The key {error.pattern[:80]!r} {error.message}." if error.pattern else error.message
        raise ModelError(
            f"The {name} of the adapter '{path}' cannot be used. {key}",
            "Save it anew with the layers' whole paths as keys, or choose another adapter.",
            "adapter_name",
        ) from error
    return {place: default if number is None else values[number] for place, number in found.items()}
