"""LoRA: a low-rank difference on each adapted layer (Hu et al. 2021), by peft."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..families import is_attention
from ..formats.kohya import lora_to_kohya
from ..objective.noise import generator
from .base import Method

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..families import Family
    from ..settings import Recipe

_A = ".lora_A.default.weight"
_B = ".lora_B.default.weight"


def _lean(layer: nn.Module) -> None:
    """Gives a peft LoRA layer a forward of its own over the same parameters: one product less and no pass to scale.

    peft scales and adds the adapter's output in passes of their own over the whole activation, forward and
    backward; here the scale goes on the narrow middle and the sum into the product. On the private tree only.
    """
    base = layer.base_layer
    down = layer.lora_A["default"]
    up = layer.lora_B["default"]
    scale = layer.scaling["default"]

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = base(x)
        if layer.disable_adapters:
            return out
        middle = down(x.to(down.weight.dtype))
        if scale != 1.0:
            middle = middle * scale
        if middle.dtype != out.dtype:
            return out + up(middle).to(out.dtype)
        return out.flatten(0, -2).addmm(middle.flatten(0, -2), up.weight.t()).view_as(out)

    layer.forward = forward


def _draw(shape: torch.Size, seed: int, name: str) -> torch.Tensor:
    """A's start values as peft and kohya draw them: uniform within 1 / sqrt(inputs), [r, inputs, ...] float32."""
    import torch

    bound = (shape.numel() / shape[0]) ** -0.5
    return (torch.rand(shape, generator=generator("lora", seed, name)) * 2 - 1) * bound


class LoRA(Method):
    """W + (alpha / rank) B A, with B zero at the start."""

    name = "LoRA"

    def targets(self, module: nn.Module, family: Family) -> list[str]:
        """The attention projections among the tree's Linears.

        Raises:
            ModelError: there is none.
        """
        from torch import nn

        paths = [
            path
            for path, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and layer.weight is not None and is_attention(path, family)
        ]
        if not paths:
            raise ModelError(
                f"No trainable attention layer was found in the model ({type(module).__name__}).",
                "Quantised formats that hide their layers (GGUF, Nunchaku) cannot be trained; load the original.",
                "model",
            )
        return sorted(paths)

    def inject(self, module: nn.Module, targets: list[str], recipe: Recipe) -> dict[str, nn.Parameter]:
        """peft's LoRA layers at the targets; A is drawn from the recipe's seed."""
        import torch
        from peft import LoraConfig, inject_adapter_in_model

        exactly = "|".join(re.escape(path) for path in targets)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=f"(?:{exactly})")
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, module)
        for path in targets:
            _lean(module.get_submodule(path))
        trainables = {}
        for name, parameter in module.named_parameters():
            if name.endswith((_A, _B)):
                # peft makes them in the base's dtype, which may be eight bits: drawn anew, in full.
                start = _draw(parameter.shape, recipe.seed, name) if name.endswith(_A) else torch.zeros(parameter.shape)
                parameter.data = start.to(parameter.device)
                parameter.requires_grad_(True)
                trainables[name] = parameter
        return dict(sorted(trainables.items()))

    def export(
        self, tensors: dict[str, torch.Tensor], recipe: Recipe, name_of: Callable[[str], str]
    ) -> dict[str, torch.Tensor]:
        """kohya's tensors, with alpha in the file."""
        layers = {}
        for name, tensor in tensors.items():
            if name.endswith(_A):
                layers.setdefault(name[: -len(_A)], {})["down"] = tensor
            elif name.endswith(_B):
                layers.setdefault(name[: -len(_B)], {})["up"] = tensor
        return lora_to_kohya(layers, recipe.alpha, name_of)
