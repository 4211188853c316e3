"""BOFT: a rotation of blocks of a layer's inputs and a scale on its outputs (Liu et al. 2024), with peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import SettingsError
from .oft import Rotation
from .targets import LINEAR, largest_divisor

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


def _forward(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward that computes s W R x + b.

    peft subtracts the bias from the output and adds it again, which rounds the output even where s is one.
    """
    base = layer.base_layer

    def forward(x: torch.Tensor) -> torch.Tensor:
        rotation, scale = layer.get_delta_weight("default")
        scale = scale.flatten()
        out = base(x @ rotation.to(x.dtype))
        changed = out * scale
        if base.bias is not None:
            changed = changed + (1 - scale) * base.bias
        return changed.to(out.dtype)

    return forward


class BOFT(Rotation):
    """s W R, the identity at the start.

    It has one butterfly factor, as peft computes it without its CUDA extension. A run must not depend on whether the
    extension is installed.
    """

    name = "BOFT"
    # On 3x3 convolutions peft builds matrices of (9 C)^2 numbers.
    kinds = frozenset({LINEAR})
    zero_init = frozenset({"boft_R"})
    one_init = frozenset({"boft_s"})

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """Inject as every peft type does, but compile no extension."""
        with without_compile():
            return super().inject(module, targets, recipe)

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's BOFT configuration, with the largest block up to the rank that divides all widths."""
        from peft import BOFTConfig

        widths = {layer.in_features for layer in layers.values()}
        size = largest_divisor(recipe.rank, *widths)
        if size < 2:
            raise SettingsError(
                f"BOFT needs a block of 2 to {recipe.rank} inputs that divides the widths of all layers "
                f"({', '.join(map(str, sorted(widths)))}), and there is none.",
                "Set another rank, choose fewer targets, or use the type OFT.",
                "rank",
            )
        return BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1)

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer. The layer belongs to the private module."""
        layer.forward = _forward(layer)

    def changed(self, layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight as peft merges it."""
        rotation, scale = layer.get_delta_weight("default")
        return (rotation.cpu() @ weight.t()).t() * scale.cpu()


@contextmanager
def without_compile() -> Iterator[None]:
    """Keep peft from building a CUDA extension, which computes the same with one butterfly factor."""
    from peft.tuners.boft import layer

    kept = layer.get_fbd_cuda
    layer.get_fbd_cuda = lambda: None
    try:
        yield
    finally:
        layer.get_fbd_cuda = kept
