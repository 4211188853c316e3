"""ComfyUI's BaseModel around a private tree: its layers, its embedder and its transformer options for training."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import comfy.ldm.modules.attention
import comfy.ops
import comfy.patcher_extension
import torch

from ....trainers.lowrank.layers import PLAIN
from ....trainers.memory.transfer import upload

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


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
