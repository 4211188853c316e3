"""Batches ahead of their step, fetched in a thread; and a cache of tensors within a memory budget."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Generic, TypeVar

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


Batch = list[tuple[int, int]]
Rows = TypeVar("Rows")
Fetched = TypeVar("Fetched")


class Prefetcher(Generic[Rows, Fetched]):
    """Prefetcher of the samples of batches and their noise; its thread fetches one batch ahead.

    What `fetch` returns depends on its argument alone. It is therefore the same to the bit, regardless of the thread
    and the time of the fetch. No more than one batch is held, since many accumulated batches may be large.

    Args:
        threaded: prefetch in a thread; if False, `get` fetches each batch.
    """

    def __init__(self, fetch: Callable[[Rows], Fetched], threaded: bool = True):
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(1, "graft-ahead") if threaded else None
        self._coming: list[Rows] = []
        self._held: tuple[Rows, Future[Fetched]] | None = None

    def set_upcoming(self, batches: list[Rows]) -> None:
        """Set the batches that `get` will return from now on, in their order."""
        self._coming = batches

    def get(self, batch: Rows) -> Fetched:
        """Return what was fetched for a batch, and start to fetch the next one. A repeated call fetches it anew.

        Raises:
            Exception: any error of fetching this batch, also if it was prefetched.
        """
        held, self._held = self._held, None
        fetched = held[1].result() if held is not None and held[0] is batch else self._fetch(batch)
        if self._pool is not None:
            places = [place for place, upcoming in enumerate(self._coming) if upcoming is batch]
            rest = self._coming[places[0] + 1 :] if places else []
            if rest:
                self._held = rest[0], self._pool.submit(self._fetch, rest[0])
        return fetched

    def close(self) -> None:
        """Wait for a fetch in progress, and discard its result."""
        self._held = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
