"""Adapters applied as ComfyUI's own LoRA loader applies them, and reports of keys that it would not use."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.lora_convert

from ....trainers.errors import ModelError, SettingsError
from ....trainers.formats.keys import misfit_of_layer, split
from ....trainers.methods.patterns import Pairs, check_pairs, value_for
from . import lora_schedule

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

log = logging.getLogger(__name__)

_TEXT_PREFIXES = ("lora_te", "text_encoder", "lora_prior_te", "clip_")


def apply_adapter(
    model: ModelPatcher,
    clip: CLIP | None,
    adapter: dict[str, torch.Tensor],
    strength_model: float,
    strength_clip: float,
    blocks: Pairs = (),
    span: tuple[float, float] = lora_schedule.WHOLE,
) -> tuple[ModelPatcher, CLIP | None]:
    """Return clones of model and clip that apply the adapter; strength 0 returns the inputs.

    Args:
        blocks: patterns of layer paths, each with the factor for the strengths there.
        span: (start, end) in 0..1 of sampling; it does not affect the text encoder.

    Raises:
        ModelError: the adapter is for another architecture, or for a larger or smaller model.
        SettingsError: a pattern matches no layer's path, or the range is empty.
    """
    _check_span(*span)
    patches, read = _load(model, clip, adapter)
    _check_fit(model, clip, adapter, patches)
    check_pairs(blocks, [path_of(key) for key in patches], "block_strengths")
    parts = _by_strength(patches, strength_model, blocks)
    if parts and span != lora_schedule.WHOLE:
        out_model, used = lora_schedule.add_in_range(classic(model), parts, span)
    else:
        out_model, used = _patched(model, parts)
    out_clip, used_by_clip = _patched(clip, _by_strength(patches, strength_clip, blocks))
    unread = _unread(adapter, read, clip)
    if unread and (used or used_by_clip):
        log.warning("Graft: %d keys of the adapter fit no layer, such as %s.", len(unread), unread[0])
    return out_model, out_clip


def _check_span(start: float, end: float) -> None:
    if start >= end:
        raise SettingsError(
            f"start_percent {start:g} is not less than end_percent {end:g}, so the adapter would never act.",
            "Set a smaller start_percent, or strength_model 0 to switch it off.",
            "start_percent",
        )


def _patched(patcher, parts: list[tuple[dict, float]]) -> tuple[Any, set]:
    """Return (clone of a MODEL or CLIP with patches added, keys that they patch); without patches, the input itself."""
    if patcher is None or not parts:
        return patcher, set()
    out = patcher.clone()
    return out, {key for part, strength in parts for key in out.add_patches(part, strength)}


def path_of(key) -> str:
    """Return a layer's path as patterns see it, from a patch's key: a weight's key, or a tuple that starts with one."""
    name = key if isinstance(key, str) else key[0]
    return name.removeprefix("diffusion_model.").removesuffix(".weight").removesuffix(".bias")


def _by_strength(patches: dict, strength: float, blocks: Pairs) -> list[tuple[dict, float]]:
    """Return (patches, strength) for each strength other than 0."""
    found: dict[float, dict] = {}
    for key, patch in patches.items():
        wanted = strength * value_for(path_of(key), blocks, 1.0)
        if wanted != 0:
            found.setdefault(wanted, {})[key] = patch
    return [(part, wanted) for wanted, part in found.items()]


def classic(model: ModelPatcher, input: str = "model") -> ModelPatcher:
    """Return a patcher that keeps the model's weights in place. Newer ComfyUI versions load them only as layers run.

    Args:
        input: name of the node's input, for the error.

    Raises:
        ModelError: the node that loaded the model does not support it.
    """
    if not (hasattr(model, "is_dynamic") and model.is_dynamic()):
        return model
    try:
        return model.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise ModelError(
            f"Cannot load the model's weights in place ({error}).",
            "Load it with one of ComfyUI's own loaders, or start ComfyUI with --disable-dynamic-vram.",
            input,
        ) from error


@dataclass(frozen=True)
class Fit:
    """An adapter's fit to a model.

    Attributes:
        model: the model's kind, as ComfyUI detects it from the checkpoint.
        read: number of keys that ComfyUI uses.
        unread: keys that ComfyUI ignores, without a text encoder's keys if none is connected.
        misfits: (weight's key, reason) of parts of another size.
        paths: path of the weight, by the layer's name in the adapter.
    """

    model: str
    read: int
    unread: list[str]
    misfits: list[tuple[str, str]]
    paths: dict[str, str]


def fit(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> Fit:
    """Return the use that ComfyUI would make of an adapter."""
    patches, read = _load(model, clip, adapter)
    misfits = _misfits(model, clip, adapter, patches)
    # ComfyUI renames the keys of some formats first; their names are unknown here.
    paths = {name: path_of(key) for name, key in _names(model, clip).items()}
    return Fit(type(model.model.model_config).__name__, len(read), _unread(adapter, read, clip), misfits, paths)


def _check_fit(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor], patches: dict) -> None:
    """Refuse an adapter without a layer of the model, or with layers of another size, which ComfyUI would only skip.

    Raises:
        ModelError: no layer fits, or one does not; the message names it.
    """
    for key, what in _misfits(model, clip, adapter, patches):
        text = clip is not None and key in dict(clip.cond_stage_model.named_parameters())
        owner = clip.cond_stage_model if text else model.model
        raise ModelError(
            f"The adapter was made for another model: its part for {key} has {what} in the connected "
            f"{type(owner).__name__}.",
            "Connect a model of the family that it was trained on, or choose another adapter.",
            "adapter",
        )
    if not patches:
        raise ModelError(
            f"The adapter fits no layer of the connected model ({type(model.model).__name__}).",
            "Connect a model of the family that it was trained on, or choose another adapter.",
            "adapter",
        )


def _misfits(
    model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor], patches: dict
) -> list[tuple[str, str]]:
    """Return (weight's key, reason) of parts of another size, in the model and the text encoder."""
    weights = dict(model.model.named_parameters())
    if clip is not None:
        weights.update(clip.cond_stage_model.named_parameters())
    names = _names(model, clip)
    found = {}
    for name, held in split(adapter)[0].items():
        key = names.get(name)
        key, span = (key[0], key[1]) if isinstance(key, tuple) else (key, None)
        if key not in weights:
            continue
        shape = list(weights[key].shape)
        if span is not None:
            # The weight holds several layers; span is (dimension, start, length) of this one.
            shape[span[0]] = span[2]
        what = misfit_of_layer(held, tuple(shape))
        if what:
            found[key] = what
    # ComfyUI renames the keys of some formats first; their names are unknown here.
    for key, what in _misfits_of_patches(weights, patches):
        found.setdefault(key, what)
    return list(found.items())


def _misfits_of_patches(weights: dict[str, torch.Tensor], patches: dict) -> Iterator[tuple[str, str]]:
    """Yield (weight's key, reason) of ComfyUI's patches that do not fit."""
    for key, patch in patches.items():
        # Use the live parameter: a quantized weight is stored with another number of elements.
        weight = weights.get(key) if isinstance(key, str) else None
        if weight is None:
            continue
        size = _size_of(patch)
        if size is not None and size != weight.numel():
            yield key, f"{size} numbers, the layer {weight.numel()}"
        elif isinstance(patch, tuple) and size is not None and patch[1][0].shape != weight.shape:
            yield key, f"the shape {list(patch[1][0].shape)}, the layer {list(weight.shape)}"


def _size_of(patch) -> int | None:
    """Return the number of elements in a patch's difference; None for kinds with their own shape or without one."""
    if isinstance(patch, tuple):
        return patch[1][0].numel() if patch[0] == "diff" and len(patch[1]) == 1 else None
    if getattr(patch, "name", "") != "lora":
        return None
    up, down, _, middle, _, reshape = patch.weights
    if middle is not None or reshape is not None:
        return None
    return up.shape[0] * down[0].numel()


def unread_keys(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> list[str]:
    """Return the keys of an adapter that ComfyUI's own loader would ignore."""
    _, read = _load(model, clip, adapter)
    return sorted(key for key in adapter if key not in read)


def _load(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> tuple[dict, set[str]]:
    """Return ComfyUI's patches by weight key, and the adapter keys that it used for them."""
    names = _names(model, clip)
    converted = _Watched(comfy.lora_convert.convert_lora(dict(adapter)))
    patches = comfy.lora.load_lora(converted, names, log_missing=False)
    read = converted.read
    if set(converted) != set(adapter):
        # ComfyUI renamed the keys of a format that it converts, so the origin of each key is unknown.
        read = set(adapter) if patches else set()
    return patches, read


def _names(model: ModelPatcher, clip: CLIP | None) -> dict:
    """Return ComfyUI's weight keys by all the names under which it reads them."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)


class _Watched(dict):
    """A dict that records the keys that were read."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key in self:
            self.read.add(key)
        return super().get(key, default)


def _unread(adapter: dict[str, torch.Tensor], read: set[str], clip: CLIP | None) -> list[str]:
    """Return the keys that ComfyUI ignores, without a text encoder's keys if none is connected."""
    return [
        key for key in sorted(adapter) if key not in read and (clip is not None or not key.startswith(_TEXT_PREFIXES))
    ]
