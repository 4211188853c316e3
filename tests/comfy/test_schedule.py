"""Tests of the hours in which trainings do not run, with a clock of the test's own."""

import os
import time
from datetime import datetime

import pytest

from tests.comfy.test_prompt_queue import TRAINING, Queue

ZONES = ["UTC", "America/New_York", "Australia/Lord_Howe"]


@pytest.fixture(params=ZONES)
def zone(request):
    """Set the time zone of the process."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


@pytest.fixture
def clock(comfy, monkeypatch, zone):
    """Return a function that sets the clock to a local time and returns it in seconds since the epoch."""
    from graft_pack.nodes.host.server import schedule

    def set_clock(text):
        seconds = datetime.fromisoformat(text).timestamp()
        monkeypatch.setattr(schedule, "now", lambda: seconds)
        return seconds

    return set_clock


@pytest.fixture
def queue(comfy, monkeypatch):
    return Queue(monkeypatch)


def hours(pause=None, not_before=0.0):
    from graft_pack.nodes.host.server import schedule

    return schedule.Schedule(not_before, pause and tuple(schedule.parse_clock(text) for text in pause))


DAY, NIGHT = ("08:00", "18:30"), ("22:15", "06:00")
STARTS = [
    (None, "2026-06-01T12:00", "2026-06-01T12:00"),
    (DAY, "2026-06-01T07:59", "2026-06-01T07:59"),
    (DAY, "2026-06-01T08:00", "2026-06-01T18:30"),
    (DAY, "2026-06-01T18:30", "2026-06-01T18:30"),
    (NIGHT, "2026-06-01T22:15", "2026-06-02T06:00"),
    (NIGHT, "2026-06-01T05:59", "2026-06-01T06:00"),
    (NIGHT, "2026-06-01T06:00", "2026-06-01T06:00"),
    (("09:00", "09:00"), "2026-06-01T09:00", "2026-06-01T09:00"),
    # Clocks change in this night in New York: it lasts an hour less.
    (NIGHT, "2026-03-07T23:00", "2026-03-08T06:00"),
    (NIGHT, "2026-12-31T23:59", "2027-01-01T06:00"),
]
# Zone, pause, now, and the seconds until the training starts.
CHANGES = [
    # 02:00 is 03:00 at once: there is no 02:30.
    ("America/New_York", ("22:00", "02:30"), "2026-03-08T01:00", 3600),
    ("America/New_York", ("02:15", "02:45"), "2026-03-08T01:59", 0),
    # 02:00 is 01:00 again: the first 01:30 ends the pause.
    ("America/New_York", ("22:00", "01:30"), "2026-11-01T00:30", 3600),
    # 02:00 is 02:30 at once.
    ("Australia/Lord_Howe", ("22:00", "02:15"), "2026-10-04T01:00", 3600),
]


@pytest.mark.parametrize("pause, at, start", STARTS)
def test_a_training_starts_when_its_pause_ends(clock, pause, at, start):
    clock(at)
    training = hours(pause)
    assert datetime.fromtimestamp(training.next_start()).isoformat(timespec="minutes") == start
    assert training.is_due == (at == start)
    assert training.shown_start == ("" if at == start else start[-5:])


@pytest.mark.parametrize("zone, pause, at, seconds", CHANGES, indirect=["zone"])
def test_a_pause_ends_when_the_clock_is_past_its_end_in_nights_of_changes(clock, pause, at, seconds):
    before = clock(at)
    assert hours(pause).next_start() - before == seconds


def test_not_before_holds_together_with_the_pause(clock):
    from graft_pack.nodes.host.server.schedule import next_time, parse_clock

    morning = clock("2026-06-01T07:00")
    start = next_time(parse_clock("09:00"), morning)
    assert hours(None, start).shown_start == "09:00" and hours(DAY, start).shown_start == "18:30"
    assert next_time(parse_clock("07:00"), morning) == morning + 24 * 3600
    clock("2026-06-01T20:00")
    assert hours(DAY, start).is_due


@pytest.mark.parametrize("text", ["", "24:00", "7:00", "07:60", "07:00 ", "ab:cd"])
def test_other_texts_are_no_time(comfy, text):
    from graft_pack.nodes.host.server.schedule import parse_clock

    with pytest.raises(ValueError):
        parse_clock(text)


@pytest.mark.parametrize("zone", ["UTC"], indirect=True)
def test_a_held_prompt_waits_in_its_place_and_others_run(queue, clock, zone):
    clock("2026-06-01T12:00")
    queue.put(0, "held", TRAINING)
    queue.put(1, "x")
    assert queue.returning.schedule("held", hours(DAY))
    assert queue.queue.get(timeout=0)[0][1] == "x"
    assert [item[1] for item in queue.queue.queue] == ["held"] and queue.queue.get(timeout=0) is None
    queue.put(2, "y")
    clock("2026-06-01T18:30")
    assert [queue.queue.get(timeout=0)[0][1] for _ in range(2)] == ["held", "y"]
    assert not queue.returning.schedule("unknown", hours(DAY))


@pytest.mark.parametrize("zone", ["UTC"], indirect=True)
@pytest.mark.parametrize("change", ["hours", "clear", "delete"])
def test_a_held_prompt_starts_early_or_is_removed_as_others(queue, clock, zone, change):
    clock("2026-06-01T12:00")
    queue.put(0, "held", TRAINING)
    queue.returning.schedule("held", hours(DAY))
    if change == "hours":
        queue.returning.schedule("held", hours())
        assert queue.queue.get(timeout=0)[0][1] == "held"
    elif change == "clear":
        queue.queue.wipe_queue()
    else:
        assert queue.returning.remove("held")
    clock("2026-06-01T20:00")
    assert queue.queue.get(timeout=0) is None


@pytest.mark.parametrize("zone", ["UTC"], indirect=True)
def test_a_training_does_not_give_way_to_a_held_one(queue, clock, zone, monkeypatch):
    clock("2026-06-01T12:00")
    monkeypatch.setattr(queue.module, "RETURNING", queue.returning)
    queue.put(0, "held", TRAINING)
    assert queue.module.must_give_way("to everything")
    queue.returning.schedule("held", hours(DAY))
    assert not queue.module.must_give_way("to everything")
