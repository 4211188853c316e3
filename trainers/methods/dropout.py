"""Dropout of an adapter's inputs, ranks and whole layers, as LyCORIS and sd-scripts have it.

A resumed run repeats it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..rng import stream_seed
from .arguments import STRUCTURE_DROPOUT, value_of

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe


@contextmanager
def dropping_out(
    trees: Sequence[nn.Module], device: torch.device, recipe: Recipe, step: int, rank: int = 0
) -> Iterator[None]:
    """Enable the adapters' dropout within the block, drawn from the seed and the step alone.

    The dropout of the frozen network stays off. Outside the block the adapters' dropout is off too: in previews,
    validation and gradient checks.

    Args:
        rank: rank of the process. Each process draws its own masks: otherwise all samples of a step would lose the
            same inputs.
    """
    if not (recipe.dropout or {"rank_dropout", "module_dropout"} & dict(recipe.adapter_args).keys()):
        yield
        return
    named = [pair for tree in trees for pair in tree.named_modules()]
    layers = [layer for name, layer in named if name.endswith((".lora_dropout.default", f".{STRUCTURE_DROPOUT}"))]
    # torch's dropout draws from torch's global generator. Checkpointing restores that generator before it recomputes.
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(stream_seed("dropout", recipe.seed, step, *([rank] if rank else [])))
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()


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
