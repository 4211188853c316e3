"""Counters of a task's cost instead of timings: operations, bytes of live tensors, device reads."""

from __future__ import annotations

import torch
from graft_pack.trainers.lowrank.deferred import Deferred
from graft_pack.trainers.memory.tracking import TensorTracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_READ = torch.ops.aten._local_scalar_dense.default


class Counter(TensorTracker):
    """Counter of operations and reads within its block, the backward included.

    Attributes:
        operations: torch operations, without views.
        readings: value reads; each makes a device finish all queued work.
    """

    def __init__(self, held=()):
        super().__init__(held)
        self.operations = 0
        self.readings = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += not func.is_view
        self.readings += func is _READ
        return super().__torch_dispatch__(func, types, args, kwargs)


class FlopCounter(FlopCounterMode):
    """torch's counter of floating-point operations. It also counts those that compute deferred tensors."""

    def __init__(self):
        super().__init__(display=False)
        self._shower = _Shower()

    def __enter__(self):
        super().__enter__()
        self._shower.__enter__()
        return self

    def __exit__(self, *error):
        self._shower.__exit__(*error)
        return super().__exit__(*error)


class _Shower(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return NotImplemented if Deferred in types else func(*args, **(kwargs or {}))
