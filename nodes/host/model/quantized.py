"""Training through ComfyUI's mixed-precision Linear, whose weights have eight bits or fewer."""

from __future__ import annotations

import functools

import torch


def as_linears(tree: torch.nn.Module) -> None:
    """Turn ComfyUI's quantized Linears in a private tree into subclasses of torch's Linear.

    ComfyUI's class is a bare Module, so neither this pack nor peft recognizes it as a Linear. It also multiplies in the
    weight's own format, which rounds the activations as well. Here the weights stay quantized. Each use dequantizes
    them to the activations' dtype, and the gradient is that of the dequantized weights.
    """
    for layer in tree.modules():
        if _is_quantizing(type(layer)) and layer.weight is not None:
            layer.__class__ = _linear_of(type(layer))


def _is_quantizing(kind: type) -> bool:
    """Recognize ComfyUI's class by the function that defines it, which makes the mixed-precision operations."""
    return kind.__name__ == "Linear" and "mixed_precision_ops" in kind.__qualname__


@functools.lru_cache(maxsize=64)
def _linear_of(kind: type) -> type:
    """Return a subclass of ComfyUI's class that is a torch Linear too."""
    return type("Linear", (_Trained, kind, torch.nn.Linear), {"__module__": __name__})


class _Trained:
    """The forward of a quantized Linear whose input may need a gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        smoothing = getattr(self, "pre_quant_scale", None)
        if smoothing is not None:
            x = x * smoothing.to(x)
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W' + b that dequantizes W again in the backward instead of keeping a copy."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """Return x W' + b without recording gradients, so that ComfyUI may dequantize in place."""
        ctx.layer = layer
        ctx.dtype = x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return torch.nn.functional.linear(x, _numbers(layer.weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient of x alone: weight and bias are frozen."""
        return (gradient @ _numbers(ctx.layer.weight, gradient.dtype)).to(ctx.dtype), None


def _numbers(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the dequantized weight."""
    # A plain tensor has a dequantize method too, which raises.
    return (weight if type(weight.data) is torch.Tensor else weight.dequantize()).to(dtype)
