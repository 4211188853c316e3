"""Base class of LyCORIS' types that peft computes as a whole difference: LoHa and LoKr, with their variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import SettingsError
from ...formats.keys import DORA
from ..dora import decomposed, host_magnitude, row_squares
from ..peft_method import PeftMethod
from ..targets import CONV, LINEAR, POINT, Layer
from . import NAME
from .arguments import value_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...formats.peft_format import PeftAdapter
    from ...recipe.recipe import Recipe


def _forward(layer: nn.Module, delta: Callable[[nn.Module], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that multiplies by the difference of the weight in the dtype of the input.

    peft casts the input to the dtype of the trainables instead, and so computes and keeps activations in float32.
    """
    from torch.nn.functional import conv2d, linear

    base, dropout, magnitude = layer.base_layer, getattr(layer, NAME, None), getattr(layer, DORA, None)

    def forward(x: torch.Tensor) -> torch.Tensor:
        difference = delta(layer)
        if dropout is not None:
            difference = dropout.rows(difference)
        out = base(x)
        given = difference.to(x.dtype)
        if given.dim() == 2:
            change = linear(x, given)
        else:
            change = conv2d(x, given, None, base.stride, base.padding, base.dilation)
        if magnitude is None:
            return out + change.to(out.dtype)
        weight = base.weight.detach().to(difference.dtype)
        squares = (weight + difference).flatten(1).square().sum(1)
        return decomposed(base, out, change, magnitude["default"], squares)

    return forward


class LycorisMethod(PeftMethod):
    """A type of LyCORIS. With dora_wd it trains m (W + D) / |W + D| by row (Liu et al. 2024)."""

    kinds = frozenset({LINEAR, POINT, CONV})
    arguments = ("dora_wd", "use_tucker", "rank_dropout", "module_dropout")
    is_linear = True

    def check(self, recipe: Recipe) -> None:
        """Raise SettingsError also for a slider with dora_wd, whose effect is not proportional to the strength."""
        super().check(recipe)
        if recipe.slider_strength and value_of(recipe, "dora_wd"):
            raise SettingsError(
                "dora_wd is set, but its effect is not proportional to the strength, so a slider cannot use it.",
                "Leave dora_wd out of adapter_args.",
                "adapter_args",
            )

    def reads_base(self, recipe: Recipe) -> bool:
        """Return True if an export needs the frozen weights: for magnitudes."""
        return self.needs_base or bool(value_of(recipe, "dora_wd"))

    def read_later(self, module: nn.Module) -> list[nn.Parameter]:
        """Return the frozen weights that an export reads."""
        layers = [layer for layer in module.modules() if hasattr(layer, DORA)]
        return super().read_later(module) or [weight for layer in layers for weight in layer.base_layer.parameters()]

    def prepare(self, layer: nn.Module, recipe: Recipe) -> None:
        """Add the magnitudes of dora_wd."""
        from torch import nn

        if value_of(recipe, "dora_wd"):
            squares = row_squares(layer)
            shape = [-1, *[1] * (layer.base_layer.weight.dim() - 1)]
            setattr(layer, DORA, nn.ParameterDict({"default": nn.Parameter(squares.sqrt().view(shape))}))

    def start_value(self, stem: str, layer: nn.Module, shape: torch.Size, seed: int, name: str) -> torch.Tensor:
        """Start magnitudes at the norms of the rows."""
        if stem == DORA:
            return row_squares(layer).sqrt().view(shape)
        return super().start_value(stem, layer, shape, seed, name)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        from ..dropout import structure_dropout

        dropout = structure_dropout(recipe)
        if dropout is not None:
            layer.add_module(NAME, dropout)
        layer.forward = _forward(layer, self.delta)

    def delta(self, layer: nn.Module) -> torch.Tensor:
        """Return the difference of peft's layer for training, [out, in, ...]."""
        return layer.get_delta_weight("default")

    def difference(self, layer: Layer) -> torch.Tensor:
        """Return the difference of a layer's weight, [out, in, ...]."""
        raise NotImplementedError

    def host_magnitudes(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return the magnitudes for ComfyUI's formula, or nothing without dora_wd."""
        if DORA not in layer.values:
            return {}
        return {DORA: host_magnitude(layer, layer.values[DORA], self.difference(layer))}

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors, the magnitudes of rows, and the scale of the difference."""
        factors = self.factors_of_host({end: tensor for end, tensor in tensors.items() if end != DORA})
        magnitude = tensors.get(DORA)
        if factors is None or magnitude is None:
            return factors
        return {**factors[0], DORA: magnitude.float()}, factors[1]

    def factors_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return the factors and their scale, or None if the file does not fix them."""
        raise NotImplementedError

    def native(
        self, tensors: dict[str, torch.Tensor], recipe: Recipe, published_name: Any, module: nn.Module | None = None
    ) -> PeftAdapter | None:
        """Return peft's form, or None with dora_wd, which peft has for LoRA alone."""
        return None if value_of(recipe, "dora_wd") else super().native(tensors, recipe, published_name, module)
