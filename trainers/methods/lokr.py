"""LoKr: a Kronecker product as the difference, its larger factor of low rank (Yeh et al. 2023), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .peft_method import PeftMethod, difference_forward
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe

# Largest part of a factor beyond the run's rank that is only rounding.
_ROUNDING = 1e-5


class LoKr(PeftMethod):
    """W + (alpha / rank) w1 (x) w2, with w1 zero at the start."""

    name = "LoKr"
    kinds = frozenset({LINEAR, POINT, CONV})
    scale_param = "lokr_w1"
    zero_init = frozenset({"lokr_w1"})
    needs_base = True
    is_linear = True

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoKr configuration."""
        from peft import LoKrConfig

        return LoKrConfig(r=recipe.rank, alpha=recipe.alpha, rank_pattern=ranks, alpha_pattern=alphas_of(ranks, recipe))

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        layer.forward = difference_forward(layer)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return LyCORIS's tensors, with the scale in the first factor: readers ignore alpha beside two whole factors.

        alpha is the rank, which is a scale of one. LyCORIS cannot load a layer without it.

        The second factor of a convolution is written whole, [out, in, kh, kw], because readers rebuild its
        decompositions differently.
        """
        import torch

        tensors = {"lokr_w1": layer.values["lokr_w1"] * layer.scale, "alpha": torch.tensor(float(layer.rank))}
        kernel = layer.adapted.base_layer.weight.shape[2:]
        if "lokr_w2" in layer.values:
            return {**tensors, "lokr_w2": layer.values["lokr_w2"]}
        a, b = layer.values["lokr_w2_a"], layer.values["lokr_w2_b"]
        if not kernel:
            return {**tensors, "lokr_w2_a": a, "lokr_w2_b": b}
        return {**tensors, "lokr_w2": (a @ b).view(a.shape[0], -1, *kernel)}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
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
        """Return two factors, also of an adapter with `decompose_both` or `use_effective_conv2d`."""
        return _without_cores(values)

    def load_layer(self, values: dict[str, torch.Tensor], layer: nn.Module) -> dict[str, torch.Tensor]:
        """Factor a whole second factor if this run trains it as a product and its rank allows that without loss."""
        import torch

        if "lokr_w2" not in values or "default" not in layer.lokr_w2_a:
            return values
        rank = layer.r["default"]
        u, s, v = torch.linalg.svd(values["lokr_w2"].flatten(1), full_matrices=False)
        if s[rank:].norm() > _ROUNDING * s.norm():
            return values
        # A smaller matrix has fewer singular values than the run's rank.
        root = s[:rank].sqrt()
        left, right = u.new_zeros(len(u), rank), v.new_zeros(rank, v.shape[1])
        left[:, : len(root)], right[: len(root)] = u[:, :rank] * root, root[:, None] * v[:rank]
        return {"lokr_w1": values["lokr_w1"], "lokr_w2_a": left, "lokr_w2_b": right}


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
