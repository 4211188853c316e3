"""DoRA: LoRA on the direction of each row of a weight, with a separate trainable magnitude (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .arguments import BESIDE
from .lora import LoRA, in_dtype_of, parts_of
from .targets import Layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

_MAGNITUDE = "lora_magnitude_vector"
_SQUARES = "row_squares"
# Lower bound of |W + s B A|^2. A row of zeros has no direction: it stays zero, where 0 / 0 would spread NaN.
_LEAST = 1e-20


def row_squares(layer: nn.Module) -> torch.Tensor:
    """Return |W|^2 of each row of the frozen weight, [out], in float32 or better."""
    import torch

    weight = layer.base_layer.weight
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight.flatten(1).square().sum(1)


def _forward(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that computes m (W + s B A) / |W + s B A| by row, on peft's parameters.

    peft holds the norm constant in the backward pass, as section 4.3 of the paper proposes to save memory. Its gradient
    is then not the gradient of the loss. This forward computes the norm from the narrow factors: that needs no
    [out, in] matrix, and the gradient is exact.
    """
    base, down, up, drop, scale = parts_of(layer)
    magnitude = layer.lora_magnitude_vector["default"]
    # A buffer moves with the layer between devices.
    layer.register_buffer(_SQUARES, row_squares(layer), persistent=False)

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        a = down.weight.flatten(1)
        b = up.weight.flatten(1)
        crossed = (b * _weight_times(base, a, x.dtype).to(b.dtype)).sum(1)
        added = ((b @ (a @ a.t())) * b).sum(1)
        squares = getattr(layer, _SQUARES) + 2 * scale * crossed + scale**2 * added
        delta = in_dtype_of(in_dtype_of(drop(x), down) * scale, up)
        return decomposed(base, out, delta, magnitude.weight, squares)

    return forward


def decomposed(
    base: nn.Module, out: torch.Tensor, delta: torch.Tensor, magnitude: torch.Tensor, squares: torch.Tensor
) -> torch.Tensor:
    """Return m (W + D) x / |W + D| by row, plus the bias.

    Args:
        base: the frozen layer, [out, in, ...].
        out: its output W x + b.
        delta: D x, of the same shape.
        magnitude: m, [out, ...].
        squares: |W + D|^2 of each row, [out].
    """
    norm = squares.clamp_min(_LEAST).sqrt()
    shape = (-1, *[1] * (2 if magnitude.dim() == 4 else 0))
    share = (magnitude.flatten() / norm).view(shape)
    plain = out if base.bias is None else out - base.bias.view(shape).to(out.dtype)
    return (out + ((share - 1) * plain + share * delta)).to(out.dtype)


def host_magnitude(layer: Layer, magnitude: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """Return magnitudes [out, 1, ...] for ComfyUI's formula, which divides by |W| where training divides by |W + D|.

    Args:
        difference: D, [out, ...] in float64.
    """
    weight = layer.weight().flatten(1).double()
    norm = (weight + difference.flatten(1)).norm(dim=1).clamp_min(_LEAST)
    magnitude = magnitude.flatten() * weight.norm(dim=1) / norm
    return magnitude.view(-1, *[1] * (layer.weight().dim() - 1))


def _weight_times(base: nn.Module, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return W A', [out, r]. Autograd keeps W itself, no copy in another dtype and no dequantized one."""
    from ..lowrank.quantized import Quantized

    if isinstance(base, Quantized):
        return base.product(a.to(dtype)).t()
    weight = base.weight.flatten(1)
    common = dtype if weight.dtype == dtype else a.dtype
    return weight.to(common) @ a.to(common).t()


class DoRA(LoRA):
    """m (W + s B A) / |W + s B A|, where m starts as the norms of the rows of W."""

    name = "DoRA"
    needs_base = True
    is_linear = False
    arguments = ("eva", *BESIDE)
    variant = {"use_dora": True}

    def start_value(self, stem: str, layer: nn.Module, shape: torch.Size, seed: int, name: str) -> torch.Tensor:
        """Start the magnitude at the norms of the rows, and the other trainables as LoRA does."""
        if stem == _MAGNITUDE:
            return row_squares(layer).sqrt().view(shape)
        return super().start_value(stem, layer, shape, seed, name)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer by the exact one. The layer belongs to the private module."""
        layer.forward = _forward(layer)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LoRA's tensors and a magnitude that is corrected for ComfyUI's norm."""
        a = layer.values["lora_A"].flatten(1).double()
        b = layer.values["lora_B"].flatten(1).double()
        magnitude = host_magnitude(layer, layer.values[_MAGNITUDE], layer.scale * b @ a)
        return {**super().export_layer(layer), "dora_scale": magnitude}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return A, B, the magnitudes of rows and the scale of A and B."""
        magnitude = tensors.get("dora_scale")
        plain = super().values_of_host({end: tensor for end, tensor in tensors.items() if end != "dora_scale"})
        if plain is None or magnitude is None or magnitude.shape[0] != len(plain[0]["lora_B"]):
            return None
        return {**plain[0], _MAGNITUDE: magnitude.float()}, plain[1]

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Give the magnitudes peft's shape, and fill up a smaller rank as LoRA does."""
        values = super().load_layer(values, layer)
        own = layer.lora_magnitude_vector["default"].weight
        magnitude = values.get(_MAGNITUDE)
        if magnitude is None or magnitude.numel() != own.numel():
            return values
        return {**values, _MAGNITUDE: magnitude.view(own.shape)}
