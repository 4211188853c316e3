"""Where the host has a model's weights while it is trained: on the device whole, or where they are when not in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import comfy.model_management
import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

# Bytes, more than any device has.
EVERYTHING = 1e20


@contextmanager
def placed(model: ModelPatcher, offloaded: bool) -> Iterator[None]:
    """Within it the weights are in place, with all that waits on the model counted in.

    Args:
        model: a classic patcher.
        away: whether they stay where the host keeps what is not in use, and go from there again as they were; else
            they are put on the device whole, and left there to the host.
    """
    management = comfy.model_management
    if not offloaded:
        management.load_models_gpu([model], memory_required=EVERYTHING, force_full_load=True)
        yield
        return
    # The graph's own with them: it shares its weights with this one.
    management.free_memory(EVERYTHING, model.load_device)
    model.unpatch_model(model.offload_device)
    beside = model.model_patches_models()
    if beside:
        management.load_models_gpu(beside)
    model.model_patches_to(model.load_device)
    model.model_patches_to(model.model_dtype())
    try:
        # The host's loading, without its list of what is loaded: from there it would be moved to the device.
        model.patch_model(model.offload_device)
        yield
    finally:
        model.detach()


class Pins:
    """Weights whose memory is locked."""

    def __init__(self):
        self._weights: list[torch.Tensor] = []

    def add(self, weight: torch.Tensor) -> bool:
        """Whether the host locked it: it does so for some devices, and up to a bound."""
        pin = getattr(comfy.model_management, "pin_memory", None)
        if pin is None or not pin(weight.detach()):
            return False
        # Its memory as it is now: it must be the same that is unlocked, and must not be freed before.
        self._weights.append(weight.detach())
        return True

    def clear(self) -> None:
        """Unlocks them."""
        try:
            if self._weights:
                # The device may still be reading. Only for CUDA does the host lock memory.
                torch.cuda.synchronize()
        finally:
            while self._weights:
                comfy.model_management.unpin_memory(self._weights.pop())


@contextmanager
def pinning() -> Iterator[Pins]:
    """Pins that are undone in any case."""
    pins = Pins()
    try:
        yield pins
    finally:
        pins.clear()
