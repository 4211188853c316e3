"""Contestants that take turns in one process, so that a burst of load on the machine hits all of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

# Seconds. A turn repeats a shorter step for so long.
_TURN = 0.1


class Turn:
    """Work in its own thread that pauses between its steps.

    Args:
        work: called with a function, which it must call without arguments after every step.
        threads: number of torch threads in that thread.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None], threads: int):
        self._go = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work, threads), daemon=True)
        self._thread.start()

    def next(self) -> None:
        """Let the work make one step. Raise the work's own error, or RuntimeError when no step is left."""
        self._go.release()
        self._stands.acquire()
        if self._error is not None:
            raise self._error

    def _run(self, work, threads):
        import torch

        torch.set_num_threads(threads)
        self._go.acquire()
        try:
            work(self._stand)
            self._error = RuntimeError("it has no step left")
        except BaseException as error:
            self._error = error
        self._stands.release()

    def _stand(self):
        self._stands.release()
        self._go.acquire()


def repeat(call: Callable[[], None]) -> Callable[[Callable[[], None]], None]:
    """Return work whose step is one call."""

    def work(stand):
        while True:
            call()
            stand()

    return work


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Return (seconds, seconds of this process's processor time) of a call.

    A short call is repeated, and the mean returned. The first one does not count then: it finds the weights of others
    in the processor's caches, which no step of a training does.
    """
    found = [_timed(call)]
    if found[0][1] < _TURN:
        end = time.perf_counter() + _TURN
        found = [_timed(call)]
        while time.perf_counter() < end:
            found.append(_timed(call))
    wall, own = zip(*found, strict=True)
    return statistics.fmean(wall), statistics.fmean(own)


def _timed(call: Callable[[], None]) -> tuple[float, float]:
    wall, own = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - own


def rounds(turns: dict[str, Turn], count: int, warm_up: int) -> dict[str, list[tuple[float, float]]]:
    """Return each contestant's step times, round by round, without the warm-up."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
    for number in range(warm_up + count):
        for name, turn in turns.items():
            took = timed(turn.next)
            if number >= warm_up:
                found[name].append(took)
    return found
