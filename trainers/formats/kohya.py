"""Adapter tensors in kohya's names: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha` and their kin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_kohya(layers: dict[str, dict[str, torch.Tensor]], name_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter file.

    Args:
        layers: by module path, the layer's tensors by what follows its name: `lora_down.weight`, `alpha`, ...
        name_of: a module path's name in the file.

    Returns:
        Contiguous, unshared float32 tensors on the CPU.
    """
    tensors = {}
    for path in sorted(layers):
        name = name_of(path)
        for end, tensor in layers[path].items():
            tensors[f"{name}.{end}"] = own(tensor)
    return tensors


def lora_tensors(down: torch.Tensor, up: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """A LoRA layer's tensors.

    Args:
        down: [r, in, ...].
        up: [out, r, ...].
        alpha: effective scale is alpha / r.
    """
    import torch

    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))}


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of one's own, float32 on the CPU, contiguous."""
    import torch

    return tensor.detach().to("cpu", torch.float32).contiguous().clone()
