"""Products of a frozen layer and its low-rank adapter, y = W x + b + s B A x, with their gradients (Hu et al. 2021).

In a checkpointed block, each product is two autograd functions. The narrow one computes A x and saves all that the
backward needs; the wide one adds B (A x) to the frozen layer's output in place. Checkpointing recomputes a block up to
the last saved tensor. So a block that ends with an adapted layer is recomputed without that layer's frozen product.
Elsewhere a linear product is one function, which takes fewer Python calls.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from .deferred import block_in_progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn


# A checkpointed block keeps A x if x is at least so many times larger; the rank does not bound its memory otherwise.
_LEAST_RATIO = 8


class Geometry(NamedTuple):
    """Stride, padding and dilation of a convolution over two axes."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def is_pointwise(self) -> bool:
        """Report whether a 1x1 kernel computes each position of the output from the same position of the input."""
        return self.stride == (1, 1) and self.padding == (0, 0)


def linear(
    x: torch.Tensor,
    down: torch.Tensor,
    ups: Sequence[torch.Tensor],
    scales: Sequence[float],
    layers: Sequence[Mapping[str, torch.Tensor | None]],
) -> list[torch.Tensor]:
    """Return the outputs of linear layers that share their input.

    Args:
        x: [..., in].
        down: all A, [sum of the ranks, in].
        ups: B of each layer, [out, r].
        scales: s of each layer.
        layers: parameters of the frozen layers, `weight` [out, in] and `bias` [out] or None. x, A and B have their
            dtype and device.

    Returns:
        [..., out] for each layer.
    """
    weights = [layer["weight"] for layer in layers]
    # In a tuple, autograd does not see the frozen weights.
    frozen = scales, weights, [layer["bias"] for layer in layers]
    if not _is_recorded(x, down, *ups):
        return _wide(x, _narrow(x, down), ups, *frozen)
    if block_in_progress() is None:
        return list(_Product.apply(frozen, x, down, *ups))
    # Nor does the wide function's see x: its gradient is the narrow function's.
    return list(_Wide.apply((x, *frozen), _Narrow.apply(x, down, *ups, *weights), *ups))


def convolution(x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, layer: nn.Conv2d) -> torch.Tensor:
    """Return the output of a convolution.

    Args:
        x: [N, in, H, W].
        down: A, [r, in, kh, kw].
        up: B, [out, r, 1, 1].
        scale: s.
        layer: the frozen layer, with one group. x, A and B have the dtype and device of its weight.

    Returns:
        [N, out, H', W'].
    """
    geometry = Geometry(layer.stride, layer.padding, layer.dilation)
    if not _is_recorded(x, down, up):
        return _wide_convolution(x, _convolve(x, down, None, geometry), up, scale, layer, geometry)
    middle = _NarrowConvolution.apply(geometry, x, down, up, layer.weight)
    return _WideConvolution.apply((x, scale, layer, geometry), middle, up)


def turned(up: torch.Tensor) -> torch.Tensor:
    """Return B transposed, [r, out]."""
    return up.t().contiguous() if is_on_cpu(up) else up.t()


def is_on_cpu(tensor: torch.Tensor) -> bool:
    """Report whether a tensor is on a CPU, where a product whose last size is the rank takes up to five times as long.

    Its transpose takes a copy of B more.
    """
    return tensor.device.type == "cpu"


def _once(compute: Callable[..., torch.Tensor], x: torch.Tensor, down: torch.Tensor, *args) -> torch.Tensor:
    """Return A x, computed once if the block is checkpointed and A x is small beside x."""
    block = block_in_progress()
    if block is None:
        return compute(x, down, *args)
    rank, width = down.shape[:2]
    return block.narrow(rank * _LEAST_RATIO <= width, partial(compute, x, down, *args))


def _is_recorded(*inputs: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _refuse_second_derivative() -> None:
    """Raise RuntimeError if the backward is recorded: it adds in place, and has no derivative of its own."""
    if torch.is_grad_enabled():
        raise RuntimeError("The product of an adapted layer has no second derivative.")


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _by_layer(middle: torch.Tensor, ups: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Return each layer's part of A x or of its gradient."""
    return [middle] if len(ups) == 1 else middle.split_with_sizes([up.shape[1] for up in ups])


def _narrow(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return A x, [r, rows]."""
    return down.mm(_rows(x).t())


def _wide(x, middle, ups, scales, weights, biases) -> list[torch.Tensor]:
    """Return W x + b + s B (A x) of each layer."""
    outputs = []
    rows = zip(_by_layer(middle, ups), ups, scales, weights, biases, strict=True)
    for part, up, scale, weight, bias in rows:
        # The input's own shape gives the bits that the frozen layer alone would give.
        output = functional.linear(x, weight, bias)
        output = output if output.is_contiguous() else output.contiguous()
        if output._is_view():
            # Autograd forbids changes in place of a view that was made here. Some networks write into their outputs.
            output = torch.ops.aten._unsafe_view(output, output.shape)
        _rows(output).addmm_(part.t(), turned(up), alpha=scale)
        outputs.append(output)
    return outputs


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, down, *frozen):
        middle = _once(_narrow, x, down)
        ctx.save_for_backward(x, down, middle, *frozen)
        return middle

    @staticmethod
    def backward(ctx, middle_grad):
        # Those that the wide function has computed.
        grads, ctx.grads = ctx.grads, None
        return grads


class _Wide(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, middle, *ups):
        x, ctx.scales, weights, biases = frozen
        # The context of the function that made A x.
        ctx.narrow = middle.grad_fn
        ctx.set_materialize_grads(False)
        compute = partial(_wide, x, middle, ups, ctx.scales, weights, biases)
        return tuple(block_in_progress().wide(x, ups, compute))

    @staticmethod
    def backward(ctx, *grads):
        narrow = ctx.narrow
        saved, needs = narrow.saved_tensors, narrow.needs_input_grad
        middle_grad, x_grad, down_grad, *up_grads = _gradients(saved, ctx.scales, grads, needs)
        narrow.grads = x_grad, down_grad, *[None] * 2 * len(grads)
        return None, middle_grad, *up_grads


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, x, down, *ups):
        ctx.scales, weights, _ = frozen
        middle = _narrow(x, down)
        ctx.save_for_backward(x, down, middle, *ups, *weights)
        ctx.set_materialize_grads(False)
        return tuple(_wide(x, middle, ups, *frozen))

    @staticmethod
    def backward(ctx, *grads):
        return None, *_gradients(ctx.saved_tensors, ctx.scales, grads, ctx.needs_input_grad[1:])[1:]


def _gradients(saved, scales, grads, needs: tuple[bool, ...]) -> list[torch.Tensor | None]:
    """Return the gradients of A x, x, all A and each B. `needs` says which of x, A and each B have one."""
    _refuse_second_derivative()
    count = len(grads)
    x, down, middle, *frozen = saved
    ups, weights = frozen[:count], frozen[count:]
    middle_grad = torch.empty_like(middle)
    up_grads: list[torch.Tensor | None] = []
    pairs, copied = [], 0
    parts = _by_layer(middle, ups), _by_layer(middle_grad, ups)
    rows = zip(*parts, ups, scales, weights, grads, needs[2 : 2 + count], strict=True)
    for part, part_grad, up, scale, weight, grad, needs_up in rows:
        if grad is None:
            part_grad.zero_()
            up_grads.append(None)
            continue
        grad = _rows(grad)
        torch.addmm(part_grad, turned(up), grad.t(), beta=0, alpha=scale, out=part_grad)
        up_grads.append(_up_grad(part, grad, scale) if needs_up else None)
        pairs.append((grad, weight))
        copied += grad.numel() + weight.numel()
    down_grad = middle_grad.mm(_rows(x)) if needs[1] else None
    if not (needs[0] and pairs):
        return [middle_grad, None, down_grad, *up_grads]
    pairs.append((middle_grad.t(), down))
    # One product with all W and A moves fewer bytes than one with each if the copies that it needs are small beside x.
    # GPUs compute it slowly if the rank is no multiple of 8.
    if 2 * copied < (len(pairs) - 1) * x.numel() and len(middle) % 8 == 0 and not is_on_cpu(x):
        grads, weights = zip(*pairs, strict=True)
        pairs = [(torch.cat(grads, 1), torch.cat(weights))]
    x_grad = pairs[0][0].mm(pairs[0][1])
    for grad, weight in pairs[1:]:
        x_grad.addmm_(grad, weight)
    return [middle_grad, x_grad.view(x.shape), down_grad, *up_grads]


def _up_grad(middle: torch.Tensor, grad: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the gradient of B, [out, r], from A x [r, rows] and the output's gradient [rows, out]."""
    if is_on_cpu(grad):
        return torch.addmm(middle.new_empty(1), middle, grad, beta=0, alpha=scale).t()
    return torch.addmm(middle.new_empty(1), grad.t(), middle.t(), beta=0, alpha=scale)


def _convolve(x, weight, bias, geometry: Geometry) -> torch.Tensor:
    return functional.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation)


def _wide_convolution(x, middle, up, scale, layer, geometry: Geometry) -> torch.Tensor:
    """Return W x + b + s B (A x)."""
    output = _convolve(x, layer.weight, layer.bias, geometry)
    output = output if output.is_contiguous() else output.contiguous()
    over_channels = up.flatten(1).expand(len(middle), -1, -1)
    output.flatten(2).baddbmm_(over_channels, middle.flatten(2), alpha=scale)
    return output


class _NarrowConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, geometry, x, down, up, weight):
        middle = _once(_convolve, x, down, None, geometry)
        ctx.save_for_backward(x, down, middle, up, weight)
        ctx.geometry = geometry
        return middle

    @staticmethod
    def backward(ctx, middle_grad):
        (x, down), x_grad, is_whole = ctx.left
        ctx.left = None
        if x_grad is not None and not is_whole and _is_point(down, ctx.geometry) and x_grad.is_contiguous():
            # The product of a 1x1 convolution adds in place.
            over_inputs = down.flatten(1).t().expand(len(x), -1, -1)
            x_grad.flatten(2).baddbmm_(over_inputs, middle_grad.flatten(2))
            is_whole = True
        needs = (x_grad is not None and not is_whole, ctx.needs_input_grad[2])
        added, down_grad = _convolution_backward(middle_grad, x, down, ctx.geometry, needs)
        return None, x_grad if added is None else x_grad.add_(added), down_grad, None, None


class _WideConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, frozen, middle, up):
        x, ctx.scale, layer, geometry = frozen
        ctx.narrow = middle.grad_fn
        return _wide_convolution(x, middle, up, ctx.scale, layer, geometry)

    @staticmethod
    def backward(ctx, grad):
        _refuse_second_derivative()
        x, down, middle, up, weight = ctx.narrow.saved_tensors
        flat, narrow = grad.flatten(2), middle.flatten(2)
        up_grad = None
        if ctx.needs_input_grad[2]:
            products = torch.baddbmm(flat.new_empty(1), flat, narrow.mT, beta=0, alpha=ctx.scale)
            up_grad = (products[0] if len(products) == 1 else products.sum(0)).view(up.shape)
        over_channels = up.flatten(1).t().expand(len(flat), -1, -1)
        middle_grad = torch.baddbmm(narrow.new_empty(1), over_channels, flat, beta=0, alpha=ctx.scale)
        middle_grad = middle_grad.view(middle.shape)
        x_grad, is_whole, geometry = None, False, ctx.narrow.geometry
        if ctx.narrow.needs_input_grad[1]:
            is_whole = not _is_point(down, geometry) and _is_joined(x, grad, weight)
            pair = (torch.cat([grad, middle_grad], 1), torch.cat([weight, down])) if is_whole else (grad, weight)
            x_grad, _ = _convolution_backward(pair[0], x, pair[1], geometry, (True, False))
        ctx.narrow.left = (x, down), x_grad, is_whole
        return None, middle_grad, up_grad


def _is_point(down: torch.Tensor, geometry: Geometry) -> bool:
    return down[0, 0].numel() == 1 and geometry.is_pointwise


def _is_joined(x: torch.Tensor, grad: torch.Tensor, weight: torch.Tensor) -> bool:
    """Report whether one product for the gradient of x moves fewer bytes than that of W, that of A and their sum.

    The one product needs copies: of the output's gradient beside that of A x, and of W beside A.
    """
    return not is_on_cpu(grad) and grad.numel() + weight.numel() < 2 * x.numel()


def _convolution_backward(grad, x, weight, geometry: Geometry, needs: tuple[bool, bool]):
    """Return the gradients of x and the weight, each None if it is not needed."""
    stride, padding, dilation = geometry
    x_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, (0, 0), 1, (*needs, False)
    )
    return x_grad, weight_grad
