"""The host's mixed-precision Linear, of weights in eight bits or fewer, as a Linear that can be trained through."""

from __future__ import annotations

import functools

import torch


def as_linears(tree: torch.nn.Module) -> None:
    """Makes real Linears of the host's quantised ones in a private tree.

    The host's class is a bare Module: neither this pack nor peft would know it for a Linear. And it multiplies in the
    weight's own format, which rounds the activations as well: here the gradient is that of the numbers the weights
    stand for, which stay as they are kept and are put into the activations' dtype at each use.
    """
    for layer in tree.modules():
        if _is_quantizing(type(layer)) and layer.weight is not None:
            layer.__class__ = _linear_of(type(layer))


def _is_quantizing(kind: type) -> bool:
    """By where the host defines it: within the function that makes the operations of mixed precision."""
    return kind.__name__ == "Linear" and "mixed_precision_ops" in kind.__qualname__


@functools.lru_cache(maxsize=64)
def _linear_of(kind: type) -> type:
    """The host's class that is a Linear too."""
    return type("Linear", (_Trained, kind, torch.nn.Linear), {"__module__": __name__})


class _Trained:
    """What such a Linear does while gradients may be wanted of what goes into it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        smoothing = getattr(self, "pre_quant_scale", None)
        if smoothing is not None:
            x = x * smoothing.to(x)
        return _Product.apply(x, self)


class _Product(torch.autograd.Function):
    """x W' + b with a W that is put into numbers anew for the backward, in place of a copy kept for it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        """Without gradients recorded, so that what the host does in place while it dequantises takes place."""
        ctx.layer = layer
        ctx.dtype = x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return torch.nn.functional.linear(x, _numbers(layer.weight, x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Of x alone: weight and bias are frozen."""
        return (gradient @ _numbers(ctx.layer.weight, gradient.dtype)).to(ctx.dtype), None


def _numbers(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as the numbers that it stands for."""
    # A plain tensor has a method of that name too, and refuses it.
    return (weight if type(weight.data) is torch.Tensor else weight.dequantize()).to(dtype)
