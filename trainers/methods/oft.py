"""OFT: a rotation of each block of a layer's inputs (Qiu et al. 2023), with peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .rotation import Rotation
from .targets import LINEAR, POINT

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


class OFT(Rotation):
    """W R, where R has Cayley's form and is the identity at the start."""

    name = "OFT"
    # On larger kernels, peft's OFT is not the identity at the start.
    kinds = frozenset({LINEAR, POINT})
    zero_init = frozenset({"oft_R"})
    network = ("lycoris.kohya", {"algo": "diag-oft"})

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's OFT configuration with exact orthogonality.

        peft's series approximation (Cayley-Neumann) calls `R.add_()` without using its result. Under `OutOfPlace` that
        addition has no effect.
        """
        from peft import OFTConfig

        return OFTConfig(r=0, oft_block_size=recipe.rank, use_cayley_neumann=False)

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as peft merges it."""
        return (layer.get_delta_weight("default").cpu() @ weight.t()).t()
