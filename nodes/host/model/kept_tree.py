"""Trees of trainings that gave way, kept with their adapters until their prompts return or ComfyUI needs the memory."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import torch

from ....trainers.memory.tracking import bytes_of
from .. import settings

if TYPE_CHECKING:
    from ..server.control import Training
    from .denoiser import ComfyDenoiser

log = logging.getLogger(__name__)

# The timer's thread drops a tree while another may take it.
_lock = threading.Lock()


class _Entry(comfy.model_patcher.ModelPatcher):
    """A kept tree in ComfyUI's list of loaded models. ComfyUI frees memory by unloading it, which drops the tree.

    Its weights are those of the graph's MODEL, which has an entry of its own: while the tree is there, unloading the
    MODEL frees nothing. ComfyUI then unloads this entry too.

    Args:
        rest: what the engine keeps with the tree.
        size: bytes that the tree needs besides the MODEL's.
    """

    def __init__(self, tree: torch.nn.Module, rest: Any, size: int, device: torch.device):
        super().__init__(torch.nn.Module(), device, device, max(1, size))
        self.model.model_loaded_weight_memory = max(1, size)
        self.tree: torch.nn.Module | None = tree
        self.rest = rest
        loaded = comfy.model_management.LoadedModel(self)
        # As `model_load` does, which would move weights.
        loaded.real_model = weakref.ref(self.model)
        loaded.model_finalizer = weakref.finalize(self.model, comfy.model_management.cleanup_models)
        loaded.model_finalizer.atexit = False
        loaded.currently_used = False
        comfy.model_management.current_loaded_models.append(loaded)

    def drop(self) -> int:
        """Drop the tree. Return the bytes freed."""
        with _lock:
            tree, self.tree = self.tree, None
        if tree is None:
            return 0
        self.rest, size = None, self.model.model_loaded_weight_memory
        self.size, self.model.model_loaded_weight_memory = 1, 0
        # Layers refer to each other in cycles. Python's collector would free them later, and if it ran here, it might
        # end other models, whose entries ComfyUI then removes from the list that it is going through.
        for module in tree.modules():
            module._parameters.clear()
            module._buffers.clear()
        log.info("Graft: dropped the tree of the training that gave way.")
        return size

    def remove(self) -> None:
        models = comfy.model_management.current_loaded_models
        for loaded in [loaded for loaded in models if loaded.model is self]:
            models.remove(loaded)
            loaded.model_finalizer.detach()

    def partially_unload(self, *args: Any, **named: Any) -> int:
        return self.drop()

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        self.drop()
        return self.model


class _Kept:
    """The one kept tree, and the state of the MODEL's weights at that time."""

    def __init__(self, key: Any, rest: Any, tree: torch.nn.Module, original: torch.nn.Module, device: torch.device):
        self.key = key
        self._original = weakref.ref(original)
        self._weights = _state_of(original)
        shared = _tensors_of(original)
        self.entry = _Entry(tree, rest, bytes_of([*_tensors_of(tree), *shared]) - bytes_of(shared), device)
        self._timer: threading.Timer | None = None

    def drop_after(self, seconds: float) -> None:
        """Drop the tree after a time. The entry stays in ComfyUI's list, which another thread may be reading."""
        self._timer = threading.Timer(seconds, self.entry.drop)
        self._timer.daemon = True
        self._timer.start()

    def take(self, original: torch.nn.Module) -> tuple[torch.nn.Module, Any] | None:
        """Return tree and rest, and end keeping them; None if the MODEL's weights are not those that they share."""
        self._timer.cancel()
        self.entry.remove()
        if self._original() is not original or _state_of(original) != self._weights:
            self.entry.drop()
        rest = self.entry.rest
        with _lock:
            tree, self.entry.tree = self.entry.tree, None
        return None if tree is None else (tree, rest)


_slot: list[_Kept] = []


class TreeKeeper:
    """Keeper of a training's tree, as `protocols.Keeper` says."""

    def __init__(self, denoiser: ComfyDenoiser, training: Training):
        self._denoiser = denoiser
        self._training = training

    def keep(self, key: Any, rest: Any) -> None:
        """Keep the tree if the training gives way to prompts now, and the device could hold its weights twice.

        Another prompt may patch the MODEL's weights, which then exist twice while the tree holds them.
        """
        seconds, training, denoiser = settings.give_way_keep(), self._training, self._denoiser
        if not training.gives_way or training.is_held or training.has_fallback or not seconds:
            return
        original, free = denoiser.original, denoiser.free_memory()
        needed = comfy.model_management.module_size(original) + comfy.model_management.minimum_inference_memory()
        if free is None or free < needed:
            return
        self.clear()
        kept = _Kept(key, rest, denoiser.module, original, denoiser.device)
        kept.drop_after(seconds)
        _slot.append(kept)
        training.stays_prepared = True

    def take(self, key: Any) -> Any:
        """Put the tree kept under the key in place of the denoiser's. Return what was kept with it; None without."""
        if not _slot or _slot[0].key != key:
            return None
        taken = _slot.pop().take(self._denoiser.original)
        if taken is None:
            return None
        tree, rest = taken
        self._denoiser.use_tree(tree)
        log.info("Graft: the training continues in the tree that was kept.")
        return rest

    @staticmethod
    def clear() -> None:
        """Drop the kept tree, if there is one."""
        while _slot:
            _slot.pop().take(torch.nn.Module())


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Return the tensors of a module, and those inside ComfyUI's quantized weights, which have no storage."""
    tensors = [*module.parameters(), *module.buffers()]
    for weight in tensors:
        # The loop goes on through what it appends.
        if hasattr(weight, "__tensor_flatten__"):
            tensors.extend(getattr(weight, name) for name in weight.__tensor_flatten__()[0])
    return tensors


def _state_of(module: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (address, number of changes in place) of each weight; of GGUF's inference tensors, no number."""
    return [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in _tensors_of(module)]
