"""LoRA: a low-rank difference on each adapted layer (Hu et al. 2021), with peft."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..formats.kohya import lora_tensors
from .peft_method import PeftMethod
from .targets import CONV, LINEAR, POINT, Layer, alphas_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


def parts_of(layer: nn.Module) -> tuple:
    """Return (frozen layer, A, B, dropout, scale) of peft's LoRA layer."""
    return (
        layer.base_layer,
        layer.lora_A["default"],
        layer.lora_B["default"],
        layer.lora_dropout["default"],
        layer.scaling["default"],
    )


def _linear(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward for a linear layer that uses peft's parameters and takes less time.

    peft scales the adapter's output and adds it in separate passes over the whole activation, forward and backward.
    This forward scales the narrow middle activation and adds within the matrix product. On a CPU, a product whose last
    size is the rank takes up to five times as long as its transpose. So the middle activation is [r, rows] and B is
    transposed: autograd's own products then have the fast orientation as well.
    """
    from torch import nn

    base, down, up, drop, scale = parts_of(layer)
    drops = not isinstance(drop, nn.Identity)

    def forward(x: torch.Tensor) -> torch.Tensor:
        # One view serves both products. The narrow product comes before the wide one, so that the gradient of the wide
        # one is ready first and autograd adds the other to it in place.
        rows = x.flatten(0, -2)
        narrow = rows.to(down.weight.dtype)
        # Use the factors: a call of their modules takes longer than a narrow product.
        middle = down.weight.mm((drop(narrow) if drops else narrow).t())
        out = base(rows)
        if scale != 1.0:
            middle = middle * scale
        turned = up.weight.t().contiguous()
        if middle.dtype != out.dtype:
            return (out + middle.t().mm(turned).to(out.dtype)).view(*x.shape[:-1], out.shape[-1])
        return out.addmm(middle.t(), turned).view(*x.shape[:-1], out.shape[-1])

    return forward


def _convolution(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a forward for a convolution, which computes B as a matrix product over the channels.

    The frozen convolution runs last and the adapter's output is added to it. Checkpointing recomputes a block up to the
    last tensor that the backward pass needs. In a block that ends with a convolution, such as a U-Net's, it can then
    skip that convolution.
    """
    base, down, up, drop, scale = parts_of(layer)

    def forward(x: torch.Tensor) -> torch.Tensor:
        middle = down(drop(x.to(down.weight.dtype)))
        if scale != 1.0:
            middle = middle * scale
        over_channels = up.weight.flatten(1).expand(len(middle), -1, -1)
        change = over_channels.bmm(middle.flatten(2)).unflatten(2, middle.shape[2:])
        out = base(x)
        return out + change.to(out.dtype)

    return forward


class LoRA(PeftMethod):
    """W + (alpha / rank) B A, with B zero at the start."""

    name = "LoRA"
    kinds = frozenset({LINEAR, POINT, CONV})
    zero_init = frozenset({"lora_B"})
    lora_plus_params = frozenset({"lora_B"})
    scale_param = "lora_B"
    has_dropout = True
    variant: dict[str, Any] = {}

    def config(self, recipe: Recipe, layers: dict[str, nn.Module], ranks: dict[str, int]) -> Any:
        """Return peft's LoRA configuration, in this type's variant."""
        from peft import LoraConfig

        return LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            rank_pattern=ranks,
            alpha_pattern=alphas_of(ranks, recipe),
            lora_dropout=recipe.dropout,
            **self.variant,
        )

    def finish(self, layer: nn.Module, recipe: Recipe) -> None:
        """Replace the forward of peft's layer by the faster one. The layer belongs to the private module."""
        layer.forward = (_linear if layer.lora_A["default"].weight.dim() == 2 else _convolution)(layer)

    def export_layer(self, layer: Layer) -> dict[str, torch.Tensor]:
        """Return kohya's tensors, with the alpha that gives this layer's scale as alpha / rank."""
        return lora_tensors(layer.values["lora_A"], layer.values["lora_B"], layer.scale * layer.rank)

    def values_of_host(self, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], float] | None:
        """Return A and B, and the scale that the file's alpha gives them."""
        if not {"lora_down.weight", "lora_up.weight"} <= tensors.keys() <= {*lora_tensors(None, None, 1.0)}:
            return None
        down = tensors["lora_down.weight"]
        strength = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
        return {"lora_A": down.float(), "lora_B": tensors["lora_up.weight"].float()}, strength


class LoCon(LoRA):
    """LoRA whose default targets are all linear layers and convolutions."""

    name = "LoRA with conv"
    default_targets = "linear + conv"


class RsLoRA(LoRA):
    """LoRA with the scale alpha / sqrt(rank). Its file says alpha * sqrt(rank), because readers divide by the rank."""

    name = "rsLoRA"
    variant = {"use_rslora": True}

    def scale(self, rank: int, alpha: float) -> float:
        """Return alpha / sqrt(rank)."""
        return alpha / rank**0.5
