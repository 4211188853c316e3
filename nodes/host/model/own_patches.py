"""Patches of the layers to which ComfyUI's own loader applies another formula than the adapter's maker, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import comfy.model_management
import torch
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ....trainers.tools.difference import WeightSlice
from ....trainers.tools.relative import own_changes
from .quantization import gguf

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

    from ....trainers.formats.adapter import LazyAdapter


class OwnPatch(WeightAdapterBase):
    """ComfyUI's patch of a weight, as a function of the weight.

    Args:
        loaded_keys: keys of the adapter's file.
        weights: (function from a float32 weight to its difference, ). ComfyUI creates copies with these arguments.
    """

    name = "graft"

    def __init__(self, loaded_keys: set[str], weights: tuple[Callable[[torch.Tensor], torch.Tensor]]):
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        """Add the difference to the weight in place. `function` is its own inverse: it exchanges halves of rows."""
        weight += function(self._scaled_difference(weight, strength, function))
        return weight

    def _scaled_difference(self, weight, strength, function) -> torch.Tensor:
        plain = function(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return (strength * self.weights[0](plain)).to(weight.dtype)


class LazyPatch(OwnPatch):
    """ComfyUI's patch of a weight with a full difference, which is computed whenever ComfyUI adds it.

    Args:
        weights: (function that returns the difference, ).
    """

    def _scaled_difference(self, weight, strength, function) -> torch.Tensor:
        # The operations of ComfyUI's own difference.
        return strength * comfy.model_management.cast_to_device(self.weights[0](), weight.device, weight.dtype)


def lazy_patches(patches: dict, tensors: dict[str, torch.Tensor], adapter: LazyAdapter) -> dict:
    """Return ComfyUI's patches with an adapter's tensors in place of stand-ins without values.

    Args:
        patches: patches by weight key, made of `tensors`.
        tensors: `adapter.on_meta()`.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    return {
        key: LazyPatch(set(), (partial(adapter.__getitem__, names[id(patch[1][0])]),)) for key, patch in patches.items()
    }


def own_patches(
    adapter: dict[str, torch.Tensor], names: dict, model: ModelPatcher, clip: CLIP | None, is_applied: bool
) -> tuple[dict, dict[str, list]]:
    """Return patches by weight key.

    Args:
        names: ComfyUI's weight keys by the names of layers.
        is_applied: whether to compute factors now, by an SVD of each layer. Reports need none.

    Returns:
        (patches, {layer's name: its weight key}).
    """
    patches, keys = {}, {}
    weights = None
    for name, change in own_changes(adapter).items():
        if name not in names:
            continue
        key = keys[name] = names[name]
        if change.factors is not None and is_applied:
            weights = weights or Weights(names, model, *([] if clip is None else [clip.patcher]))
            up, down = change.factors(weights(name)[0])
            patches[key] = LoRAAdapter(set(), (up.cpu(), down.cpu(), None, None, None, None))
        else:
            patches[key] = OwnPatch(set(), (change.weight,))
        if change.bias is not None:
            patches[bias_key(key)] = OwnPatch(set(), (change.bias,))
    return patches, keys


def bias_key(key):
    """Return the patch key of a layer's bias: of a weight key, or of a part of a weight's rows."""
    if isinstance(key, str):
        return key.removesuffix(".weight") + ".bias"
    return (key[0].removesuffix(".weight") + ".bias", *key[1:])


class Weights:
    """The unpatched values of a model's layers by the layers' names in adapters.

    Args:
        names: ComfyUI's weight keys by the names of layers.
        patchers: the MODEL, and the text encoder's patcher.
    """

    def __init__(self, names: dict, *patchers: ModelPatcher):
        self._names = names
        self._known = [gguf.key_patches(patcher) for patcher in patchers]

    def __call__(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        key = self._names.get(name)
        if key is None:
            return None
        weight = self._value(key)
        return None if weight is None else (weight, self._value(bias_key(key)))

    def place(self, name: str) -> WeightSlice | None:
        """Return the place of a layer by its name in an adapter, None if the model has none."""
        key = self._names.get(name)
        path = key[0] if isinstance(key, tuple) else key
        known = next((known for known in self._known if path in known), None)
        if known is None:
            return None
        _, span, reorder = (*key, None, None)[:3] if isinstance(key, tuple) else (path, None, None)
        return WeightSlice(path, len(known[path][0][0]), None if span is None else span[1], reorder)

    def names(self, key: str) -> list[str]:
        """Return the names of layers that are a whole weight, ComfyUI's general name first."""
        names = [name for name, known in self._names.items() if known == key]
        return sorted(names, key=lambda name: not key.startswith(f"{name}."))

    def _value(self, key) -> torch.Tensor | None:
        path = key if isinstance(key, str) else key[0]
        known = next((known for known in self._known if path in known), None)
        if known is None:
            return None
        stored, convert = known[path][0]
        device = comfy.model_management.get_torch_device()
        stored = gguf.dequantized(stored)
        value = convert(comfy.model_management.cast_to_device(stored, device, torch.float32, copy=True), inplace=True)
        if isinstance(key, tuple):
            value = value if key[1] is None else value.narrow(*key[1])
            value = value if len(key) < 3 else key[2](value)
        return value


def own_misfits(adapter: dict[str, torch.Tensor], names: dict, weights: dict) -> Iterator[tuple[str, str]]:
    """Yield (weight's key, reason) of layers in peft's form that do not fit their weight."""
    for name, change in own_changes(adapter).items():
        key = names.get(name)
        path, span = (key[0], key[1]) if isinstance(key, tuple) else (key, None)
        if path in weights:
            shape = list(weights[path].shape)
            if span is not None:
                shape[span[0]] = span[2]
            why = change.misfit(tuple(shape)) if change.misfit is not None else ""
            if why:
                yield path, why
