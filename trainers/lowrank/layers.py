"""Adapted layers: the forward of each, the layers that share an input, and their weights in the dtype of the step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import products

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

# Bytes of the weights that `StepWeights.split` casts at once: each cast starts two kernels.
_PART_BYTES = 4 * 1024 * 1024

# Name of an attribute that a host sets on layers whose class overrides torch's forward and computes the same.
PLAIN = "computes_as_torch"
# Name of the attribute of peft's layer that holds its LowRankLayer.
NAME = "low_rank"


class LowRankLayer:
    """Forward of a layer with a low-rank adapter: W x + b + s B A x.

    It computes the frozen layer as the host does and adds the adapter to it. A frozen layer that is no plain product,
    such as one with quantized weights, is called; its adapter is then computed apart.

    Args:
        base: the frozen layer.
        down, up: modules whose weights are A and B.
        drop: dropout on the adapter's input, or Identity.
        scale: s; a slider changes it within a step.
    """

    def __init__(self, base: nn.Module, down: nn.Module, up: nn.Module, drop: nn.Module, scale: float):
        self.base, self.down, self.up, self.drop, self.scale = base, down, up, drop, scale
        # Without torch's search for the attribute, which takes longer than a small product.
        self._frozen = base._parameters
        self.is_linear = down.weight.dim() == 2
        self.group = SharedInput([self])
        self.calls: _Calls | None = None
        self._drops = not isinstance(drop, nn.Identity)

    @property
    def can_share(self) -> bool:
        """Report whether the layer's output may be computed with that of others."""
        return self.is_linear and not self._drops

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.calls is not None:
            self.calls.append(self, x)
        # torch.compile fuses operations by itself, and can trace no function that keeps its tensors in Python objects.
        if not self._drops and not torch.compiler.is_dynamo_compiling():
            # A function mode such as OutOfPlace changes nothing here, and would see every operation.
            with torch._C.DisableTorchFunction():
                if self.is_plain(x):
                    return self.group.output(self, x) if self.is_linear else self._fused_convolution(x)
        return self.apart(x)

    def parameters(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B in a dtype: the parameters themselves if they have it."""
        return self.down._parameters["weight"].to(dtype), self.up._parameters["weight"].to(dtype)

    def is_plain(self, x: torch.Tensor) -> bool:
        """Report whether the frozen layer is a product of x and its weight, in their common dtype and device."""
        base, weight, bias = self.base, self._frozen.get("weight"), self._frozen["bias"]
        # A quantized layer has parts in its place.
        if (
            weight is None
            or weight.dtype != x.dtype
            or weight.device != x.device
            or (bias is not None and bias.dtype != x.dtype)
        ):
            return False
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
            return False
        if not self.is_linear and not (x.dim() == 4 and x.is_contiguous() and weight.is_contiguous()):
            return False
        return type(base).forward in _FORWARDS or PLAIN in vars(base)

    def _fused_convolution(self, x: torch.Tensor) -> torch.Tensor:
        down, (up,) = self.group.weights(x.dtype)
        return products.convolution(x, down, up, self.scale, self.base)

    def apart(self, x: torch.Tensor) -> torch.Tensor:
        """Call the frozen layer, and add the adapter to its output."""
        return self._linear(x) if self.is_linear else self._convolution(x)

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.group.weights_of(self, x.dtype)
        out = self.base(x)
        middle = down.mm(self.drop(x.flatten(0, -2)).t())
        if self.scale != 1.0:
            middle = middle * self.scale
        added = out.flatten(0, -2).addmm(middle.t().to(out.dtype), products.turned(up).to(out.dtype))
        return added.view(out.shape)

    def _convolution(self, x: torch.Tensor) -> torch.Tensor:
        down, up = self.group.weights_of(self, x.dtype)
        geometry = self.base.stride, self.base.padding, self.base.dilation
        middle = functional.conv2d(self.drop(x), down, None, *geometry)
        if self.scale != 1.0:
            middle = middle * self.scale
        over_channels = up.flatten(1).expand(len(middle), -1, -1)
        change = over_channels.bmm(middle.flatten(2)).unflatten(2, middle.shape[2:])
        # The frozen layer last: checkpointing then does not recompute it at a block's end.
        out = self.base(x)
        return out + change.to(out.dtype)


_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward)


class SharedInput:
    """Linear layers that read the same tensor, or one layer alone. The first one called computes all outputs.

    Attributes:
        layers: the layers, in the order of their calls.
        copies: (all A, every B) in the dtype of the step; None if the parameters have that dtype.
    """

    def __init__(self, layers: list[LowRankLayer]):
        self.layers = layers
        self.copies: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._input: tuple[torch.Tensor, int] | None = None
        self._outputs: dict[int, torch.Tensor] = {}
        self._frozen = [layer.base._parameters for layer in layers]
        for layer in layers:
            layer.group = self

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return all A, [sum of the ranks, in, ...], and B of each layer, [out, r, ...]."""
        if self.copies is not None and self.copies[0].dtype == dtype:
            return self.copies
        pairs = [layer.parameters(dtype) for layer in self.layers]
        downs, ups = [down for down, _ in pairs], [up for _, up in pairs]
        return downs[0] if len(downs) == 1 else torch.cat(downs), ups

    def weights_of(self, layer: LowRankLayer, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B of a layer."""
        if self.copies is None or self.copies[0].dtype != dtype:
            return layer.parameters(dtype)
        down, ups = self.copies
        place = self.layers.index(layer)
        return down.split([up.shape[1] for up in ups])[place], ups[place]

    def output(self, layer: LowRankLayer, x: torch.Tensor) -> torch.Tensor:
        """Return a linear layer's output, [..., out]."""
        if len(self.layers) == 1:
            return self._compute(x)[0]
        if self._input is not None and self._input[0] is x and self._input[1] == _version(x):
            output = self._outputs.pop(id(layer), None)
            if not self._outputs:
                self.forget()
            if output is not None:
                return output
        if not all(other.is_plain(x) for other in self.layers):
            return layer.apart(x)
        outputs = dict(zip(map(id, self.layers), self._compute(x), strict=True))
        output = outputs.pop(id(layer))
        self._input, self._outputs = (x, _version(x)), outputs
        return output

    def forget(self) -> None:
        """Free the outputs that no layer has returned."""
        self._input, self._outputs = None, {}

    def _compute(self, x: torch.Tensor) -> list[torch.Tensor]:
        down, ups = self.weights(x.dtype)
        return products.linear(x, down, ups, [layer.scale for layer in self.layers], self._frozen)


def _version(x: torch.Tensor) -> int:
    """Return the count of in-place changes. Inference tensors have none, and no gradient is taken through them."""
    return 0 if x.is_inference() else x._version


class StepWeights:
    """Forward hook of a network that casts its adapters' weights to the dtype of the network's input, all at once.

    The parameters stay in float32, and so do their gradients. The copies are valid until the next forward: a
    checkpointed block that is recomputed in the backward reads them again.
    """

    def __init__(self, layers: list[LowRankLayer]):
        self._layers = layers
        # The first part is cast when the network begins, the others when one of their blocks does.
        self._parts = [layers]
        self._waiting: set[int] = set()
        self._dtype = torch.float32

    def split(self, blocks: Iterable[nn.Module]) -> Iterator[RemovableHandle]:
        """Cast the weights of blocks when these begin, some megabytes at once, and yield the handles of the hooks.

        Autograd runs backwards in the reverse order of the forward. The gradients of weights that are cast at the start
        of the forward would arrive at the very end, too late to be sent to other processes meanwhile.
        """
        self._parts = [[]]
        rest, left = dict.fromkeys(self._layers), 0
        for block in blocks:
            own = [layer for layer in low_rank_layers(block).values() if layer in rest]
            if not own:
                continue
            size = sum(layer.down.weight.nbytes + layer.up.weight.nbytes for layer in own)
            if size > left:
                self._parts.append([])
                left = _PART_BYTES
            self._parts[-1] += own
            left -= size
            for layer in own:
                del rest[layer]
            yield block.register_forward_pre_hook(partial(self._begin, len(self._parts) - 1))
        self._parts[0] = list(rest)

    def __call__(self, network: nn.Module, inputs: tuple) -> None:
        for group in _groups(self._layers):
            group.forget()
            group.copies = None
        # Networks that can draw with sound take a list of latents.
        latent = inputs[0][0] if isinstance(inputs[0], (list, tuple)) else inputs[0]
        self._dtype = latent.dtype
        self._waiting = set()
        if not self._dtype.is_floating_point or self._layers[0].down.weight.dtype == self._dtype:
            return
        self._waiting = {*range(len(self._parts))}
        self._begin(0)

    def _begin(self, number: int, *call) -> None:
        """Cast a part, unless this forward has cast it."""
        if number not in self._waiting:
            return
        self._waiting.remove(number)
        groups = _groups(self._parts[number])
        if not groups:
            return
        downs = [layer.down.weight for group in groups for layer in group.layers]
        ups = [layer.up.weight for group in groups for layer in group.layers]
        # With gradients even where none are taken: a block may be recomputed after such a forward.
        with torch.enable_grad():
            copies = iter(_Cast.apply(self._dtype, [len(group.layers) for group in groups], *downs, *ups))
        joined = [next(copies) for _ in groups]
        for group, down in zip(groups, joined, strict=True):
            group.copies = down, [next(copies) for _ in group.layers]


def _groups(layers: Iterable[LowRankLayer]) -> list[SharedInput]:
    return list(dict.fromkeys(layer.group for layer in layers))


def cast_by_block(trees: Iterable[nn.Module], blocks_of: Callable[[nn.Module], Iterable[nn.Module]]) -> list:
    """Split the `StepWeights` of trees by their blocks, see there. Return the handles of the hooks."""
    hooks = [(tree, hook) for tree in trees for hook in tree._forward_pre_hooks.values()]
    return [handle for tree, hook in hooks if isinstance(hook, StepWeights) for handle in hook.split(blocks_of(tree))]


class _Cast(torch.autograd.Function):
    """Copies of A and B in another dtype, the A of layers that share an input in one tensor."""

    @staticmethod
    def forward(ctx, dtype, counts, *weights):
        half = len(weights) // 2
        downs, ups = iter(weights[:half]), weights[half:]
        groups = [[next(downs) for _ in range(count)] for count in counts]
        ctx.ranks = [[len(down) for down in group] for group in groups]
        ctx.dtype = weights[0].dtype
        ctx.set_materialize_grads(False)
        joined = []
        for group, ranks in zip(groups, ctx.ranks, strict=True):
            joined.append(group[0].new_empty((sum(ranks), *group[0].shape[1:]), dtype=dtype))
        parts = [part for copy, ranks in zip(joined, ctx.ranks, strict=True) for part in copy.split(ranks)]
        copies = [torch.empty_like(up, dtype=dtype) for up in ups]
        torch._foreach_copy_([*parts, *copies], list(weights))
        return (*joined, *copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        count = len(ctx.ranks)
        pieces = []
        for grad, ranks in zip(grads[:count], ctx.ranks, strict=True):
            pieces += [None] * len(ranks) if grad is None else grad.split(ranks)
        pieces += grads[count:]
        given = [grad for grad in pieces if grad is not None]
        copies = [torch.empty(grad.shape, dtype=ctx.dtype, device=grad.device) for grad in given]
        if copies:
            torch._foreach_copy_(copies, given)
        copies = iter(copies)
        return None, None, *[None if grad is None else next(copies) for grad in pieces]


def low_rank_layers(tree: nn.Module) -> dict[str, LowRankLayer]:
    """Return the adapted layers of a tree by path."""
    return {path: vars(layer)[NAME] for path, layer in tree.named_modules() if NAME in vars(layer)}


@contextmanager
def grouping(trees: Iterable[nn.Module]) -> Iterator[None]:
    """Group the adapted layers that read the same tensor in the forward within the block.

    Run it before every training, also one that is resumed: a product for several layers may round in another way.
    """
    parents = {layer: path.rpartition(".")[0] for tree in trees for path, layer in low_rank_layers(tree).items()}
    calls = _Calls()
    for layer in parents:
        layer.calls = calls
    try:
        yield
    finally:
        for layer in parents:
            layer.calls = None
    times = Counter(layer for row in calls.rows for layer in row)
    for row in calls.rows:
        # Of one module: a block's weights may be on the device only while it runs.
        is_group = len({parents[layer] for layer in row}) == 1 and all(times[layer] == 1 for layer in row)
        if is_group and all(layer.can_share for layer in row):
            SharedInput(row)


class _Calls:
    """Calls of layers in their order, those in a row with the same input together."""

    def __init__(self):
        self.rows: list[list[LowRankLayer]] = []
        self._x: torch.Tensor | None = None

    def append(self, layer: LowRankLayer, x: torch.Tensor) -> None:
        if x is self._x:
            self.rows[-1].append(layer)
        else:
            self.rows.append([layer])
        self._x = x
