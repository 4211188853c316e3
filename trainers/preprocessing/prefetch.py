"""The next batch's latents and texts, fetched while the device works on this one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .items import Sample

Batch = list[tuple[int, int]]


class Prefetcher:
    """Showings of batches, one batch of them fetched ahead by a thread.

    What is shown follows from an item's place and turn alone, so it is the same to the bit whoever fetches it, and
    when. No more than one batch is held, since many accumulated ones may be large.

    Args:
        samples: gives the samples of a batch.
        threaded: fetch ahead in a thread; without it each batch is fetched when asked for.
    """

    def __init__(self, samples: Callable[[Batch], list[Sample]], threaded: bool = True):
        self._samples = samples
        self._pool = ThreadPoolExecutor(1, "graft-ahead") if threaded else None
        self._coming: list[Batch] = []
        self._held: tuple[Batch, Future] | None = None

    def set_upcoming(self, batches: list[Batch]) -> None:
        """The batches that will be asked for from now on, in their order."""
        self._coming = batches

    def get(self, batch: Batch) -> list[Sample]:
        """The showings of a batch, while those of the next one begin to be fetched; asked again, they are fetched anew.

        Raises:
            Whatever fetching this batch raises, also where it was fetched ahead.
        """
        held, self._held = self._held, None
        if held is not None and held[0] is batch:
            found = held[1].result()
        else:
            found = self._samples(batch)
        if self._pool is not None:
            places = [place for place, one in enumerate(self._coming) if one is batch]
            rest = self._coming[places[0] + 1 :] if places else []
            if rest:
                self._held = rest[0], self._pool.submit(self._samples, rest[0])
        return found

    def close(self) -> None:
        """Waits for what is being fetched, and lets go of it."""
        self._held = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
