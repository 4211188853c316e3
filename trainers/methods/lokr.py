"""LoKr: a Kronecker product as the difference, its larger factor of low rank (Yeh et al. 2023), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..formats.keys import DORA
from .targets import Layer, alphas_of
from .variants.arguments import value_of
from .variants.lycoris import LycorisMethod

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

# Bits of a rank with which peft decomposes no factor. Configurations have no larger one.
_WHOLE = 20
# Largest part of a factor beyond the run's rank that is only rounding.
_ROUNDING = 1e-5


class LoKr(LycorisMethod):
    """W + (alpha / rank) w1 (x) w2, with w1 zero at the start."""

    name = "LoKr"
    scale_param = "lokr_w1"
    zero_init = frozenset({"lokr_w1", "lokr_w1_a"})
    arguments = ("factor", "full_matrix", "decompose_both", *LycorisMethod.arguments)
    needs_base = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoKr configuration."""
        from peft import LoKrConfig

        # A power of two keeps the scale's bits.
        largest = max([recipe.rank, *ranks.values()])
        times = 1 << (_WHOLE - largest.bit_length()) if value_of(recipe, "full_matrix") else 1
        return LoKrConfig(
            r=times * recipe.rank,
            alpha=times * recipe.alpha,
            rank_pattern={path: times * rank for path, rank in ranks.items()},
            alpha_pattern={path: times * alpha for path, alpha in alphas_of(ranks, recipe).items()},
            use_effective_conv2d=value_of(recipe, "use_tucker", False),
            decompose_both=value_of(recipe, "decompose_both", False),
            decompose_factor=value_of(recipe, "factor", -1),
        )

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with the scale in the first factor: readers ignore alpha beside two whole factors.

        alpha is the rank, which is a scale of one. LyCORIS cannot load a layer without it.

        The second factor of a convolution is written whole, [out, in, kh, kw], because readers rebuild its
        decompositions differently.
        """
        import torch

        tensors = {name: tensor for name, tensor in layer.values.items() if name != DORA}
        first = "lokr_w1" if "lokr_w1" in tensors else "lokr_w1_a"
        tensors[first] = tensors[first] * layer.scale
        kernel = layer.adapted.base_layer.weight.shape[2:]
        if kernel:
            tensors = _without_cores(tensors)
        if kernel and "lokr_w2" not in tensors:
            a, b = tensors.pop("lokr_w2_a"), tensors.pop("lokr_w2_b")
            tensors["lokr_w2"] = (a @ b).view(a.shape[0], -1, *kernel)
        return {**tensors, "alpha": torch.tensor(float(layer.rank)), **self.host_magnitudes(layer)}

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in, ...]."""
        import torch

        factors = _without_cores({name: tensor.double() for name, tensor in layer.values.items()})
        second = factors["lokr_w2"] if "lokr_w2" in factors else factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        shape, first = layer.adapted.base_layer.weight.shape, factors["lokr_w1"]
        # A convolution's second factor is [out, in * kh * kw].
        second = second.view(len(second), -1, *shape[2:])
        first = first.view(*first.shape, *[1] * (second.dim() - 2))
        return layer.scale * torch.kron(first, second).reshape(shape)

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return two factors and their scale: alpha / rank, or 1 without a decomposition."""
        kinds = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"}), ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"})
        if not all(any(kind <= tensors.keys() for kind in pair) for pair in kinds):
            return None
        if not tensors.keys() <= {"alpha", "lokr_t2"}.union(*kinds[0], *kinds[1]):
            return None
        ranked = next((tensors[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors), None)
        scale = float(tensors["alpha"]) / len(ranked) if "alpha" in tensors and ranked is not None else 1.0
        return _without_cores({name: tensor.float() for name, tensor in tensors.items() if name != "alpha"}), scale

    def values_of_peft(
        self, values: dict[str, torch.Tensor], config: dict[str, Any], layer: nn.Module
    ) -> dict[str, torch.Tensor]:
        """Return two whole factors, unless this run has the second one's core."""
        first = _without_cores({name: values[name] for name in values if "w1" in name})
        if "default" in layer.lokr_t2 and "lokr_t2" in values:
            return {**{name: values[name] for name in values if "w2" in name or "t2" in name}, **first}
        return _without_cores(values)

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Factor a whole factor if this run trains it as a product and its rank allows that without loss."""
        values = dict(values)
        for name in ("lokr_w1", "lokr_w2"):
            if name in values and "default" in getattr(layer, f"{name}_a"):
                pair = _factored(values[name].flatten(1), layer.r["default"])
                if pair is not None:
                    del values[name]
                    values[f"{name}_a"], values[f"{name}_b"] = pair
        return values


def _factored(whole: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return two factors of a matrix, [out, r] and [r, in], or None if its rank is larger."""
    import torch

    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    if s[rank:].norm() > _ROUNDING * s.norm():
        return None
    # A smaller matrix has fewer singular values than the run's rank.
    root = s[:rank].sqrt()
    left, right = u.new_zeros(len(u), rank), v.new_zeros(rank, v.shape[1])
    left[:, : len(root)], right[: len(root)] = u[:, :rank] * root, root[:, None] * v[:rank]
    return left, right


def _without_cores(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the whole first factor, and the whole second factor if it has a Tucker core [r, r, kh, kw]."""
    import torch

    plain = dict(values)
    if "lokr_w1_a" in plain:
        plain["lokr_w1"] = plain.pop("lokr_w1_a") @ plain.pop("lokr_w1_b")
    if "lokr_t2" in plain:
        core, left, right = (plain.pop(name) for name in ("lokr_t2", "lokr_w2_a", "lokr_w2_b"))
        plain["lokr_w2"] = torch.einsum("mn...,mo,ni->oi...", core, left, right)
    return plain
