"""Placement of a model's weights during training: whole on the device, or offloaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management
import torch

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
