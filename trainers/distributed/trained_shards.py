"""Shards of trained weights: each process optimizes its rows of every weight. Only files need whole tensors.

FSDP2 gathers a block's weights while it computes and gives each process its rows of the gradient's sum. Optimizer,
average and rounding see these rows as ordinary parameters, so the optimizer must treat each number alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ModelError, SettingsError
from ..process_group import GradientReducer

if TYPE_CHECKING:
    from torch import nn

    from .fsdp import ShardedWeights

# (module, name) of a weight.
Place = tuple["nn.Module", str]


class WholeTensor:
    """A tensor in shards, which the main process can read in `Group.main_process_only`.

    Attributes:
        shape, dtype: those of the whole tensor.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, gather: Callable[[], torch.Tensor]):
        self.shape, self.dtype = shape, dtype
        self.detach = gather

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    def element_size(self) -> int:
        """Return the bytes of an element."""
        return self.dtype.itemsize


class TrainedShards:
    """This process's shards of the trained weights.

    Attributes:
        parameters: the shards by name, views of FSDP2's own: change them in place. A shard may be empty.
        shapes: shapes of the whole weights.
    """

    def __init__(self, weights: ShardedWeights, places: Mapping[str, Sequence[Place]]):
        """Take the shards of the weights in these places. Raise ModelError if FSDP2 has not sharded one."""
        from torch.distributed.tensor import DTensor

        self._weights = weights
        self._sharded = {}
        for name, held in places.items():
            weight, *others = [owner._parameters[leaf] for owner, leaf in held]
            if not isinstance(weight, DTensor) or any(other is not weight for other in others):
                raise ModelError(
                    f"Graft cannot shard the weight {name}, which several blocks share.",
                    "Set shard in Graft Memory Options to off.",
                    "options",
                )
            self._sharded[name] = weight
        self.shapes = {name: weight.shape for name, weight in self._sharded.items()}
        with torch.no_grad():
            self.parameters = {
                name: torch.nn.Parameter(weight.to_local().detach()) for name, weight in self._sharded.items()
            }
        self._published = list(self.parameters.items())

    def step_in_backward(self, step: Callable[[nn.Parameter], None]) -> list[Any]:
        """Call `step` with each shard as soon as a backward has its gradient. Return torch's hooks."""

        def hand_over(name: str, weight: torch.Tensor) -> None:
            shard = self.parameters[name]
            shard.grad = weight.grad.to_local()
            weight.grad = None
            # FSDP2 sends zeros for a weight that no process uses; without a gradient it stays as it is.
            if name in self._weights.used or not shard.numel() or shard.grad.any():
                step(shard)

        return [
            weight.register_post_accumulate_grad_hook(partial(hand_over, name))
            for name, weight in self._sharded.items()
        ]

    def reducer(self) -> GradientReducer:
        """Return the reducer that hands the sums, which FSDP2 has computed, to `parameters`."""
        return _ShardReducer(self._weights, self._sharded, self.parameters)

    def whole(self) -> dict[str, WholeTensor]:
        """Return the trained weights."""
        return {name: self._whole(number) for number, name in enumerate(self.parameters)}

    def publish(self, shards: Sequence[tuple[str, torch.Tensor]]) -> list[WholeTensor]:
        """Return other shards (weight's name, tensor) whole, in place of those before. All processes call it."""
        total = self._weights.group.all_reduce(len(shards))
        assert total == len(shards) * self._weights.shares, "the processes have trained different weights"
        start = len(self.parameters)
        self._published[start:] = shards
        return [self._whole(number) for number in range(start, len(self._published))]

    def withdraw(self, kept: int) -> None:
        """Stop publishing all but the first `kept` tensors of the last `publish`, so that their memory can be freed."""
        del self._published[len(self.parameters) + kept :]

    def _whole(self, number: int) -> WholeTensor:
        name, shard = self._published[number]
        return WholeTensor(self.shapes[name], shard.dtype, partial(self._weights.gather_published, number))

    def gather(self, number: int) -> torch.Tensor:
        """Return a published tensor whole, on the CPU. All processes take part."""
        name, shard = self._published[number]
        first, *others = self.shapes[name]
        rows = self._rows(first)
        padded = shard.new_zeros(rows, *others)
        padded[: len(shard)] = shard.detach()
        whole = padded.new_empty(rows * self._weights.shares, *others)
        self._weights.gather_bytes(whole, padded)
        return whole[:first].to("cpu")

    def _rows(self, count: int) -> int:
        return -(-count // self._weights.shares)

    def is_shard(self, name: str, value: Any) -> bool:
        """Report whether an optimizer's value has an element per number of a shard."""
        return torch.is_tensor(value) and value.dim() > 0 and value.shape == self.parameters[name].shape

    def local(self, name: str, value: Any) -> Any:
        """Return this process's rows of a value, on its device; the value itself unless it has the weight's shape."""
        if not torch.is_tensor(value) or value.shape != self.shapes[name]:
            return value
        first = self._rows(len(value)) * self._weights.share
        return value[first : first + self._rows(len(value))].to(self.parameters[name].device, copy=True)

    @contextmanager
    def replaced(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Let the tree compute with other whole weights in the block. Raise SettingsError if it cannot hold them."""
        rows = [(shard.detach(), values[name], name) for name, shard in self.parameters.items()]
        if any(torch.promote_types(shard.dtype, value.dtype) != shard.dtype for shard, value, _ in rows):
            raise SettingsError(
                "shard is on, but the frozen base, which the loss compares with, is more precise than bf16.",
                "Set weight_dtype in Graft Adapter Options to fp32.",
                "weight_dtype",
            )
        before = [shard.clone() for shard, *_ in rows]
        try:
            for shard, value, name in rows:
                shard.copy_(self.local(name, value))
            yield
        finally:
            for (shard, *_), own in zip(rows, before, strict=True):
                shard.copy_(own)


class _ShardReducer(GradientReducer):
    """Gradients that FSDP2 has summed in every backward of a step."""

    def __init__(self, weights: ShardedWeights, sharded: dict[str, torch.Tensor], shards: dict[str, nn.Parameter]):
        self._weights, self._sharded, self._shards = weights, sharded, shards

    def begin(self) -> None:
        """Agree with the other processes to start a step. Raise PeerLostError if one has left."""
        self._weights.group.all_reduce()
        self._weights.used.clear()
        for weight in self._sharded.values():
            weight.grad = None

    def finish(self) -> None:
        """Hand each gradient that is left to its shard. It stays None if no process has used the weight."""
        group, used = self._weights.group, self._weights.used
        counts = [float(name in used) for name in self._sharded]
        if group.all_reduce(counts.count(0.0)):
            counts = group.sum_numbers(*counts)
        for (name, weight), count in zip(self._sharded.items(), counts, strict=True):
            self._shards[name].grad = weight.grad.to_local() if count and weight.grad is not None else None
            weight.grad = None
