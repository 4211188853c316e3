"""Adapters in the form that a format to save has: kohya's and LyCORIS' tensors, or peft's."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ModelError
from .keys import ALPHA, BIAS, DORA, DOWN, UP, WHOLE, split
from .kohya import (
    LYCORIS_NETWORK,
    RANKED,
    has_host_magnitudes,
    kohya_form,
    network_fields,
    with_alphas,
    with_unit_scales,
)
from .peft_config import starts_at_weight
from .peft_form import peft_form
from .peft_format import PeftAdapter, diffusers_form

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_CORRECTED = "the magnitudes in a DoRA's kohya file are corrected for ComfyUI's formula, and their own are unknown"
_RETRAIN = "Connect the model that it was trained on, or choose 'kohya'."
# The alpha of a LoKr with a full matrix has no effect; LyCORIS only needs one.
_RANKED = (*RANKED, "lokr_w2")


def file_form(adapter: Mapping[str, torch.Tensor], format: str) -> tuple[Mapping[str, torch.Tensor], dict[str, str]]:
    """Return (tensors of a file in kohya's or LyCORIS' form, the metadata fields that describe its network).

    Raises:
        ModelError: the format has no form for the adapter.
    """
    if not isinstance(adapter, dict):
        # A full fine-tune, whose differences are computed one at a time.
        if format == "LyCORIS":
            raise _refusal(format, "it is a full fine-tune")
        return adapter, {}
    metadata, bundled = getattr(adapter, "metadata", {}), getattr(adapter, "bundled", {})
    is_corrected = _is_corrected(adapter)
    if not adapter and format == "kohya":
        # ComfyUI would apply its own formula to the magnitudes of peft.
        why = f"{adapter.native.method} in peft's form depends on the model's weights"
        raise _refusal(format, why, "Connect the model that it was trained on, or choose 'LyCORIS' or 'peft'.")
    tensors = dict(adapter) if adapter else from_peft(adapter.native, format)
    if format == "LyCORIS" and is_corrected:
        tensors = _with_makers_magnitudes(adapter)
    has_makers_magnitudes = any(name.endswith(DORA) for name in tensors) and not is_corrected
    limits = _host_limits(tensors, is_of_other_node=not hasattr(adapter, "made_by"))
    if format == "LyCORIS":
        tensors.update(limits)
        limits = {}
    # The names tell readers whose limit it is.
    kept = {key: tensors[key] for key in tensors if f"{key.rpartition('.')[0]}.{ALPHA}" in limits}
    tensors = {**kept, **kohya_form({key: value for key, value in tensors.items() if key not in kept}, metadata)}
    tensors = with_alphas(tensors, _RANKED)
    is_lycoris = format == "LyCORIS" or has_makers_magnitudes or any(name.startswith("lycoris_") for name in tensors)
    if format == "LyCORIS":
        _check_biases(tensors)
        tensors = with_unit_scales(tensors)
    fields = _fields(network_fields(tensors, is_lycoris))
    if format == "kohya" and (not has_makers_magnitudes or LYCORIS_NETWORK.items() <= metadata.items()):
        # A file that names its network keeps the name.
        fields = {name: metadata.get(name, value) for name, value in fields.items()}
    return {**tensors, **bundled}, fields


def _host_limits(tensors: dict[str, torch.Tensor], is_of_other_node: bool) -> dict[str, torch.Tensor]:
    """Return LyCORIS' alphas of rotations that ComfyUI itself trained: LyCORIS multiplies them by a layer's outputs."""
    limits = {}
    for name, held in split(tensors)[0].items():
        is_of_host = is_of_other_node or name.startswith("diffusion_model.")
        if is_of_host and "oft_blocks" in held and float(held.get(ALPHA, 0)) > 0:
            limits[f"{name}.{ALPHA}"] = held[ALPHA] / math.prod(held["oft_blocks"].shape[-3:-1])
    return limits


def _check_biases(tensors: dict[str, torch.Tensor]) -> None:
    for name, held in split(tensors)[0].items():
        if BIAS in held and WHOLE not in held:
            raise _refusal("LyCORIS", f"its layer {name[:200]} changes a bias, for which LyCORIS has no place")
        if f"{name}.w_norm" in tensors and BIAS not in held:
            raise _refusal("LyCORIS", f"its layer {name[:200]} is a norm without a bias, which LyCORIS does not know")


def from_peft(native: PeftAdapter, format: str) -> dict[str, torch.Tensor]:
    """Return a DoRA in peft's form under prefixed names of its layers, with its own magnitudes.

    Raises:
        ModelError: the adapter depends on the model's weights in another way.
    """
    if native.method != "DoRA":
        raise _refusal(format, f"{native.method} in peft's form depends on the model's weights", "Choose 'peft'.")
    tensors = {}
    for component, part in native.by_component().items():
        start = component or ("transformer" if part.is_split else "unet" if part.published else "diffusion_model")
        for name, tensor in part.tensors.items():
            place, _, end = name.partition(".lora_")
            if end.startswith("A."):
                tensors[f"{start}.{place}.{DOWN}"] = tensor
                tensors[f"{start}.{place}.{ALPHA}"] = tensor.new_tensor(part.scales[place] * len(tensor))
            elif end.startswith("B.weight"):
                tensors[f"{start}.{place}.{UP}"] = tensor
            elif end.startswith("B."):
                raise _refusal(format, f"its layer {place[:200]} is a DoRA with a bias", "Choose 'peft'.")
            else:
                ones = [1] * (part.tensors[f"{place}.lora_A.weight"].dim() - 1)
                tensors[f"{start}.{place}.{DORA}"] = tensor.reshape(-1, *ones)
    return tensors


def _fields(network: dict) -> dict[str, str]:
    texts = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in network.items()}
    return {f"ss_{name}": str(value) for name, value in texts.items() if value is not None}


def _is_corrected(adapter: dict[str, torch.Tensor]) -> bool:
    return any(name.endswith(DORA) for name in adapter) and has_host_magnitudes(adapter)


def _refusal(format: str, why: str, cure: str = "Choose 'kohya'.") -> ModelError:
    return ModelError(
        f"Graft cannot save this adapter as '{format}': {why}.",
        cure,
        "format",
    )


def _with_makers_magnitudes(adapter) -> dict[str, torch.Tensor]:
    """Return a DoRA's tensors with the magnitudes that training has, instead of those for ComfyUI's formula.

    Raises:
        ModelError: the magnitudes are unknown, or LyCORIS has no place for a part.
    """
    native = getattr(adapter, "native", None)
    layers = split(dict(adapter))[0]
    if hasattr(adapter, "made_by") and adapter.made_by() == "IA3":
        if any(BIAS in held for held in layers.values()):
            raise _refusal("LyCORIS", "LyCORIS scales no biases, and this IA3 does", _RETRAIN)
        # With a difference of zero, both formulas give the same weight.
        return dict(adapter)
    if native is None or native.method != "DoRA":
        raise _refusal("LyCORIS", _CORRECTED, _RETRAIN)
    magnitudes = [
        (part.tensors[f"{place}.lora_A.weight"], part.tensors[f"{place}.lora_magnitude_vector.weight"])
        for part in native.by_component().values()
        for place in dict.fromkeys(name.partition(".lora_")[0] for name in part.tensors)
    ]
    tensors = dict(adapter)
    # Both forms hold the layers in one order, whatever their names.
    for (name, held), (down, magnitude) in zip(layers.items(), magnitudes, strict=True):
        assert held[DOWN].shape == down.shape and bool((held[DOWN] == down).all()), name
        tensors[f"{name}.{DORA}"] = magnitude.reshape(-1, *[1] * (held[DOWN].dim() - 1))
    return tensors


def native_form(adapter: Mapping[str, torch.Tensor], format: str) -> PeftAdapter:
    """Return an adapter in peft's form, for diffusers' layers if the format is "diffusers".

    Raises:
        ModelError: peft or diffusers has no form for the adapter.
    """
    if getattr(adapter, "bundled", None):
        log.warning("Graft: a file in the format '%s' has no place for the adapter's embedding.", format)
    native = getattr(adapter, "native", None)
    if native is not None and format == "diffusers" and starts_at_weight(native.config):
        raise _refusal(
            format, "its start values belong to the model's weights, which the format does not say", "Choose 'peft'."
        )
    if native is not None and (format == "peft" or not adapter or not _is_unnamed(native)):
        return diffusers_form(native) if format == "diffusers" or _has_known_splits(native) else native
    if not isinstance(adapter, dict):
        raise _refusal(format, "it is a full fine-tune")
    if _is_corrected(adapter):
        raise _refusal(format, _CORRECTED, _RETRAIN)
    metadata = getattr(adapter, "metadata", {})
    form = peft_form(adapter, metadata, format)
    return diffusers_form(form) if format == "diffusers" else form


def _has_known_splits(native: PeftAdapter) -> bool:
    return bool(native.splits) and native.config["peft_type"] == "LORA"


def _is_unnamed(native: PeftAdapter) -> bool:
    """Report whether diffusers' names of a LoRA's layers are unknown, as in a peft folder of another network."""
    is_lora = native.config["peft_type"] == "LORA"
    return is_lora and not (native.published or native.is_split or native.splits)
