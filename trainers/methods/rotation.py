"""What OFT and BOFT share: weights whose inputs are rotated, exported to the host as whole differences."""

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

    peft rotates a layer's inputs and the host's own key for such adapters rotates outputs, so the host gets the
    difference itself.
    """

    needs_base = True
    has_rank = False

    def check(self, recipe: Recipe) -> None:
        """A block of one cannot turn."""
        super().check(recipe)
        if recipe.rank < 2:
            raise SettingsError(
                f"{self.name} rotates blocks of `rank` inputs, and rank is {recipe.rank}.",
                "Set rank to 2 or more.",
                "rank",
            )

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] as peft's layer makes it with the trainables it holds."""
        raise NotImplementedError

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """The whole difference."""
        import torch

        weight = layer.weight()
        with torch.no_grad(), _holding(layer):
            flat = self.changed(layer.adapted, weight.flatten(1))
        return {"diff": flat.view_as(weight) - weight}


@contextmanager
def _holding(layer: Layer) -> Iterator[None]:
    """Lends the layer's exported values to peft's layer: they may be an average of what it trains."""
    held = {}
    for name, parameter in layer.adapted.named_parameters():
        stem = name.split(".")[0]
        if stem in layer.values:
            held[name] = (parameter, parameter.data)
            # Where peft's layer is, whose own index tables cannot be mixed with another device's.
            parameter.data = layer.values[stem].to(parameter.device)
    try:
        yield
    finally:
        for parameter, data in held.values():
            parameter.data = data
