"""How weights that are kept off a device get there: ahead of their time where the device can, else when asked for."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch

from ..errors import RunError
from ..formats.files import bytes_of

# Numbers of a mapped weight begin at multiples of this, as fast kernels want them.
_ALIGNMENT = 64

# What a device's module must have for copies beside what is computed; MPS and DirectML have none of it.
_STREAMS = ("Stream", "stream", "current_stream")


class WeightTransfer(Protocol):
    """Brings weights to where they are computed with."""

    def start(self, homes: Sequence[torch.Tensor]) -> Any:
        """Lets weights begin to come; what `finish` takes. Let go of instead, they come in vain."""

    def finish(self, load: Any) -> list[torch.Tensor]:
        """The weights, there for whatever is computed from now on."""

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Nothing of these is needed for now."""


def transfer_to(device: torch.device) -> WeightTransfer:
    """The best that a device allows, but a CPU, for which `map_weights` makes one."""
    api = getattr(torch, device.type, None)
    return StreamTransfer(device, api) if all(hasattr(api, name) for name in _STREAMS) else SyncTransfer(device)


class SyncTransfer:
    """Copies when asked for: for devices that do one thing after the other."""

    def __init__(self, device: torch.device):
        self._device = device

    def start(self, homes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Nothing yet."""
        return homes

    def finish(self, load: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of them."""
        return [home.to(self._device) for home in load]

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """The copies are whoever's that has them."""


class StreamTransfer:
    """Copies on a stream of its own while another block is computed.

    Room for a copy is taken on the stream that computes, and the copy waits for that: of what lies there, whatever was
    computed with it before is then done, and it can be given back at once to what is computed next. Room of the side
    stream's own would be held until the copies are over, while the program, which runs ahead of its device, takes more.

    Args:
        device: the target.
        api: the device's own module, such as torch.cuda.
    """

    def __init__(self, device: torch.device, api: ModuleType):
        self._device = device
        self._api = api
        self._side = api.Stream(device)

    def start(self, homes: Sequence[torch.Tensor]) -> _Load:
        """Begins to copy; from memory that is not pinned the program itself may have to wait."""
        there = [torch.empty_like(home, device=self._device) for home in homes]
        self._side.wait_stream(self._api.current_stream(self._device))
        load = _Load(there, self._keep_room)
        with self._api.stream(self._side):
            for copy, home in zip(there, homes, strict=True):
                copy.copy_(home, non_blocking=True)
            load.arrived = self._side.record_event()
        return load

    def finish(self, load: _Load) -> list[torch.Tensor]:
        """Makes what is computed from now on wait for the copies; the program does not."""
        self._api.current_stream(self._device).wait_event(load.arrived)
        return load.take()

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """The copies are whoever's that has them."""

    def _keep_room(self, copy: torch.Tensor) -> None:
        copy.record_stream(self._side)


class _Load:
    """Copies under way."""

    def __init__(self, there: list[torch.Tensor], keep_room: Callable[[torch.Tensor], None]):
        self._there = there
        self._keep_room = keep_room
        self.arrived: Any = None

    def take(self) -> list[torch.Tensor]:
        there, self._there = self._there, []
        return there

    def __del__(self):
        # Nobody waited for them: their room must not be another's while they are still being written.
        for copy in self._there:
            self._keep_room(copy)


class MmapTransfer:
    """Weights in a mapped file, of which the system is told what will be read and what may go."""

    def __init__(self, file: mmap.mmap, numbers: torch.Tensor):
        self._file = file
        self._start = numbers.data_ptr()
        # Windows has no such advice, and takes back pages by itself.
        self._can = hasattr(file, "madvise")

    def start(self, homes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Has the system read them from the disk."""
        if self._can:
            for start, length in self._spans(homes):
                self._file.madvise(mmap.MADV_WILLNEED, start, length)
        return homes

    def finish(self, load: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Themselves."""
        return list(load)

    def leave(self, homes: Sequence[torch.Tensor]) -> None:
        """Takes their pages out of this process; the file has them."""
        if self._can:
            for start, length in self._spans(homes):
                self._file.madvise(mmap.MADV_DONTNEED, start, length)

    def _spans(self, homes: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
        """(start, length) of the pages that hold them, neighbours as one."""
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
    """The weights in one file without a name, mapped: the system may drop it from memory whenever it has to.

    Returns:
        The same numbers there, in shapes and dtypes as before, and their carrier.

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
            # A file of no bytes cannot be mapped.
            file.write(b"\0")
            file.flush()
            # The numbers are only read; torch wants memory that could be written to.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise RunError(
            f"The frozen weights cannot be put into a file in '{folder}' ({error}).", "Free space on that disk."
        ) from error
    numbers = torch.frombuffer(mapped, dtype=torch.uint8)
    found = []
    for start, weight in zip(starts, weights, strict=True):
        found.append(numbers[start : start + weight.nbytes].view(weight.dtype).view(weight.shape))
    return found, MmapTransfer(mapped, numbers)
