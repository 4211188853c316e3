"""Device streams that only record their calls, and weights that are invalid between uses."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from graft_pack.trainers.memory.transfer import StreamTransfer
from torch.multiprocessing.reductions import StorageWeakRef

# Bytes of quantized weights that are NaN where their scales are.
_INVALID = {torch.uint8: 255}


class Streams:
    """The stream functions of torch.cuda, on a device that does everything at once.

    Attributes:
        calls: (stream, call) in order; the streams are named "computing" and "side".
    """

    def __init__(self):
        self.calls: list[tuple[str, str]] = []
        self.computing = self._named("computing")

    def Stream(self, device):  # noqa: N802
        """Return the side stream."""
        return self._named("side")

    def current_stream(self, device):
        """Return the computing stream."""
        return self.computing

    @contextmanager
    def stream(self, stream):
        """Run the block on a stream."""
        self.calls.append((stream.name, "begin"))
        yield
        self.calls.append((stream.name, "end"))

    def _named(self, name):
        def note(what):
            self.calls.append((name, what))
            return f"event of {name}"

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: note(f"wait for {other.name}"),
            wait_event=lambda event: note(f"wait for {event}"),
            record_event=lambda: note("record"),
        )


class Far(StreamTransfer):
    """Transfer on the CPU as if to a device; the home tensors hold NaN, so computing with them fails.

    Attributes:
        loads: number of blocks brought to the device.
        peak: most bytes of live copies at once.
    """

    def __init__(self, weights):
        super().__init__(torch.device("cpu"), Streams())
        self.homes = [torch.full_like(weight, _INVALID.get(weight.dtype, float("nan"))) for weight in weights]
        pairs = zip(self.homes, weights, strict=True)
        self._numbers = {home.data_ptr(): weight.detach().clone() for home, weight in pairs}
        self._alive: list[tuple[StorageWeakRef, int]] = []
        self.loads = 0
        self.peak = 0

    def start(self, homes):
        load = super().start([self._numbers[home.data_ptr()] for home in homes])
        self.loads += 1
        self._alive += [(StorageWeakRef(one.untyped_storage()), one.nbytes) for one in load._there]
        self._alive = [row for row in self._alive if not row[0].expired()]
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return load

    def _keep_room(self, copy):
        pass
