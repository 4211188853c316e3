"""Adapters applied as ComfyUI's own LoRA loader applies them, and reports of keys that it would not use."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.lora_convert

from ....trainers.errors import ModelError, SettingsError
from ....trainers.formats.adapter import LazyAdapter
from ....trainers.formats.keys import BIAS, IA3, ON_INPUT, common_place, misfit_of_layer, split
from ....trainers.methods.targets import Pairs, check_pairs, value_for
from ....trainers.text import counted, join_first
from ....trainers.tools.foreign import GUESS, has_guessed_alpha, kind_of
from ....trainers.tools.inspect import MOST_UNREAD
from ....trainers.tools.relative import layer_names
from . import lora_schedule
from .own_patches import OwnPatch, Weights, bias_key, lazy_patches, own_misfits, own_patches

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

log = logging.getLogger(__name__)

_TEXT_PREFIXES = ("lora_te", "text_encoder", "lora_prior_te", "clip_")
_LISTED = 5


def apply_adapter(
    model: ModelPatcher,
    clip: CLIP | None,
    adapter: Mapping[str, torch.Tensor],
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
    return apply_with_remarks(model, clip, adapter, (strength_model, strength_clip), blocks, span)[:2]


def apply_with_remarks(
    model: ModelPatcher,
    clip: CLIP | None,
    adapter: Mapping[str, torch.Tensor],
    strengths: tuple[float, float],
    blocks: Pairs = (),
    span: tuple[float, float] = lora_schedule.WHOLE,
) -> tuple[ModelPatcher, CLIP | None, list[str]]:
    """Apply an adapter as `apply_adapter` does, and also return remarks on it for the user.

    Args:
        adapter: a dict, or a LazyAdapter: each of its tensors is then computed where ComfyUI patches the weight.
        strengths: on the model and on the text encoder.
    """
    _check_span(*span)
    strength_model, strength_clip = strengths
    lazy = adapter if isinstance(adapter, LazyAdapter) else None
    adapter = adapter if lazy is None else lazy.on_meta()
    patches, read = _load(model, clip, adapter, is_applied=True)
    _check_fit(model, clip, adapter, patches)
    if lazy is not None:
        patches = lazy_patches(patches, adapter, lazy)
    check_pairs(blocks, [path_of(key) for key in patches], "block_strengths")
    parts = _by_strength(patches, strength_model, blocks)
    if parts and span != lora_schedule.WHOLE:
        out_model, used = lora_schedule.add_in_range(classic(model), parts, span)
    else:
        out_model, used = _patched(model, parts)
    out_clip, used_by_clip = _patched(clip, _by_strength(patches, strength_clip, blocks))
    if not used and not used_by_clip:
        return out_model, out_clip, []
    own = sum(type(patch) is OwnPatch for patch in patches.values())
    remarks = [
        check_unread(_unread(adapter, read, clip), len(read)),
        GUESS if has_guessed_alpha(adapter) else "",
        f"{counted(own, 'weight')} changed by the formula of the adapter's maker, not by ComfyUI's" if own else "",
    ]
    remarks = [remark for remark in remarks if remark]
    for remark in remarks:
        log.info("Graft: %s.", remark)
    return out_model, out_clip, remarks


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
    by_strength: dict[float, dict] = {}
    for key, patch in patches.items():
        wanted = strength * value_for(path_of(key), blocks, 1.0)
        if wanted != 0:
            by_strength.setdefault(wanted, {})[key] = patch
    return [(part, wanted) for wanted, part in by_strength.items()]


def classic(model: ModelPatcher, input: str = "model") -> ModelPatcher:
    """Return a patcher that keeps the model's weights in place. Newer ComfyUI versions load them only as layers run.

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
    """Return the use that Graft Apply Adapter would make of an adapter."""
    patches, read = _load(model, clip, adapter)
    misfits = _misfits(model, clip, adapter, patches)
    # ComfyUI renames the keys of some formats first; their names are unknown here.
    paths = {name: path_of(key) for name, key in _names(model, clip, adapter).items()}
    return Fit(type(model.model.model_config).__name__, len(read), _unread(adapter, read, clip), misfits, paths)


def _check_fit(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor], patches: dict) -> None:
    """Refuse an adapter without a layer of the model, or with layers of another size, which ComfyUI would only skip.

    Raises:
        ModelError: no layer fits, or one does not.
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
        kind = kind_of(adapter)
        if kind is not None:
            raise ModelError(f"The file is {kind.name}.", kind.cure, "adapter")
        names = layer_names(adapter)
        if not names:
            raise ModelError(
                "The adapter has no layers: its keys have no name that a loader knows"
                + (f", such as {min(adapter)[:200]}." if adapter else "."),
                "Choose another adapter.",
                "adapter",
            )
        raise ModelError(
            f"The adapter fits no layer of the connected model ({type(model.model).__name__}). Its first layer is "
            f"{min(names)[:200]}.",
            "Connect a model of the family that it was trained on, or choose another adapter.",
            "adapter",
        )


def _misfits(
    model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor], patches: dict
) -> list[tuple[str, str]]:
    weights = dict(model.model.named_parameters())
    if clip is not None:
        weights.update(clip.cond_stage_model.named_parameters())
    names = _names(model, clip, adapter)
    misfits = dict(own_misfits(adapter, names, weights))
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
            misfits[key] = what
    # ComfyUI renames the keys of some formats first; their names are unknown here.
    for key, what in _misfits_of_patches(weights, patches):
        misfits.setdefault(key, what)
    return list(misfits.items())


def _misfits_of_patches(weights: dict[str, torch.Tensor], patches: dict) -> Iterator[tuple[str, str]]:
    for key, patch in patches.items():
        # Use the live parameter's shape: a quantized weight is stored with another number of elements.
        weight = weights.get(key) if isinstance(key, str) else None
        if weight is None:
            continue
        size, wanted = _size_of(patch), prod(weight.shape)
        if size is not None and size != wanted:
            yield key, f"{size} numbers, the layer {wanted}"
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


def layer_weights(model: ModelPatcher, clip: CLIP | None, *adapters: dict[str, torch.Tensor]) -> Weights:
    """Return a function from the names of adapters' layers to the unpatched values of the model and the text encoder.

    Without a text encoder its layers have no values.
    """
    names = {}
    for adapter in adapters:
        names.update(_names(model, clip, adapter))
    return Weights(names, classic(model), *([] if clip is None else [classic(clip.patcher, "clip")]))


def unread_keys(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> list[str]:
    """Return the keys of an adapter that ComfyUI's own loader would ignore."""
    _, read = _load(model, clip, adapter)
    return sorted(key for key in adapter if key not in read)


def _load(
    model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor], is_applied: bool = False
) -> tuple[dict, set[str]]:
    """Return patches by weight key, and the adapter keys that they use: ComfyUI's, or the maker's formula instead."""
    layers = split(adapter)[0]
    names = _names(model, clip, adapter)
    converted = _Watched(comfy.lora_convert.convert_lora(dict(adapter)))
    patches = comfy.lora.load_lora(converted, names, log_missing=False)
    read = converted.read
    if set(converted) != set(adapter):
        # ComfyUI renamed the keys of a format that it converts, so the origin of each key is unknown.
        return patches, set(adapter) if patches else set()
    for name, held in layers.items():
        if BIAS in held and isinstance(names.get(name), tuple):
            # ComfyUI reads the bias of a whole weight only.
            patches[bias_key(names[name])] = ("diff", (held[BIAS],))
    own, used = own_patches(adapter, names, model, clip, is_applied)
    patches.update(own)
    read.update(f"{name}.{end}" for name in used for end in (IA3, ON_INPUT) if ON_INPUT in layers.get(name, ()))
    return patches, read if layers else set(used)


def _names(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor] | None = None) -> dict:
    """Return ComfyUI's weight keys by all the names under which it reads them, and by the adapter's own names."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    names = names if clip is None else comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    known: dict = {}
    for name, key in names.items():
        known.setdefault(common_place(name), key)
    for name in {} if adapter is None else layer_names(adapter):
        # ComfyUI reads peft's names of some models only. For others, the scale is unknown.
        if name not in names and common_place(name) in known and not has_guessed_alpha([name]):
            names[name] = known[common_place(name)]
    return names


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
    keys = adapter if len(adapter) else layer_names(adapter)
    return [key for key in sorted(keys) if key not in read and (clip is not None or not key.startswith(_TEXT_PREFIXES))]


def check_unread(unread: list[str], read: int) -> str:
    """Return a remark about keys that fit no layer, empty without them.

    Raises:
        ModelError: they are more than a tenth.
    """
    if not unread:
        return ""
    count = f"{counted(len(unread), 'key')} of {len(unread) + read}"
    if len(unread) > MOST_UNREAD * (len(unread) + read):
        raise ModelError(
            f"The adapter does not fit the connected model: {count} fit no layer, such as "
            f"{join_first(unread, _LISTED)}.",
            "Connect the model that it was trained on. Graft Inspect Adapter lists its layers.",
            "adapter",
        )
    return f"{count} fit no layer and have no effect: {join_first(unread, _LISTED)}"
