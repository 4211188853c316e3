"""Base class of OFT and BOFT, which rotate a layer's inputs and export full differences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import SettingsError
from .peft_method import PeftMethod
from .targets import Layer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


class Rotation(PeftMethod):
    """An orthogonal change of a weight. The recipe's rank is the size of the rotated blocks.

    peft rotates the inputs of a layer. ComfyUI's key for such adapters rotates outputs, so the export holds the full
    difference.
    """

    needs_base = True
    has_rank = False

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError if the block size is below 2: a block of one cannot rotate."""
        super().check(recipe)
        if recipe.rank < 2:
            raise SettingsError(
                f"{self.name} rotates blocks of `rank` inputs, but rank is {recipe.rank}.",
                "Set rank to 2 or more.",
                "rank",
            )

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight [out, in] that peft's layer computes from its current trainables."""
        raise NotImplementedError

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the full difference."""
        import torch

        weight = layer.weight()
        with torch.no_grad(), _holding(layer):
            flat = self.changed(layer.adapted, weight.flatten(1))
        return {"diff": flat.view_as(weight) - weight}


@contextmanager
def _holding(layer: Layer) -> Iterator[None]:
    """Put the exported values into peft's layer within the block. They may be an average of its trainables."""
    held = {}
    for name, parameter in layer.adapted.named_parameters():
        stem = name.split(".")[0]
        if stem in layer.values:
            held[name] = (parameter, parameter.data)
            # peft's layer has index tables on its device, so the values must be there as well.
            parameter.data = layer.values[stem].to(parameter.device)
    try:
        yield
    finally:
        for parameter, data in held.values():
            parameter.data = data
