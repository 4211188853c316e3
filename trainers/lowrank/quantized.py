"""Frozen layers with quantized weights, which each use dequantizes and none keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import PART
from .deferred import Deferred

if TYPE_CHECKING:
    from torch import Tensor

# Returns the weight [out, in, ...] in a dtype from a layer's parts.
Dequantize = Callable[[Sequence["Tensor"], torch.dtype], "Tensor"]
# Returns some of its rows, whose indices stand before the dtype.
DequantizeRows = Callable[[Sequence["Tensor"], "Tensor", torch.dtype], "Tensor"]


def store_quantized(
    layer: nn.Module,
    parts: Sequence[Tensor],
    dequantize: Dequantize,
    dtype: torch.dtype,
    shape: torch.Size | None = None,
    rows: DequantizeRows | None = None,
) -> None:
    """Turn a layer of any class into a quantized one with these parts in the place of its weight.

    Args:
        layer: a layer of a private tree: a convolution, an embedding, or a linear layer with `in_features`,
            `out_features` and `bias`.
        dtype: dtype of the weight for code that reads it whole.
        shape: the weight's shape; None for that of the layer's parameter.
        rows: None to dequantize the whole weight of an embedding for some of its rows.
    """
    shape = layer.weight.shape if shape is None else shape
    for name in [name for name in layer._parameters if name != "bias"]:
        del layer._parameters[name]
    layer.__class__ = next((ours for theirs, ours in _KINDS.items() if isinstance(layer, theirs)), QuantizedLinear)
    layer.weight_dtype = dtype
    layer.form = _Form([part.dtype for part in parts], shape, dequantize, rows)
    for number, part in enumerate(parts):
        # As integers: casts of a module's floating-point parameters pass them over.
        data = part.detach().view(torch.uint8) if part.is_floating_point() and part.itemsize == 1 else part.detach()
        layer.register_parameter(f"{PART}{number}", nn.Parameter(data, requires_grad=False))


class Quantized(nn.Module):
    """A frozen layer that computes with the dequantized weight, and whose gradient is that of this weight.

    The parts of the weight, such as codes and scales, are ordinary parameters: offloading, sharding and the count of
    memory see the bytes that there are.
    """

    weight_dtype: torch.dtype
    form: _Form

    @property
    def parts(self) -> list[nn.Parameter]:
        """Return the parameters that hold the weight."""
        return [self._parameters[f"{PART}{number}"] for number in range(len(self.form.dtypes))]

    @property
    def weight(self) -> Tensor:
        """Return the weight. Its shape, dtype and device cost nothing; any operation on it dequantizes."""
        # Without the layer: an offloaded one has its parts on the device only while its block runs.
        compute = partial(self.form.weight, self.parts, self.weight_dtype)
        return Deferred(compute, self.form.shape, self.weight_dtype, self.parts[0].device)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W' + b, for W as a matrix. Autograd keeps the parts of W, and no dequantized copy."""
        return product(x, bias, self.form, *self.parts)


class QuantizedLinear(Quantized, nn.Linear):
    """A quantized linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return self.product(x, self.bias)


class QuantizedConv2d(Quantized, nn.Conv2d):
    """A quantized convolution, with zeros around its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in, H, W] to [N, out, H', W']."""
        return (_convolution if _is_plain(x) else _Convolution.apply)(x, self.bias, self, *self.parts)


class QuantizedEmbedding(Quantized, nn.Embedding):
    """A quantized embedding."""

    def forward(self, tokens: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Map [...] to [..., width]. Dequantize each row that is used once."""
        rows, places = tokens.unique(return_inverse=True)
        return functional.embedding(places, self.form.rows(self.parts, rows, out_dtype or self.weight_dtype))


def count_weights(tree: nn.Module) -> int:
    """Return the number of a tree's weights. A quantized one counts as what it stands for, not as its packed parts."""
    layers = [layer for layer in tree.modules() if isinstance(layer, Quantized)]
    parts = {id(part) for layer in layers for part in layer.parts}
    rest = sum(weight.numel() for weight in tree.parameters() if id(weight) not in parts)
    return rest + sum(layer.form.shape.numel() for layer in layers)


_KINDS = {nn.Conv2d: QuantizedConv2d, nn.Embedding: QuantizedEmbedding}


class _Form:
    """Form of a quantized weight: the dtypes of its parts, its shape, and the functions that make it of them."""

    def __init__(
        self, dtypes: list[torch.dtype], shape: torch.Size, dequantize: Dequantize, rows: DequantizeRows | None
    ):
        self.dtypes = dtypes
        self.shape = shape
        self._dequantize = dequantize
        self._rows = rows

    def weight(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight, [out, in, ...]."""
        return self._dequantize(self._views(parts), dtype)

    def rows(self, parts: Sequence[Tensor], rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dequantized rows of the weight, by their indices."""
        return self._rows(self._views(parts), rows, dtype) if self._rows else self.weight(parts, dtype)[rows]

    def _views(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.detach().view(own) for part, own in zip(parts, self.dtypes, strict=True)]


def product(x: Tensor, bias: Tensor | None, form: _Form, *parts: Tensor) -> Tensor:
    """Return x W' + b, whose backward dequantizes W again."""
    return (_linear if _is_plain(x) else _Product.apply)(x, bias, form, *parts)


def _is_plain(x: Tensor) -> bool:
    # torch.compile fails at a function of which no input needs a gradient.
    return torch.compiler.is_compiling() and not x.requires_grad


def _linear(x: Tensor, bias: Tensor | None, form: _Form, *parts: Tensor) -> Tensor:
    weight = form.weight(parts, x.dtype).flatten(1)
    return functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


class _Product(torch.autograd.Function):
    """x W' + b that dequantizes W again in the backward."""

    @staticmethod
    def forward(ctx, x, bias, form, *parts):
        ctx.save_for_backward(*parts)
        ctx.form = form
        return _linear(x, bias, form, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x alone: weight and bias are frozen."""
        parts = ctx.saved_tensors
        return grad @ ctx.form.weight(parts, grad.dtype).flatten(1), None, None, *[None] * len(parts)


def _convolution(x: Tensor, bias: Tensor | None, layer: QuantizedConv2d, *parts: Tensor) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return functional.conv2d(x, layer.form.weight(parts, x.dtype), bias, *geometry)


class _Convolution(torch.autograd.Function):
    """A convolution that dequantizes its weight again in the backward."""

    @staticmethod
    def forward(ctx, x, bias, layer, *parts):
        ctx.save_for_backward(*parts)
        ctx.form, ctx.shape = layer.form, x.shape
        ctx.geometry = layer.stride, layer.padding, layer.dilation, layer.groups
        return _convolution(x, bias, layer, *parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x alone."""
        parts = ctx.saved_tensors
        weight = ctx.form.weight(parts, grad.dtype)
        return nn.grad.conv2d_input(ctx.shape, weight, grad, *ctx.geometry), None, None, *[None] * len(parts)
