"""In-memory cache of tensors within a byte budget: saves file reads at each step, does not grow with the data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BUDGET = 512 * 1024 * 1024


class LRUCache:
    """Values by key; evicts the least recently used ones when their bytes exceed the budget."""

    def __init__(self, budget: int = BUDGET):
        self._budget = budget
        self._bytes = 0
        self._values: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    def get(self, key: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the value of a key; make it if it is not cached. Callers must not change it."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = make()
        self._values[key] = value
        self._bytes += _size(value)
        while self._bytes > self._budget and len(self._values) > 1:
            _, dropped = self._values.popitem(last=False)
            self._bytes -= _size(dropped)
        return value


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
