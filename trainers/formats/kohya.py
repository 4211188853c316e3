"""Adapter tensors with kohya's names: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha` and so on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_kohya(layers: dict[str, dict[str, torch.Tensor]], name_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file.

    Args:
        layers: tensors by module path and key suffix: {path: {"lora_down.weight": tensor, "alpha": tensor, ...}}.
        name_of: returns the name of a module path in the file.

    Returns:
        Contiguous float32 tensors on the CPU that share no memory.
    """
    tensors = {}
    for path in sorted(layers):
        name = name_of(path)
        for end, tensor in layers[path].items():
            tensors[f"{name}.{end}"] = own(tensor)
    return tensors


def lora_tensors(down: torch.Tensor, up: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA layer by key suffix.

    Args:
        down: [r, in, ...].
        up: [out, r, ...].
        alpha: the layer's effective scale is alpha / r.
    """
    import torch

    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))}


def own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous float32 copy on the CPU that shares no memory with the tensor."""
    import torch

    return tensor.detach().to("cpu", torch.float32).contiguous().clone()
