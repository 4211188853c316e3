"""PiSSA: LoRA that starts at the principal singular components of the weight (Meng et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..formats.kohya import lora_tensors, own
from ..rng import generator
from .lora import LoRA, in_dtype_of, parts_of
from .targets import LINEAR, Layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

_START = ("start_A", "start_B")


def _forward(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that computes W + s (B A - B0 A0) and leaves the frozen weight unchanged.

    peft subtracts B0 A0 from the weight instead, which would copy and round every targeted weight.
    """
    base, down, up, drop, _ = parts_of(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        from torch.nn.functional import linear

        out, scale = base(x), layer.scaling["default"]
        x = drop(x)
        before = linear(linear(x, layer.start_A.to(x.dtype)) * scale, layer.start_B.to(x.dtype))
        return out + (in_dtype_of(in_dtype_of(x, down) * scale, up) - before).to(out.dtype)

    return forward


class PiSSA(LoRA):
    """W - s B0 A0 + s B A, where s B0 A0 is the best approximation of W of that rank.

    Its files hold the difference s (B A - B0 A0), a LoRA of twice the rank: readers know W, but not W - s B0 A0.
    """

    name = "PiSSA"
    kinds = frozenset({LINEAR})
    zero_init = frozenset({"lora_A", "lora_B"})
    needs_base = True
    arguments = ()

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Let peft compute its start values on a copy of the weight, because peft changes it for them."""
        import torch

        base = layer.base_layer
        kept = base.weight.detach()
        scale = layer.scaling["default"]
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.data = factor["default"].weight.data.float()
        # peft's randomized SVD draws from torch's global generator.
        with torch.random.fork_rng(devices=[kept.device] if kept.device.type != "cpu" else []):
            layer.base_layer = torch.nn.Linear(1, 1, bias=False)
            layer.base_layer.weight = torch.nn.Parameter(kept.float(), requires_grad=False)
            torch.manual_seed(generator("pissa", recipe.seed, *kept.shape).initial_seed())
            layer.pissa_init("default", "pissa_niter_16")
            layer.base_layer = base
        assert layer.scaling["default"] == scale
        for name, factor in zip(_START, (layer.lora_A, layer.lora_B), strict=True):
            parameter = factor["default"].weight
            parameter.data = parameter.data.contiguous()
            layer.register_buffer(name, parameter.data.clone(), persistent=False)
        layer.forward = _forward(layer)

    def constants(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return A0 and B0."""
        return {name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _START}

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return [A; A0] and [B, -B0] at the same scale."""
        doubled = self.peft_layer(layer)
        return lora_tensors(doubled["lora_A"], doubled["lora_B"], layer.scale * 2 * layer.rank)

    def peft_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return a LoRA of twice the rank."""
        import torch

        start_a, start_b = (own(getattr(layer.adapted, name)) for name in _START)
        return {
            "lora_A": torch.cat([layer.values["lora_A"], start_a]),
            "lora_B": torch.cat([layer.values["lora_B"], -start_b], dim=1),
        }

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Split the tensors into halves: A and B to train, and the start values A0 and B0."""
        if values["lora_A"].shape[0] % 2:
            return values
        a, start_a = values["lora_A"].chunk(2)
        b, start_b = values["lora_B"].chunk(2, dim=1)
        for name, value in zip(_START, (start_a, -start_b), strict=True):
            if value.shape == getattr(layer, name).shape:
                getattr(layer, name).copy_(value)
        return {"lora_A": a, "lora_B": b}

    def native_recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with twice the rank and the same scale."""
        ranks = tuple((pattern, 2 * rank) for pattern, rank in recipe.block_ranks)
        return replace(recipe, rank=2 * recipe.rank, alpha=2 * recipe.alpha, block_ranks=ranks)
