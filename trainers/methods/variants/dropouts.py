"""Dropout of ranks and of whole layers, as LyCORIS and sd-scripts have them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .arguments import value_of

if TYPE_CHECKING:
    from ...recipe.recipe import Recipe


class StructureDropout(nn.Module):
    """Dropout of a layer's ranks or of the whole layer. It does nothing in `eval` mode.

    Args:
        rank, module: probabilities.
    """

    def __init__(self, rank: float, module: float):
        super().__init__()
        self._rank, self._module = rank, module

    def ranks(self, middle: torch.Tensor) -> torch.Tensor:
        """Drop ranks of each example and enlarge the others, as sd-scripts does.

        Args:
            middle: A x, [N, ..., r] of a linear layer; [N, r, H, W] of a convolution.
        """
        if not self.training:
            return middle
        shape = [len(middle), *[1] * (middle.dim() - 1)]
        place = 1 if middle.dim() == 4 else -1
        shape[place] = middle.shape[place]
        kept = (torch.rand(shape, device=middle.device) >= self._rank) / (1 - self._rank)
        return middle * self._with_module(kept).to(middle.dtype)

    def rows(self, difference: torch.Tensor) -> torch.Tensor:
        """Drop rows of a difference [out, ...], as LyCORIS does with LoHa and LoKr."""
        if not self.training:
            return difference
        shape = [len(difference), *[1] * (difference.dim() - 1)]
        kept = (torch.rand(shape, device=difference.device) >= self._rank).to(difference.dtype)
        return difference * self._with_module(kept)

    def _with_module(self, kept: torch.Tensor) -> torch.Tensor:
        return kept * (torch.rand((), device=kept.device) >= self._module)


def structure_dropout(recipe: Recipe) -> StructureDropout | None:
    """Return the dropout of `adapter_args`, or None without one."""
    rank, module = value_of(recipe, "rank_dropout", 0.0), value_of(recipe, "module_dropout", 0.0)
    return StructureDropout(rank, module).eval() if rank or module else None
