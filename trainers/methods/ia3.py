"""IA3: a trained factor on each output or input of a layer (Liu et al. 2022), with peft."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..formats.kohya import lora_tensors
from .peft_method import PeftMethod
from .targets import LINEAR, Layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

# The output projections of feed-forward blocks. The paper scales the inner activation, which is their input.
_INWARD = re.compile(r"(\.ff\.net\.2|mlp\.2|mlp\.fc2|\.wo)$")


class IA3(PeftMethod):
    """l * (W x + b), or W (l * x) + b on the output projection of a feed-forward block. l is one at the start."""

    name = "IA3"
    kinds = frozenset({LINEAR})
    one_init = frozenset({"ia3_l"})
    needs_base = True
    has_rank = False
    network = ("lycoris.kohya", {"algo": "ia3"})

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's IA3 configuration."""
        from peft import IA3Config

        inward = [path for path in layers if _INWARD.search(path)]
        return IA3Config(target_modules=list(layers), feedforward_modules=inward)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the layer's tensors in ComfyUI's file.

        Factors on outputs become a DoRA with a difference of zero: its magnitudes are the scaled norms of the rows, and
        the bias has its own difference. Factors on inputs become a full difference.
        """
        import torch

        weight = layer.weight()
        factors = layer.values["ia3_l"]
        if layer.adapted.is_feedforward:
            return {"diff": weight * (factors - 1)}
        nothing = lora_tensors(torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1), 1.0)
        found = {**nothing, "dora_scale": factors * weight.norm(dim=1, keepdim=True)}
        bias = layer.bias()
        return found if bias is None else {**found, "diff_b": bias * (factors.flatten() - 1)}
