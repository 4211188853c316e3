"""Conversion of adapter files from other trainers to the host's keys.

Sources of the layouts: kohya sd-scripts (networks/lora.py), OneTrainer (modules/util/convert/lora), ai-toolkit
(toolkit/network_mixins.py), diffusers (loaders/lora_pipeline.py), peft (utils/save_and_load.py).
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

    from .peft_format import PeftAdapter

log = logging.getLogger(__name__)

# Prefixes of dotted module paths, from OneTrainer (its own and the OMI layout) and from diffusers' UNets, with kohya's.
_DOTTED = {
    "unet.": "lora_unet_",
    "lora_unet.": "lora_unet_",
    "lora_te.": "lora_te_",
    "lora_te1.": "lora_te1_",
    "lora_te2.": "lora_te2_",
    "clip_l.": "lora_te1_",
    "clip_g.": "lora_te2_",
}
_END = re.compile(
    r"\.(?P<end>lora_(?:down|up|mid)\.weight|lora_[AB]\.weight|lora\.(?:down|up)\.weight|alpha|dora_scale"
    r"|hada_\w+|lokr_\w+|diff|diff_b)$"
)
_KOHYA = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
}
# kohya's prefixes for models with several text encoders, by diffusers' component names.
_TEXT = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
# Prefix of embeddings that OneTrainer bundles with an adapter.
_BUNDLED = "bundle_emb."


def host_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors whose keys the host cannot read to kohya's keys. Keep all other keys.

    Leaves out bundled embeddings.

    Raises:
        ModelError: the file holds a DoRA in peft's form, which the host cannot read.
    """
    renamed = {}
    for name, tensor in tensors.items():
        if "lora_magnitude_vector" in name:
            raise ModelError(
                "The file holds a DoRA in peft's form, which ComfyUI cannot read without the model's weights.",
                "Load it with diffusers or peft, or use the kohya file of that training.",
                "adapter_name",
            )
        if name.startswith(_BUNDLED):
            log.warning("Graft: ignored the embedding %s in the adapter file.", name)
            continue
        renamed[_host_name(name)] = tensor
    return renamed


def _host_name(name: str) -> str:
    prefix = next((prefix for prefix in _DOTTED if name.startswith(prefix)), None)
    match = _END.search(name)
    # The host itself reads attention processors of older diffusers versions, and peft's names after a prefix.
    if prefix is None or match is None or ".processor." in name or "base_model." in name:
        return name
    path = name[len(prefix) : match.start()].replace(".", "_")
    end = match["end"]
    return f"{_DOTTED[prefix]}{path}.{_KOHYA.get(end, end)}"


def host_tensors(native: PeftAdapter) -> dict[str, torch.Tensor]:
    """Convert an adapter in peft's form to the host's keys, with its scales. Empty if the host has no such form.

    Raises:
        ModelError: the configuration has no scale for a layer.
    """
    tensors = {}
    for component, part in native.by_component().items():
        lacking = sorted({name.split(".lora_")[0] for name in part.tensors if ".lora_A." in name} - part.scales.keys())
        if lacking:
            raise ModelError(
                f"The adapter's configuration has no r or no alpha for its layer {lacking[0][:200]}.",
                "Put the configuration that belongs to the file next to it.",
                "adapter_name",
            )
        converted = _host_tensors(part, _TEXT.get(component, "") if len(native.text) > 1 else "lora_te_")
        if not converted:
            return {}
        tensors.update(converted)
    return tensors


def _host_tensors(native: PeftAdapter, text: str) -> dict[str, torch.Tensor]:
    """Convert the tensors of one component.

    Args:
        native: the component's adapter.
        text: kohya's prefix if the component is a text encoder.
    """
    import torch

    converted = {}
    for name, tensor in native.tensors.items():
        match = _END.search(name)
        # The host expects the three factors of a decomposed convolution in another order.
        if match is None or match["end"] == "lokr_t2":
            return {}
        place = name[: match.start()]
        end = _KOHYA.get(match["end"], match["end"])
        layer = f"transformer.{place}" if native.is_split else _host_layer(place, text)
        if end == "lokr_w1":
            # Readers ignore alpha if both factors are full matrices, so put the scale into the first.
            tensor = tensor * native.scales[place]
        elif end in ("lora_down.weight", "hada_w1_b"):
            converted[f"{layer}.alpha"] = torch.tensor(float(native.scales[place] * tensor.shape[0]))
        converted[f"{layer}.{end}"] = tensor
    return converted


def _host_layer(place: str, text: str) -> str:
    if place.startswith(("text_model.", "encoder.layers.")):
        return f"{text}text_model_" + place.removeprefix("text_model.").replace(".", "_")
    if place.startswith(("transformer_blocks.", "single_transformer_blocks.")):
        return f"transformer.{place}"
    return "lora_unet_" + place.replace(".", "_")
