"""Peak memory of a function, in bytes: from its tensors, the device's allocator or the operating system."""

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..lowrank.deferred import Deferred

# Growth up to this many bytes is noise: for example, modules that are imported on first use.
_NOTHING = 64 * 1024 * 1024


class TensorTracker(TorchDispatchMode):
    """Context that counts the bytes of live tensor storages, also during the backward.

    Counts each storage once, from the first operation that touches it until it is freed. It does not see the
    workspace that a library allocates while an operation runs.

    Args:
        held: tensors that exist already; they count even if no operation touches them.
        passed_over: tensors whose storages do not count.
        device: count only storages on devices of this type; None counts all.

    Attributes:
        peak: most bytes of counted storages that were alive at the same time.
    """

    def __init__(
        self,
        held: Iterable[torch.Tensor] = (),
        passed_over: Iterable[torch.Tensor] = (),
        device: torch.device | None = None,
    ):
        super().__init__()
        self.peak = 0
        self._device = device
        self._bytes = 0
        self._live: dict[int, weakref.ref] = {}
        self._passed_over = {tensor.untyped_storage()._cdata for tensor in passed_over}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if Deferred in types:
            # Its operations come first.
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for value in (*args, result):
            # Foreach operations take and return lists of tensors.
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if torch.is_tensor(tensor):
                    self._see(tensor)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        if self._device is not None and tensor.device.type != self._device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._passed_over:
            return
        size = storage.nbytes()
        # torch keeps a storage's Python object as long as the storage, so this is called when the memory is freed.
        self._live[key] = weakref.ref(storage, functools.partial(self._forget, key, size))
        self._bytes += size
        self.peak = max(self.peak, self._bytes)

    def _forget(self, key: int, size: int, _) -> None:
        del self._live[key]
        self._bytes -= size


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the tensors' storages, counting each storage once."""
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


class ProcessMemory:
    """Growth of the process's resident memory since this object was created, in bytes.

    Raises:
        OSError: the system does not report it; only Linux does.
    """

    def __init__(self):
        # Garbage that Python frees during the measurement would hide new allocations of the same size.
        gc.collect()
        self.before = _status("VmRSS")
        self.restart()
        if self.most > _NOTHING:
            raise OSError("this system cannot reset the peak memory")

    def restart(self) -> None:
        """Reset the peak to the present size."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def most(self) -> int:
        """Peak since the last `restart`, minus the size at creation."""
        return _status("VmHWM") - self.before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not report {field}")


class DevicePeakMemory:
    """Peak memory of functions on a device, minus the memory in use when this object was created.

    Reads the statistics of the device's allocator if it has any. On a CPU it takes the larger of two numbers: the
    process's resident memory, which includes workspaces of libraries, and the tensors' storages, because resident
    memory does not grow when the process reuses memory it has freed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        kind = getattr(torch, device.type, None)
        keeps = hasattr(kind, "reset_peak_memory_stats") and hasattr(kind, "max_memory_allocated")
        self._kind = kind if device.type != "cpu" and keeps else None
        self._resident = None
        if self._kind is not None:
            self._before = self._kind.memory_allocated(device)
        elif device.type == "cpu":
            try:
                self._resident = ProcessMemory()
            except OSError:
                return

    def peak_of(
        self,
        work: Callable[[], None],
        held: list[torch.Tensor],
        offloaded: Iterable[torch.Tensor] = (),
        count: bool = True,
    ) -> int:
        """Run `work` and return its peak memory in bytes.

        Args:
            held: tensors that existed when this object was created and belong to the result.
            offloaded: tensors whose storages do not count.
            count: count tensors where the allocator has no statistics, which takes time. Without it the result is 0
                if nothing else can measure.
        """
        if self._kind is not None:
            self._kind.reset_peak_memory_stats(self._device)
            work()
            return self._kind.max_memory_allocated(self._device) - self._before + bytes_of(held)
        if self._resident is not None:
            self._resident.restart()
        with TensorTracker(held, offloaded, self._device) if count else nullcontext() as meter:
            work()
        grown = self._resident.most if self._resident is not None else 0
        by_system = bytes_of(held) + grown if grown > _NOTHING else 0
        return max(by_system, meter.peak if count else 0)
