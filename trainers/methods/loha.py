"""LoHa: the elementwise product of two low-rank differences (Hyeon-Woo et al. 2022), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .peft_method import PeftMethod, difference_forward
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHa(PeftMethod):
    """W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b), with w2_b zero at the start."""

    name = "LoHa"
    kinds = frozenset({LINEAR, POINT, CONV})
    scale_param = "hada_w2_b"
    zero_init = frozenset({"hada_w2_b"})
    is_linear = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoHa configuration. Convolutions become flat matrices, which all readers rebuild alike."""
        from peft import LoHaConfig

        return LoHaConfig(r=recipe.rank, alpha=recipe.alpha, rank_pattern=ranks, alpha_pattern=alphas_of(ranks, recipe))

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        layer.forward = difference_forward(layer)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with alpha."""
        import torch

        return {**{name: layer.values[name] for name in _FACTORS}, "alpha": torch.tensor(layer.alpha)}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors and the scale that the file's alpha gives them."""
        if not {*_FACTORS} <= tensors.keys() <= {*_FACTORS, *_CORES, "alpha"}:
            return None
        values = _without_cores({name: tensor.float() for name, tensor in tensors.items() if name != "alpha"})
        strength = float(tensors["alpha"]) / values["hada_w1_b"].shape[0] if "alpha" in tensors else 1.0
        return values, strength

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return flat factors, also of an adapter with `use_effective_conv2d`."""
        return _without_cores(values)


def _without_cores(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return flat factors of the same rank: a Tucker core [r, r, kh, kw] becomes a part of the second factor."""
    import torch

    flat = {name: values[name] for name in _FACTORS if name in values}
    for core, first, second in zip(_CORES, _FACTORS[::2], _FACTORS[1::2], strict=True):
        if core in values:
            flat[first] = values[first].t()
            flat[second] = torch.einsum("mn...,ni->mi...", values[core], values[second]).flatten(1)
    return flat
