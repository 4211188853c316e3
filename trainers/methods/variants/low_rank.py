"""Variants of LoRA: dropout of ranks and layers, Tucker decomposition, and a limit of the norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import NAME
from .arguments import value_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...recipe.recipe import Recipe

MID = "lora_mid"


def has_other_forward(layer: nn.Module, recipe: Recipe) -> bool:
    """Return True if a layer's forward differs from that of a plain LoRA during training."""
    return hasattr(layer, MID) or bool(value_of(recipe, "rank_dropout") or value_of(recipe, "module_dropout"))


def add_core(layer: nn.Module) -> None:
    """Add the Tucker core [r, r, kh, kw] of a convolution, whose A becomes [r, in, 1, 1]; leave other layers."""
    import torch
    from torch import nn

    down = layer.lora_A["default"].weight
    rank, inputs, *kernel = down.shape
    if kernel and kernel != [1, 1]:
        layer.lora_A["default"] = nn.Conv2d(inputs, rank, 1, bias=False, device=down.device)
        core = nn.Parameter(torch.empty(rank, rank, *kernel, device=down.device))
        setattr(layer, MID, nn.ParameterDict({"default": core}))


def plain_down(down: torch.Tensor, core: torch.Tensor) -> torch.Tensor:
    """Return the A [r, in, kh, kw] of the same difference without a core."""
    import torch

    return torch.einsum("rshw,si->rihw", core, down.flatten(1))


def make_forward(layer: nn.Module, recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward of a layer with a core or with dropped ranks."""
    from ..dropout import structure_dropout
    from ..lora import in_dtype_of, parts_of

    base, down, up, drop, _ = parts_of(layer)
    dropout, core = structure_dropout(recipe), getattr(layer, MID, None)
    if dropout is not None:
        layer.add_module(NAME, dropout)

    def forward(x: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import conv2d

        middle = drop(x)
        if core is None:
            middle = in_dtype_of(middle, down)
        else:
            middle = conv2d(middle, down.weight.to(x.dtype))
            middle = conv2d(middle, core["default"].to(x.dtype), None, base.stride, base.padding, base.dilation)
        middle = middle * layer.scaling["default"]
        if dropout is not None:
            middle = dropout.ranks(middle)
        # The frozen layer last: checkpointing then does not recompute it at a block's end.
        change = in_dtype_of(middle, up)
        out = base(x)
        return out + change.to(out.dtype)

    return forward


def limit_norm(layer: nn.Module, most: float) -> None:
    """Shrink A and B so that |s B A| is at most `most`, as `scale_weight_norms` of sd-scripts does."""
    import torch

    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        whole = plain_down(down, getattr(layer, MID)["default"]) if hasattr(layer, MID) else down
        # |B A|^2 from two [r, r] matrices.
        a, b = whole.flatten(1).float(), up.flatten(1).float()
        norm = ((a @ a.t()) * (b.t() @ b)).sum().clamp_min(0).sqrt() * abs(layer.scaling["default"])
        ratio = (most / norm).clamp(max=1.0)
        trained = [weight for weight in (down, up) if weight.requires_grad]
        for weight in trained:
            weight.mul_(ratio ** (1 / len(trained)))
