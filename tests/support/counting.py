"""What a piece of work takes, counted and not timed: operations, bytes of the tensors that live at once, readings."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

_READ = torch.ops.aten._local_scalar_dense.default


class Counter(TorchDispatchMode):
    """Counts within its block, the backward included.

    Args:
        held: tensors that are there before, whether or not anything is done with them.

    Attributes:
        operations: of torch, but for views.
        readings: of numbers, for each of which a device would have to finish all that it was given.
        peak: most bytes of all storages that were seen so far and lived at once.
    """

    def __init__(self, held=()):
        super().__init__()
        self.operations = 0
        self.readings = 0
        self.peak = 0
        self._bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        for tensor in held:
            self._see(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        self.readings += func is _READ
        for value in (*args, *(found if isinstance(found, (list, tuple)) else (found,))):
            if torch.is_tensor(value):
                self._see(value.untyped_storage())
        return found

    def _see(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._bytes += storage.nbytes() - (known[1] if known else 0)
        self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self._bytes > self.peak:
            # What is gone is looked for only where it may matter.
            self._live = {key: row for key, row in self._live.items() if not row[0].expired()}
            self._bytes = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._bytes)
