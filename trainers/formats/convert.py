"""Conversion of adapter files from other trainers to the host's keys.

Sources of the layouts: kohya sd-scripts (networks/lora.py), OneTrainer (modules/util/convert/lora), ai-toolkit
(toolkit/network_mixins.py), diffusers (loaders/lora_pipeline.py), peft (utils/save_and_load.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import ModelError
from .keys import ALPHA, BIAS, DORA, DOWN, UP, split
from .kohya import has_host_magnitudes
from .layer_paths import family_of_paths
from .layer_paths import place_of as layer_path
from .peft_format import PeftAdapter, as_published, is_published, place_of
from .published_layers import joint_path

if TYPE_CHECKING:
    import torch


# Prefixes of dotted module paths, from OneTrainer (its own and the OMI layout) and from diffusers' UNets, with kohya's.
_DOTTED = {
    "": "lora_unet_",
    "unet.": "lora_unet_",
    "lora_unet.": "lora_unet_",
    "lora_te.": "lora_te_",
    "lora_te1.": "lora_te1_",
    "lora_te2.": "lora_te2_",
    "clip_l.": "lora_te1_",
    "clip_g.": "lora_te2_",
}
_END = re.compile(
    r"\.(?P<end>lora_(?:down|up|mid)\.weight|lora_[AB]\.weight|lora\.(?:down|up)\.weight|lora_B\.bias|alpha|dora_scale"
    r"|hada_\w+|lokr_\w+|diff|diff_b)$"
)
_KOHYA = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_B.bias": "diff_b",
}
_TRANSFORMER = re.compile(r"(?:single_)?transformer_blocks\.")
# Tensors of a layer that take the scale, if readers would not know it.
_SCALED = ("lokr_w1", "lokr_w1_a", "lora_B.bias")
# kohya's prefixes for models with several text encoders, by diffusers' component names.
_TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


# Norms of rows: of peft (and so diffusers), and of ai-toolkit.
_MAGNITUDE = re.compile(r"\.(?:lora_magnitude_vector(?:\.default)?(?:\.weight)?|magnitude)$")
_BIAS = re.compile(r"\.lora_B(?:\.default)?\.bias$")
# Keys of the format that the host converts by itself (comfy/lora_convert.py).
_CONTROL = {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"}


def host_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors whose keys the host cannot read to kohya's keys. Keep all other keys.

    A bias takes the scale of its layer.
    """
    if tensors.keys() >= _CONTROL:
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        if match := _MAGNITUDE.search(name):
            layer = name[: match.start()]
            down = _factor(tensors, layer)
            ones = [1] * (1 if down is None else down.dim() - 1)
            renamed[_host_name(f"{layer}.dora_scale")] = tensor.reshape(-1, *ones)
        elif match := _BIAS.search(name):
            layer = name[: match.start()]
            down, alpha = _factor(tensors, layer), tensors.get(f"{layer}.alpha")
            scale = 1.0 if down is None or alpha is None else float(alpha) / down.shape[0]
            renamed[_host_name(f"{layer}.diff_b")] = tensor * scale
        else:
            renamed[_host_name(name)] = tensor
    return renamed


def _factor(tensors: dict[str, torch.Tensor], layer: str) -> torch.Tensor | None:
    """Return the first factor of a LoRA layer, [r, in, ...]; None if it has another name."""
    names = (f"{layer}.{end}.weight" for end in ("lora_A", "lora_A.default", "lora_down", "lora.down"))
    return next((tensors[name] for name in names if name in tensors), None)


def _host_name(name: str) -> str:
    prefix = next((prefix for prefix in _DOTTED if prefix and name.startswith(prefix)), None)
    if prefix is None and is_published(name):
        prefix = ""
    match = _END.search(name)
    # The host itself reads attention processors of older diffusers versions, and peft's names after a prefix.
    if prefix is None or match is None or ".processor." in name or "base_model." in name:
        return name
    path = name[len(prefix) : match.start()].replace(".", "_")
    end = match["end"]
    return f"{_DOTTED[prefix]}{path}.{_KOHYA.get(end, end)}"


def native_of(adapter: Mapping[str, torch.Tensor]) -> PeftAdapter | None:
    """Return a LoRA or DoRA on diffusers' layers of a transformer in peft's form. None for any other adapter.

    Files without metadata have this layout. Their alpha is the rank, unless the file holds another.
    """
    parts: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for name, held in split(adapter)[0].items():
        if not {UP, DOWN} <= held.keys() <= {UP, DOWN, ALPHA, DORA, BIAS}:
            return None
        component, path = layer_path(name)
        parts.setdefault(component, {})[path] = held
    has_magnitudes = any(DORA in held for held in parts.get("", {}).values())
    if not any(map(_TRANSFORMER.match, parts.get("", ()))) or (has_magnitudes and has_host_magnitudes(adapter)):
        return None
    adapters = {component: _native_of(held) for component, held in parts.items()}
    text = {component: as_published(component, part) for component, part in adapters.items() if component}
    return replace(adapters[""], text=text, is_split=True)


def _native_of(layers: dict[str, dict[str, torch.Tensor]]) -> PeftAdapter:
    tensors, scales = {}, {}
    for place, held in layers.items():
        rank = len(held[DOWN])
        scales[place] = float(held[ALPHA]) / rank if ALPHA in held else 1.0
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = held[DOWN].float(), held[UP].float()
        if DORA in held:
            tensors[f"{place}.lora_magnitude_vector.weight"] = held[DORA].float()
        if BIAS in held:
            tensors[f"{place}.lora_B.bias"] = held[BIAS].float()
    is_dora = any(DORA in held for held in layers.values())
    return PeftAdapter("DoRA" if is_dora else "LoRA", {"peft_type": "LORA"}, tensors, False, scales)


def host_tensors(native: PeftAdapter) -> dict[str, torch.Tensor]:
    """Convert an adapter in peft's form to the host's keys, with its scales.

    Empty if the host has no such form, or if the difference depends on the model's weights.

    Raises:
        ModelError: the configuration has no scale for a layer.
    """
    for part in native.by_component().values():
        lacking = sorted({name.split(".lora_")[0] for name in part.tensors if ".lora_A." in name} - part.scales.keys())
        if lacking:
            raise ModelError(
                f"The adapter's configuration has no r or no alpha for its layer {lacking[0][:200]}.",
                "Put the configuration that belongs to the file next to it.",
                "adapter_name",
            )
    if native.is_relative:
        # Refuse at once what `host_places` cannot name.
        host_places(native)
        return {}
    tensors = {}
    for component, part in native.by_component().items():
        tensors.update(_host_tensors(part, _text_prefix(native, component)))
    return tensors


def host_places(native: PeftAdapter) -> dict[str, tuple[PeftAdapter, str]]:
    """Return (component's adapter, path) of each layer by the host's name of it.

    Raises:
        ModelError: diffusers' layer is a part of the checkpoint's, and the host has no name for it.
    """
    places = {}
    for component, part in native.by_component().items():
        paths = sorted({place_of(name) for name in part.tensors})
        family = "" if component else family_of_paths(paths)
        for path in paths:
            own = _own_path(family, path, part.method)
            places[_host_layer(part, own, _text_prefix(native, component))] = part, path
    return places


def _own_path(family: str, path: str, method: str) -> str:
    """Return the checkpoint's path of a layer of Wan or Z-Image, for which the host has no names of diffusers."""
    whole = joint_path(family, path) if family in ("Wan", "Z-Image") else None
    if whole is not None and len(whole[1]) > 1:
        raise ModelError(
            f"The adapter's layer {path[:200]} is a part of the checkpoint's layer {whole[0]}, and Graft cannot apply "
            f"{method} to a part.",
            "Load it with peft onto diffusers' pipeline, or merge it there and take the difference.",
            "adapter_name",
        )
    return path if whole is None else whole[0]


def _text_prefix(native: PeftAdapter, component: str) -> str:
    """Return kohya's prefix of a text encoder's layers. It has no number if the model has one text encoder."""
    return _TEXT.get(component, "") if len(native.text) > 1 or component == "text_encoder_2" else "lora_te_"


def _host_tensors(native: PeftAdapter, text: str) -> dict[str, torch.Tensor]:
    """Convert the tensors of one component; `text` is kohya's prefix of a text encoder."""
    import torch

    converted = {}
    for name, tensor in native.tensors.items():
        match = _END.search(name)
        place = name[: match.start()]
        end = _KOHYA.get(match["end"], match["end"])
        layer = _host_layer(native, place, text)
        if match["end"] in _SCALED:
            # Readers ignore alpha if both factors of LoKr are full matrices, so put the scale into the first.
            tensor = tensor * native.scales[place]
        elif end in ("lora_down.weight", "hada_w1_b"):
            converted[f"{layer}.alpha"] = torch.tensor(float(native.scales[place] * tensor.shape[0]))
        converted[f"{layer}.{end}"] = tensor
    return converted


def _host_layer(native: PeftAdapter, place: str, text: str) -> str:
    if native.is_split or place.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return f"transformer.{place}"
    if place.startswith(("text_model.", "encoder.layers.")):
        return f"{text}text_model_" + place.removeprefix("text_model.").replace(".", "_")
    return "lora_unet_" + place.replace(".", "_")
