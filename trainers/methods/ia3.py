"""IA3: a trained factor on each output or input of a layer (Liu et al. 2022), with peft."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..formats.keys import IA3 as IA3_FACTORS
from ..formats.keys import ON_INPUT
from ..formats.kohya import lora_tensors
from .adapter_files import APPLY, mismatch
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
        tensors = {**nothing, "dora_scale": factors * weight.norm(dim=1, keepdim=True)}
        bias = layer.bias()
        return tensors if bias is None else {**tensors, "diff_b": bias * (factors.flatten() - 1)}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], None] | None:
        """Return the factors of LyCORIS' IA3, which holds them minus one, and whether they are for inputs."""
        if tensors.keys() != {IA3_FACTORS, ON_INPUT}:
            return None
        return {"ia3_l": tensors[IA3_FACTORS].float() + 1, ON_INPUT: tensors[ON_INPUT]}, None

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Give LyCORIS' factors peft's shape.

        Raises:
            ModelError: this run trains factors of the other side, or of a bias too, which LyCORIS leaves unchanged.
        """
        if ON_INPUT not in values:
            return values
        by_input = bool(values[ON_INPUT])
        if by_input != layer.is_feedforward or not by_input and layer.base_layer.bias is not None:
            raise mismatch(
                f"has factors of {'inputs' if by_input else 'outputs without the bias'}, but this run trains factors "
                f"of {'inputs' if layer.is_feedforward else 'outputs with the bias'}",
                APPLY,
            )
        own = layer.ia3_l["default"]
        factors = values["ia3_l"]
        return {"ia3_l": factors.view(own.shape) if factors.numel() == own.numel() else factors}
