"""Hours in which trainings do not run, by prompt, in the time zone of the machine that runs ComfyUI."""

import re
import time
from dataclasses import dataclass
from datetime import datetime, timedelta

# Replaced in tests.
now = time.time

_DAY = 24 * 60
_CLOCK = re.compile(r"([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class Schedule:
    """Hours in which a training does not run. Times of day are minutes since midnight.

    Attributes:
        not_before: start, seconds since the epoch; 0 for none.
        pause: (from, to), each day; to may lie after midnight. None for none.
    """

    not_before: float = 0.0
    pause: tuple[int, int] | None = None

    def next_start(self) -> float:
        """Return the next time at which the training may run, seconds since the epoch: the current time if it may."""
        start = max(now(), self.not_before)
        # Minute by minute, since the local clock skips or repeats an hour in two nights of the year.
        while self._is_paused(start):
            start = (start // 60 + 1) * 60
        return start

    def _is_paused(self, seconds: float) -> bool:
        first, last = self.pause or (0, 0)
        clock = datetime.fromtimestamp(seconds)
        # The minutes since the pause began, of those that it lasts.
        return (clock.hour * 60 + clock.minute - first) % _DAY < (last - first) % _DAY

    @property
    def shown_start(self) -> str:
        """The time at which the training may run, as the local clock shows it; empty if it may run now."""
        return "" if self.is_due else show_clock(self.next_start())

    @property
    def is_due(self) -> bool:
        """Report whether the training may run now."""
        return self.next_start() <= now()


def next_time(minute: int, after: float) -> float:
    """Return the first time after `after` at which the local clock shows a minute of the day, both since the epoch."""
    day = datetime.fromtimestamp(after).replace(hour=minute // 60, minute=minute % 60, second=0, microsecond=0)
    if day.timestamp() <= after:
        day += timedelta(days=1)
    return day.timestamp()


def parse_clock(text: str) -> int:
    """Return the minute of the day of a text such as "22:30". Raise ValueError for any other text."""
    parts = _CLOCK.fullmatch(text)
    if parts is None:
        raise ValueError(text)
    return int(parts[1]) * 60 + int(parts[2])


def show_clock(seconds: float) -> str:
    """Return a time in seconds since the epoch as the local clock shows it."""
    return datetime.fromtimestamp(seconds).strftime("%H:%M")


def show_minute(minute: int) -> str:
    """Return a minute of the day as a clock shows it."""
    return f"{minute // 60:02d}:{minute % 60:02d}"
