"""How many bytes a piece of work holds at once: by its tensors, by the device's own account, by the system's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# Bytes that a process may grow by for many reasons, such as what is imported when it is first needed.
_NOTHING = 64 * 1024 * 1024


class TensorTracker(TorchDispatchMode):
    """Counts within its block, the backward included: each storage once, from when it is first seen until it is gone.

    What libraries take for themselves while an operation runs is not seen.

    Args:
        held: tensors that are there before, whether or not anything is done with them.
        passed_over: tensors whose storages are no part of it.
        device: whose storages alone are counted, None for all.

    Attributes:
        peak: most bytes of all storages that were seen so far and lived at once.
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
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._passed_over = {tensor.untyped_storage()._cdata for tensor in passed_over}
        for tensor in held:
            self._see(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for value in (*args, found):
            # Operations on many tensors at once take and give lists of them.
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if torch.is_tensor(tensor):
                    self._see(tensor)
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        if self._device is not None and tensor.device.type != self._device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._live.get(key)
        if (known is not None and not known[0].expired()) or key in self._passed_over:
            return
        self._bytes += storage.nbytes() - (known[1] if known else 0)
        self._live[key] = StorageWeakRef(storage), storage.nbytes()
        if self._bytes > self.peak:
            # What is gone is looked for only where it may matter.
            self._live = {key: row for key, row in self._live.items() if not row[0].expired()}
            self._bytes = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bytes)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages below tensors, each once."""
    return sum({one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}.values())


class ProcessMemory:
    """The process's resident memory since this was made, in bytes.

    Raises:
        OSError: the system does not tell, as only Linux does.
    """

    def __init__(self):
        # What nobody refers to any more may go at any moment, and would hide as much of what is taken.
        gc.collect()
        self.before = _status("VmRSS")
        self.restart()
        if self.most > _NOTHING:
            raise OSError("this system does not forget the largest so far")

    def restart(self) -> None:
        """Forgets the largest so far."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def most(self) -> int:
        """The largest since, over what there was at first."""
        return _status("VmHWM") - self.before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {field}")


class DevicePeakMemory:
    """What pieces of work take of a device at the most, over what there was when this was made.

    By the device's allocator where that keeps account. On a CPU by the system, which sees what libraries take for
    themselves, and by the tensors, which the system does not see where a process uses again what it has freed.
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
        """Bytes at the most while work is done.

        Args:
            held: tensors that were there when this was made, which are part of it.
            away: tensors whose storages are no part of it.
            count: whether the tensors are counted, which takes time; 0 where there is no other way then.
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
