"""LoRA tensors in kohya's names: `<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def lora_to_kohya(
    layers: dict[str, dict[str, torch.Tensor]], alpha: float, name_of: Callable[[str], str]
) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA file.

    Args:
        layers: by module path, {"down": [r, in, ...], "up": [out, r, ...]}.
        alpha: effective scale is alpha / r.
        name_of: a module path's name in the file.

    Returns:
        Contiguous, unshared float32 tensors on the CPU.
    """
    import torch

    tensors = {}
    for path in sorted(layers):
        name = name_of(path)
        tensors[f"{name}.lora_down.weight"] = _own(layers[path]["down"])
        tensors[f"{name}.lora_up.weight"] = _own(layers[path]["up"])
        tensors[f"{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _own(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().to("cpu", torch.float32).contiguous().clone()
