"""LoHa: the elementwise product of two low-rank differences (Hyeon-Woo et al. 2022), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .targets import Layer, alphas_of
from .variants.arguments import value_of
from .variants.lycoris import LycorisMethod

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LoHa(LycorisMethod):
    """W + (alpha / rank) (w1_a w1_b) * (w2_a w2_b), with w2_b zero at the start."""

    name = "LoHa"
    scale_param = "hada_w2_b"
    zero_init = frozenset({"hada_w2_b"})

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoHa configuration. Without use_tucker, convolutions become flat matrices."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=recipe.rank,
            alpha=recipe.alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas_of(ranks, recipe),
            use_effective_conv2d=value_of(recipe, "use_tucker", False),
        )

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with alpha. Tucker cores become a part of flat factors."""
        import torch

        factors = {name: tensor.contiguous() for name, tensor in _without_cores(layer.values).items()}
        return {**factors, "alpha": torch.tensor(layer.alpha), **self.host_magnitudes(layer)}

    def delta(self, layer: nn.Module) -> torch.Tensor:
        """Return the difference. With cores it is not peft's, whose gradients of hada_w1_a and hada_w2_a are wrong."""
        if "default" not in layer.hada_t1:
            return super().delta(layer)
        factors = {name: getattr(layer, name)["default"] for name in (*_FACTORS, *_CORES)}
        w1_a, w1_b, w2_a, w2_b = _without_cores(factors).values()
        return (layer.scaling["default"] * (w1_a @ w1_b) * (w2_a @ w2_b)).view(layer.base_layer.weight.shape)

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in * kh * kw]."""
        w1_a, w1_b, w2_a, w2_b = (_without_cores(layer.values)[name].double() for name in _FACTORS)
        return layer.scale * (w1_a @ w1_b) * (w2_a @ w2_b)

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors and the scale that the file's alpha gives them."""
        if not {*_FACTORS} <= tensors.keys() <= {*_FACTORS, *_CORES, "alpha"}:
            return None
        values = _without_cores({name: tensor.float() for name, tensor in tensors.items() if name != "alpha"})
        strength = float(tensors["alpha"]) / values["hada_w1_b"].shape[0] if "alpha" in tensors else 1.0
        return values, strength

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return the factors, flat ones also of an adapter with `use_effective_conv2d`, unless this run has cores."""
        return values if "default" in layer.hada_t1 else _without_cores(values)


def _without_cores(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return flat factors of the same rank: a Tucker core [r, r, kh, kw] becomes a part of the second factor."""
    import torch

    flat = {name: values[name] for name in _FACTORS if name in values}
    for core, first, second in zip(_CORES, _FACTORS[::2], _FACTORS[1::2], strict=True):
        if core in values:
            flat[first] = values[first].t()
            flat[second] = torch.einsum("mn...,ni->mi...", values[core], values[second]).flatten(1)
    return flat
