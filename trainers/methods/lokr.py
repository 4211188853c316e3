"""LoKr: a Kronecker product as the difference, its larger factor of low rank (Yeh et al. 2023), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .peft_method import PeftMethod, difference_forward
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


class LoKr(PeftMethod):
    """W + (alpha / rank) w1 (x) w2, with w1 zero at the start."""

    name = "LoKr"
    kinds = frozenset({LINEAR, POINT, CONV})
    scale_param = "lokr_w1"
    zero_init = frozenset({"lokr_w1"})
    network = ("lycoris.kohya", {"algo": "lokr"})
    needs_base = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoKr configuration."""
        from peft import LoKrConfig

        return LoKrConfig(r=recipe.rank, alpha=recipe.alpha, rank_pattern=ranks, alpha_pattern=alphas_of(ranks, recipe))

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        layer.forward = difference_forward(layer)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with the scale in the first factor: readers ignore alpha beside two whole factors.

        The second factor of a convolution is written whole, [out, in, kh, kw], because readers rebuild its
        decompositions differently.
        """
        found = {"lokr_w1": layer.values["lokr_w1"] * layer.scale}
        kernel = layer.adapted.base_layer.weight.shape[2:]
        if "lokr_w2" in layer.values:
            return {**found, "lokr_w2": layer.values["lokr_w2"]}
        a, b = layer.values["lokr_w2_a"], layer.values["lokr_w2_b"]
        if not kernel:
            return {**found, "lokr_w2_a": a, "lokr_w2_b": b}
        return {**found, "lokr_w2": (a @ b).view(a.shape[0], -1, *kernel)}
