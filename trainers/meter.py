"""How many bytes a piece of work holds at once, by counting the storages of its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Meter(TorchDispatchMode):
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
