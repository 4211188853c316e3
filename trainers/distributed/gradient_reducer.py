"""Sum of the gradients over the processes in buckets, which are sent while the backward still runs.

Buckets as in PyTorch's DistributedDataParallel (Li et al. 2020), whose own reducer needs exactly one backward a step.
Here a step has any number of backwards, and only the last one sends. All processes send the same buckets in the same
order, whatever arrives first, so that sums do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from ..errors import OutOfMemory, in_one_line, is_out_of_memory
from ..process_group import GradientReducer

if TYPE_CHECKING:
    from torch import nn

    from .accelerate_group import AccelerateGroup

# Bytes of the first bucket, which starts the network early, and of the largest: those of DistributedDataParallel.
_FIRST_BYTES = 1024 * 1024
_BYTES = 25 * 1024 * 1024


@dataclass(eq=False)
class _Bucket:
    """Parameters with one dtype and one device, whose gradients are summed in one message.

    Attributes:
        arrived: those with a gradient from the last backward.
        flat: the message, then the sum; None before it is sent.
        work: torch's handle of the message.
    """

    parameters: list[nn.Parameter]
    arrived: set[nn.Parameter] = field(default_factory=set)
    flat: torch.Tensor | None = None
    work: Any = None


class BucketReducer(GradientReducer):
    """Gradient buckets of several processes.

    A repetition of the step after an out-of-memory error leaves the buckets that were sent as they are: it computes the
    same gradients.

    Attributes:
        buckets: number of buckets of the last step.
        overlapped: number of them that were sent before its last backward ended.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: AccelerateGroup, half: bool):
        """Watch the gradients of parameters, which require gradients.

        Args:
            parameters: in the order in which the forward uses them.
            half: send float32 gradients as bfloat16. N processes then sum them to N 2^-8 of their absolute sum.
        """
        self.buckets = self.overlapped = 0
        self._parameters = list(reversed(parameters))
        self._group = group
        self._half = half
        self._layout: list[_Bucket] = []
        self._bucket_of: dict[nn.Parameter, _Bucket] = {}
        self._present: set[nn.Parameter] = set()
        self._is_open = False
        self._is_last = False
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._arrive) for parameter in parameters]

    def begin(self) -> None:
        """Agree with the other processes to start a step. Until `finish`, each of them waits for all buckets.

        Raises:
            PeerLostError: another process has left.
        """
        self._group.all_reduce()
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._layout = [_Bucket(parameters) for parameters in buckets(trained)]
        self._bucket_of = {parameter: bucket for bucket in self._layout for parameter in bucket.parameters}
        self._present = set()
        self.buckets, self.overlapped = len(self._layout), 0
        self._is_open = True

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Send each bucket in the block as soon as its gradients are complete and the buckets before it are sent."""
        if not self._is_open:
            yield
            return
        for bucket in self._layout:
            bucket.arrived.clear()
        self._is_last = True
        try:
            yield
        finally:
            self._is_last = False
        self.overlapped = sum(bucket.work is not None for bucket in self._layout)

    def _arrive(self, parameter: nn.Parameter) -> None:
        """Note that the backward has completed a parameter's gradient (hook)."""
        if not self._is_last:
            return
        bucket = self._bucket_of[parameter]
        assert parameter not in bucket.arrived, "a parameter had its gradient twice in one backward"
        bucket.arrived.add(parameter)
        if bucket.work is not None:
            # A repetition of the step: the sum of this gradient is on its way.
            parameter.grad = None
            return
        for ready in self._layout:
            if ready.work is None:
                if len(ready.arrived) < len(ready.parameters):
                    return
                self._send(ready)

    def _send(self, bucket: _Bucket) -> None:
        """Send a bucket, with zeros for the gradients that this process does not have."""
        present = [parameter for parameter in bucket.parameters if parameter.grad is not None]
        flat = self._message(bucket)
        with self._group.connected():
            bucket.work = distributed.all_reduce(flat, group=self._group.bucket_group, async_op=True)
        bucket.flat = flat
        self._present.update(present)
        for parameter in present:
            parameter.grad = None

    def _message(self, bucket: _Bucket) -> torch.Tensor:
        first, *others = bucket.parameters
        grads = [_gradient(parameter).reshape(-1) for parameter in bucket.parameters]
        flat = torch.cat(grads) if others else grads[0]
        return flat.to(torch.bfloat16) if self._half and first.dtype is torch.float32 else flat

    def finish(self) -> None:
        """Send what the backward has not sent, and replace each gradient by its sum over the processes.

        If no process has a gradient, it stays None.

        Raises:
            OutOfMemory: this process has no memory for the buckets.
            PeerLostError: another process has failed in the step, or has left.
        """
        try:
            for bucket in self._layout:
                if bucket.work is None:
                    self._send(bucket)
            self._wait()
            self._is_open = False
            self._keep(self._agree())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise _no_room(in_one_line(error)) from error

    def _wait(self) -> None:
        with self._group.connected():
            for bucket in self._layout:
                if bucket.work is not None:
                    bucket.work.wait()

    def _agree(self) -> set[nn.Parameter]:
        """Return the parameters that have a gradient in any process, after all have finished the step."""
        parameters = list(self._bucket_of)
        if not self._group.all_reduce(len(parameters) - len(self._present)):
            return self._present
        counts = self._group.sum_numbers(*(float(parameter in self._present) for parameter in parameters))
        return {parameter for parameter, count in zip(parameters, counts, strict=True) if count}

    def _keep(self, present: set[nn.Parameter]) -> None:
        """Make views of the sums the gradients of the parameters that have one."""
        for bucket in self._layout:
            flat = bucket.flat.to(bucket.parameters[0].dtype)
            bucket.flat = None
            parts = flat.split([parameter.numel() for parameter in bucket.parameters])
            for parameter, part in zip(bucket.parameters, parts, strict=True):
                if parameter in present:
                    view = part.view(parameter.shape)
                    # Fused optimizers need gradients with the strides of their parameters.
                    strided = parameter.is_contiguous()
                    parameter.grad = view if strided else torch.empty_like(parameter).copy_(view)

    def release(self) -> None:
        """Send zeros for all buckets that this process has not sent, before it leaves: the others wait for them."""
        if not self._is_open:
            return
        self._is_open = False
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._layout:
            if bucket.work is None:
                self._send(bucket)
        self._wait()

    def close(self) -> None:
        """Remove the hooks. `release` still works."""
        for hook in self._hooks:
            hook.remove()


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in order, in buckets of limited size, each with one dtype and one device.

    No bucket has more than half of what is left: the last one, which nothing hides, is small.
    """
    left = sum(parameter.nbytes for parameter in parameters)
    held: list[nn.Parameter] = []
    size, limit = 0, _FIRST_BYTES
    for parameter in parameters:
        other = held and (parameter.dtype, parameter.device) != (held[0].dtype, held[0].device)
        if held and (other or size + parameter.nbytes > limit):
            yield held
            left -= size
            held, size, limit = [], 0, min(_BYTES, max(_FIRST_BYTES, left // 2))
        held.append(parameter)
        size += parameter.nbytes
    if held:
        yield held


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _no_room(reason: str) -> OutOfMemory:
    return OutOfMemory(
        f"Memory ran out before the processes summed their gradients ({reason}).",
        "Lower the resolution of the dataset, or set checkpointing to on (Graft Memory Options). Graft has kept the "
        "saves: queue the graph again to resume.",
        "dataset",
    )
