"""Training through ComfyUI's Linears with quantized weights: of mixed precision, and of older scaled fp8."""

from collections.abc import Sequence

import comfy.ops
import torch

from .....trainers.errors import ModelError
from .....trainers.lowrank.quantized import QuantizedLinear, product, store_quantized


def as_linears(tree: torch.nn.Module, source: torch.nn.Module, input: str = "model") -> None:
    """Turn ComfyUI's quantized Linears in a private tree into QuantizedLinears.

    ComfyUI's class of mixed precision is a bare Module, so neither this pack nor peft recognizes it as a Linear. It
    also multiplies in the weight's own format, which rounds the activations as well. Here each use dequantizes the
    weight to the activations' dtype, and the gradient is that of the dequantized weight.

    Args:
        source: the tree that the private one was made of.

    Raises:
        ModelError: a layer scales its input, which an adapter beside it would not see.
    """
    for path, layer in tree.named_modules():
        if _is_made_by(type(layer), "scaled_fp8_ops"):
            scale = layer._parameters.pop("scale_weight")
            store_quantized(layer, [layer.weight, scale], _scaled, scale.dtype)
            layer.__class__ = _ScaledLinear
        if not _is_made_by(type(layer), "mixed_precision_ops") or layer.weight is None:
            continue
        if getattr(layer, "pre_quant_scale", None) is not None:
            raise ModelError(
                f"{path} scales its inputs for its quantized weight (pre_quant_scale): Graft cannot train an adapter "
                "that ComfyUI would apply in the same way.",
                "Load the original model, or one quantized without smoothing.",
                input,
            )
        if type(layer.weight.data) is torch.Tensor:
            layer.__class__ = comfy.ops.manual_cast.Linear
        else:
            _store_parts(layer, source.get_submodule(path).weight)


def _is_made_by(kind: type, function: str) -> bool:
    """Recognize a class of ComfyUI's by the function that defines it together with other operations."""
    return kind.__name__ == "Linear" and function in kind.__qualname__


def _scaled(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return parts[0].to(dtype).mul_(parts[1].to(dtype))


class _ScaledLinear(QuantizedLinear):
    """A Linear of scaled fp8. As in ComfyUI, the scale multiplies the smaller of weight and input."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return x W' + b."""
        if self.form.shape.numel() < x.numel():
            return super().product(x, bias)
        weight, scale = self.parts
        return product(x * scale.to(x.dtype), bias, self.form, weight, torch.ones_like(scale))


def check_scales(tree: torch.nn.Module, input: str) -> None:
    """Raise ModelError if the scales of a quantized weight of ComfyUI's are missing or not finite."""
    for name, weight in tree.named_parameters():
        if not hasattr(weight, "__tensor_flatten__"):
            continue
        parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
        # ComfyUI may not have read a weight yet: it is then a meta tensor.
        if len(parts) < 2 or not all(part.is_meta or part.float().isfinite().all() for part in parts[1:]):
            raise ModelError(
                f"{name} has no scale to read its quantized numbers with.", "Download the model's file again.", input
            )


def _store_parts(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    """Store the tensors inside a quantized weight as the layer's parameters: numbers and scales.

    They are those of the source, because ComfyUI's tensors copy their scales for each new tensor.
    """
    kind = type(weight.data)
    names, form = weight.__tensor_flatten__()

    def dequantize(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        inner = dict(zip(names, parts, strict=True))
        return kind.__tensor_unflatten__(inner, form, None, None).dequantize().to(dtype)

    store_quantized(layer, [getattr(weight, name) for name in names], dequantize, layer.factory_kwargs["dtype"])
