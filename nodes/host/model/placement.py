"""Placement of a model during training: its weights on the device or offloaded, ComfyUI's parts around its tree."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import torch

from ....trainers.lowrank.layers import PLAIN
from ....trainers.memory.transfer import upload

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# More bytes than any device has.
EVERYTHING = 1e20


@contextmanager
def placed(model: ModelPatcher, offloaded: bool) -> Iterator[None]:
    """Keep the weights in place, with all the model's patches applied, within the context.

    Args:
        model: a classic patcher.
        offloaded: keep the weights on ComfyUI's offload device, and unpatch them afterwards. Otherwise put the whole
            model on the device, and leave it there for ComfyUI to manage.
    """
    management = comfy.model_management
    if not offloaded:
        management.load_models_gpu([model], memory_required=EVERYTHING, force_full_load=True)
        yield
        return
    # Unload the graph's model too: it shares its weights with this one.
    management.free_memory(EVERYTHING, model.load_device)
    model.unpatch_model(model.offload_device)
    patch_models = model.model_patches_models()
    if patch_models:
        management.load_models_gpu(patch_models)
    model.model_patches_to(model.load_device)
    model.model_patches_to(model.model_dtype())
    try:
        # Patch without adding the model to ComfyUI's list of loaded models: ComfyUI would move it to the device.
        model.patch_model(model.offload_device)
        yield
    finally:
        model.detach()


class Pins:
    """Weights whose memory is pinned.

    Args:
        device: the device that reads them.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._weights: list[torch.Tensor] = []

    def add(self, weight: torch.Tensor) -> bool:
        """Pin a weight and report whether ComfyUI did: it pins for some devices, and up to a limit."""
        pin = getattr(comfy.model_management, "pin_memory", None)
        if pin is None or not pin(weight.detach()):
            return False
        # Keep this tensor: the same memory must be unpinned, and must not be freed earlier.
        self._weights.append(weight.detach())
        return True

    def clear(self) -> None:
        """Unpin all weights."""
        try:
            if self._weights:
                # The device may still be reading.
                getattr(torch, self._device.type).synchronize(self._device)
        finally:
            while self._weights:
                comfy.model_management.unpin_memory(self._weights.pop())


@contextmanager
def pinning(device: torch.device) -> Iterator[Pins]:
    """Provide pins that are released at the end in any case."""
    pins = Pins(device)
    try:
        yield pins
    finally:
        pins.clear()


def mark_plain(tree: torch.nn.Module) -> None:
    """Mark the layers whose class computes as torch's does where the weight has the dtype and device of the input."""
    both = comfy.ops.disable_weight_init, comfy.ops.manual_cast
    kinds = [kind for operations in both for kind in (operations.Linear, operations.Conv2d)]
    for layer in tree.modules():
        if type(layer) in kinds and not layer.weight_function and not layer.bias_function:
            setattr(layer, PLAIN, True)


def over(base, tree: torch.nn.Module, device: torch.device):
    """Return a copy of ComfyUI's BaseModel with the private tree as its network; everything else is shared."""
    other = copy.copy(base)
    other._modules = dict(base._modules)
    other._modules["diffusion_model"] = tree
    if "embedder" in base._modules:
        other._modules["embedder"] = _Uploaded(base.embedder, device)
    return other


class _Uploaded(torch.nn.Module):
    """SDXL's embedding of sizes, which ComfyUI computes on the CPU, on the device: the pooled text joins it there."""

    def __init__(self, embedder: torch.nn.Module, device: torch.device):
        super().__init__()
        self._embedder, self._device = embedder, device

    def forward(self, sizes: torch.Tensor) -> torch.Tensor:
        return upload(self._embedder(sizes), self._device)


def transformer_options(model: ModelPatcher) -> dict:
    """Return the MODEL's transformer options with PyTorch's attention, whose backward is exact and repeatable."""
    options = dict(model.model_options.get("transformer_options", {}))
    wrappers = {}
    comfy.patcher_extension.merge_nested_dicts(wrappers, options.get("wrappers", {}), copy_dict1=False)
    comfy.patcher_extension.merge_nested_dicts(wrappers, model.wrappers, copy_dict1=False)
    options["wrappers"] = wrappers
    options["optimized_attention_override"] = pytorch_attention
    return options


def is_patched(model: ModelPatcher) -> bool:
    """Report whether nodes upstream run code of their own within the network."""
    options = model.model_options.get("transformer_options", {})
    wrappers = [*options.get("wrappers", {}).values(), *model.wrappers.values()]
    replaced = [name for name in model.object_patches if name.startswith("diffusion_model")]
    return bool(options.get("patches") or options.get("patches_replace") or any(wrappers) or replaced)


def pytorch_attention(function, *args, **kwargs):
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
