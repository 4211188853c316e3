"""Applying an adapter as ComfyUI's own LoRA loader does, and saying what it would not read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import comfy.lora
import comfy.lora_convert

from ...trainers.errors import ModelError

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
) -> tuple[ModelPatcher, CLIP | None]:
    """Clones of model and clip with the adapter waiting on them; strength 0 gives back what came in.

    Raises:
        ModelError: the adapter is for another architecture, or for a larger or smaller one.
    """
    patches, _ = _load(model, clip, adapter)
    _check_shapes(model, patches)
    out_model, out_clip = model, clip
    used = set()
    if strength_model != 0:
        out_model = model.clone()
        used.update(out_model.add_patches(patches, strength_model))
    if clip is not None and strength_clip != 0:
        out_clip = clip.clone()
        used.update(out_clip.add_patches(patches, strength_clip))
    if not patches:
        raise ModelError(
            f"The adapter fits no layer of the connected model ({type(model.model).__name__}).",
            "It was made for another: connect the model family it was trained on, or choose another adapter.",
            "adapter",
        )
    if used:
        unread = [key for key in unread_keys(model, clip, adapter) if clip is not None or not _is_text(key)]
        if unread:
            log.warning("Graft: %d keys of the adapter fit no layer, such as %s.", len(unread), unread[0])
    return out_model, out_clip


def _check_shapes(model: ModelPatcher, patches: dict) -> None:
    """Names an adapter for the same layers in another size, which the host would leave out with a line in its log.

    Raises:
        ModelError: naming a layer.
    """
    weights = dict(model.model.named_parameters())
    for key, patch in patches.items():
        # The live weight: what a quantised one is stored as has other numbers.
        weight = weights.get(key) if isinstance(key, str) else None
        size = _size_of(patch)
        if weight is not None and size is not None and size != weight.numel():
            raise ModelError(
                f"The adapter was made for another model: its part for {key} has {size} numbers, the layer of the "
                f"connected {type(model.model).__name__} {weight.numel()}.",
                "Connect the model family it was trained on, or choose another adapter.",
                "adapter",
            )


def _size_of(patch) -> int | None:
    """Numbers in the difference that a patch makes; None for kinds that bring their own shape or none."""
    if isinstance(patch, tuple):
        return patch[1][0].numel() if patch[0] == "diff" and len(patch[1]) == 1 else None
    if getattr(patch, "name", "") != "lora":
        return None
    up, down, _, middle, _, reshape = patch.weights
    if middle is not None or reshape is not None:
        return None
    return up.shape[0] * down[0].numel()


def unread_keys(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> list[str]:
    """Keys of an adapter that the host's own loader would leave aside."""
    _, read = _load(model, clip, adapter)
    return sorted(key for key in adapter if key not in read)


def _load(model: ModelPatcher, clip: CLIP | None, adapter: dict[str, torch.Tensor]) -> tuple[dict, set[str]]:
    """The host's patches by weight key, and the adapter keys that went into them."""
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    converted = _Watched(comfy.lora_convert.convert_lora(dict(adapter)))
    patches = comfy.lora.load_lora(converted, names, log_missing=False)
    read = converted.read
    if set(converted) != set(adapter):
        # The host renamed keys of a format it converts; which of ours each came from is not known.
        read = set(adapter) if patches else set()
    return patches, read


class _Watched(dict):
    """A dict that notes which of its keys were taken."""

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


def _is_text(key: str) -> bool:
    return key.startswith(_TEXT_PREFIXES)
