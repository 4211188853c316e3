"""Transfers between host and device: offloaded weights, uploads of a step's inputs, and numbers that the host reads."""

from __future__ import annotations

import functools
import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch.overrides import TorchFunctionMode

from ..errors import RunError
from ..formats.files import bytes_of

# Alignment of a mapped weight in bytes; fast kernels need it.
_ALIGNMENT = 64

# Functions that a device's torch module needs for copies during computation; MPS and DirectML lack them.
_STREAMS = ("Stream", "stream", "current_stream")


@functools.cache
def copies_in_queue(device: torch.device) -> bool:
    """Report whether a device copies from and to pinned memory in its queue, while the program queues more work."""
    api = getattr(torch, device.type, None)
    if device.type == "cpu" or not all(hasattr(api, name) for name in (*_STREAMS, "Event")):
        return False
    try:
        torch.empty(1, device="cpu").pin_memory()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor for `upload` in pinned memory; the tensor itself if it is pinned or cannot or need not be."""
    if tensor.device.type != "cpu" or tensor.requires_grad or not copies_in_queue(device):
        return tensor
    try:
        # torch pins with the tensor's strides, and cannot write to an expanded tensor.
        return tensor.contiguous().pin_memory()
    except RuntimeError:
        # The system limits pinned memory. A copy from other memory only takes longer.
        return tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor.to(device)`. Copy from pinned memory: otherwise the host waits until the device is idle."""
    if tensor.device == device or tensor.requires_grad:
        return tensor.to(device)
    source = pinned(tensor, device)
    return source.to(device, non_blocking=copies_in_queue(device) and source.is_pinned())


class PinnedConstants(TorchFunctionMode):
    """Mode in which `torch.tensor` and indexing by lists copy to a device from pinned memory, for code of others."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # A copy to the device would be no leaf of the graph.
        is_constant = func is torch.tensor and not kwargs.get("requires_grad")
        if is_constant and kwargs.get("device") is not None:
            return upload(func(*args, **{**kwargs, "device": "cpu"}), torch.device(kwargs["device"]))
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            tensor, index = args
            places = (upload(_index(place), tensor.device) if isinstance(place, list) else place for place in index)
            return func(tensor, tuple(places))
        return func(*args, **kwargs)


def _index(places: list) -> torch.Tensor:
    """Return a list of indices as a tensor. An empty one has no elements to tell its dtype."""
    return torch.tensor(places) if places else torch.tensor(places, dtype=torch.long)


class HostCopy:
    """Copy of a device's numbers for the host. Where the device can, it copies them in its queue.

    Args:
        values: 1-D, on the device.
        later: whether `read` may come later; see `copies_in_queue`.
    """

    def __init__(self, values: torch.Tensor, later: bool):
        self._values = values
        self._done: Any = None
        if not later:
            return
        host = pinned(torch.empty(values.shape, dtype=values.dtype, device="cpu"), values.device)
        self._values = host.copy_(values, non_blocking=host.is_pinned())
        if host.is_pinned():
            api = getattr(torch, values.device.type)
            self._done = api.Event()
            # Another device may be the current one.
            self._done.record(api.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers, after the device has copied them."""
        if self._done is not None:
            self._done.synchronize()
        return self._values.tolist()


class WeightTransfer(Protocol):
    """Interface of a transfer, which copies weights to the device that computes with them."""

    def start(self, homes: Sequence[torch.Tensor]) -> Any:
        """Start the transfer of weights and return a handle for `finish`. A dropped handle wastes the transfer."""

    def finish(self, load: Any) -> list[torch.Tensor]:
        """Return the weights, ready for all computation that is queued from now on."""

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Note that these weights are not needed for now."""


def transfer_to(device: torch.device) -> WeightTransfer:
    """Return the fastest transfer that a device supports. For a CPU, call `map_weights` instead."""
    api = getattr(torch, device.type, None)
    return StreamTransfer(device, api) if all(hasattr(api, name) for name in _STREAMS) else SyncTransfer(device)


class SyncTransfer:
    """Transfer that copies on demand, for devices without streams."""

    def __init__(self, device: torch.device):
        self._device = device

    def start(self, homes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the weights unchanged; `finish` copies them."""
        return homes

    def finish(self, load: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the weights to the device."""
        return [home.to(self._device) for home in load]

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Do nothing: the caller owns the copies."""


class StreamTransfer:
    """Transfer that copies on a side stream while the main stream computes another block.

    It allocates each copy on the compute stream and makes the side stream wait for that stream. So earlier computation
    with the same memory is finished before the copy overwrites it, and later computation can reuse the memory at once.
    If the side stream owned the memory, the allocator would hold it until the copies are done; meanwhile the program,
    which runs ahead of the device, would allocate more.

    Args:
        device: the target device.
        api: the device's torch module, such as torch.cuda.
    """

    def __init__(self, device: torch.device, api: ModuleType):
        self._device = device
        self._api = api
        self._side = api.Stream(device)

    def start(self, homes: Sequence[torch.Tensor]) -> _Load:
        """Start the copies on the side stream. If the source memory is not pinned, this call may block."""
        there = [torch.empty_like(home, device=self._device) for home in homes]
        self._side.wait_stream(self._api.current_stream(self._device))
        load = _Load(there, self._keep_room)
        with self._api.stream(self._side):
            for copy, home in zip(there, homes, strict=True):
                copy.copy_(home, non_blocking=True)
            load.arrived = self._side.record_event()
        return load

    def finish(self, load: _Load) -> list[torch.Tensor]:
        """Make the compute stream wait for the copies; the program itself does not wait."""
        self._api.current_stream(self._device).wait_event(load.arrived)
        return load.take()

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Do nothing: the caller owns the copies."""

    def _keep_room(self, copy: torch.Tensor) -> None:
        copy.record_stream(self._side)


class _Load:
    """Copies in transfer."""

    def __init__(self, there: list[torch.Tensor], keep_room: Callable[[torch.Tensor], None]):
        self._there = there
        self._keep_room = keep_room
        self.arrived: Any = None

    def take(self) -> list[torch.Tensor]:
        there, self._there = self._there, []
        return there

    def __del__(self):
        # Nobody waited for these copies. The allocator must not reuse their memory while they are being written.
        for copy in self._there:
            self._keep_room(copy)


class MmapTransfer:
    """Transfer for weights in a memory-mapped file: advises the system which pages to read and which to drop."""

    def __init__(self, file: mmap.mmap, numbers: torch.Tensor):
        self._file = file
        self._start = numbers.data_ptr()
        # Windows has no `madvise`. It reclaims pages by itself.
        self._can = hasattr(file, "madvise")

    def start(self, homes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Ask the system to read the weights from disk."""
        if self._can:
            for start, length in self._spans(homes):
                self._file.madvise(mmap.MADV_WILLNEED, start, length)
        return homes

    def finish(self, load: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the mapped weights themselves."""
        return list(load)

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Drop the weights' pages from this process; the file still holds them."""
        if self._can:
            for start, length in self._spans(homes):
                self._file.madvise(mmap.MADV_DONTNEED, start, length)

    def _spans(self, homes: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
        """Yield (start, length) in bytes of the pages that hold the weights, with adjacent ranges merged."""
        page = mmap.PAGESIZE
        begun = ended = 0
        for start, stop in sorted((home.data_ptr() - self._start, home.nbytes) for home in homes):
            start, stop = start // page * page, start + stop
            if start > ended:
                if ended > begun:
                    yield begun, ended - begun
                begun = start
            ended = max(ended, -(-stop // page) * page)
        ended = min(ended, len(self._file))
        if ended > begun:
            yield begun, ended - begun


def map_weights(weights: Sequence[torch.Tensor], folder: str) -> tuple[list[torch.Tensor], MmapTransfer]:
    """Write weights to one unnamed temporary file and map it. The system can drop its pages when memory is short.

    Returns:
        Mapped tensors with the same values, shapes and dtypes, and their transfer.

    Raises:
        RunError: the file cannot be written.
    """
    starts = []
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for weight in weights:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                starts.append(file.tell())
                file.write(bytes_of(weight))
            # An empty file cannot be mapped.
            file.write(b"\0")
            file.flush()
            # Code only reads the weights, but torch requires writable memory.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise RunError(
            f"Graft cannot write the frozen weights to a file in '{folder}' ({error}).", "Free space on that disk."
        ) from error
    numbers = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = []
    for start, weight in zip(starts, weights, strict=True):
        tensors.append(numbers[start : start + weight.nbytes].view(weight.dtype).view(weight.shape))
    return tensors, MmapTransfer(mapped, numbers)
