"""Tests that kill, cancel, stop, pause or save in the real server at seeded moments: nothing is lost."""

import random
import shutil
import time
import urllib.error

import pytest

from tests.support import runs
from tests.support.server import PromptInterrupted
from tests.toy import world

STEPS = 6
SAVE_EVERY = 2
PREVIEWS = {"prompts": "a large red circle", "every": 3, "steps": 2}
PHASES = ("saving", "caching", "sampling", "steps")


def graph_of(server, name, **options):
    fields = {"save_every": SAVE_EVERY, "keep_last": STEPS, **options}
    return runs.graph_of(server, "toy", name, STEPS, PREVIEWS, **fields)


def add_pictures(server):
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"), dirs_exist_ok=True)


class Moment:
    """A seeded moment of a training.

    Attributes:
        phase: one of PHASES; "saving" is the moment when a temporary file exists, or has just been renamed.
    """

    def __init__(self, number):
        self._random = random.Random(number)
        self.phase = PHASES[number % len(PHASES)]
        self.number = number

    def __repr__(self):
        return f"moment {self.number}, {self.phase}"

    def prepare(self, server):
        """Make sure that the phase will come."""
        if self.phase == "caching":
            shutil.rmtree(server.path("output", "graft", "cache"), ignore_errors=True)

    def await_it(self, server, events):
        """Wait until the moment comes."""
        if self.phase == "caching":
            # A page receives ten messages per second at most, so a number may be skipped; the first step ends the wait.
            wanted = self._random.randint(1, 24)
            while True:
                data = events.wait_for("graft.progress", timeout=120).data
                if data["event"] == "step" or (data["event"] == "cache" and data["done"] >= wanted):
                    break
            time.sleep(self._random.uniform(0, 0.02))
            return
        if self.phase == "sampling":
            self._await_step(events, self._random.choice([3, 6]))
            time.sleep(self._random.uniform(0, 0.2))
            return
        if self.phase == "steps":
            self._await_step(events, self._random.randint(1, STEPS - 1))
            time.sleep(self._random.uniform(0, 0.2))
            return
        self._await_step(events, SAVE_EVERY * self._random.randint(1, STEPS // SAVE_EVERY))
        self._await_file(server, self._random.random() < 0.7, self._random.randint(0, 2))

    def _await_step(self, events, step):
        while events.wait_for("graft.progress", timeout=120, event="step").data["step"] < step:
            pass

    def _await_file(self, server, there, before):
        """Wait until the next file but so many is being written, or has just been written."""
        folder = server.path("output", "graft")
        deadline = time.monotonic() + 0.5
        known = set()
        while time.monotonic() < deadline:
            on_their_way = {*folder.glob("*/.*.tmp"), *folder.glob("*/adapters/.*.tmp")}
            known |= on_their_way
            if len(known) > before and (there or not on_their_way):
                return


@pytest.mark.soak
def test_killed_at_any_moment_and_queued_again(make_server, trials):
    """After kill -9 the run ends with the bits of an uninterrupted run, and no partial file is left."""
    server = make_server()
    add_pictures(server)
    rows = []
    with server:
        server.run(graph_of(server, "straight"))
        straight = runs.find_run(server, "straight")
        for number in range(trials(3, 25)):
            moment = Moment(number)
            moment.prepare(server)
            graph = graph_of(server, f"kill{number}")
            with server.listen() as events:
                server.queue(graph, client_id=events.client_id)
                moment.await_it(server, events)
                server.kill()
            assert runs.list_unreadable(server.path("output")) == [], moment
            kept = [max(runs.states_of(run), default=0) for run in runs.list_runs(server, f"kill{number}")]
            left = len(list(server.path("output").rglob(".*.tmp")))
            server.start()
            resumed = runs.started_at(server, graph)
            assert resumed == max(kept, default=0), moment
            run = runs.find_run(server, f"kill{number}")
            assert runs.same(runs.adapter_of(server, run, STEPS), runs.adapter_of(server, straight, STEPS)), moment
            assert runs.same(runs.state_of(run, STEPS), runs.state_of(straight, STEPS)), moment
            assert runs.steps_logged(run) == list(range(1, STEPS + 1)), moment
            assert runs.list_unreadable(server.path("output")) == [], moment
            assert not list(run.rglob(".*.tmp")), moment
            rows.append((moment, resumed, left))
        entry = server.run(graph_of(server, "straight"))
        assert "returned without training" in entry["outputs"]["3"]["text"][0]
    for moment, resumed, left in rows:
        print(f"{moment}: {left} files half written and not in place, went on from step {resumed}, same bits")


WISHES = ("stop", "pause", "cancel", "save")


@pytest.mark.soak
def test_asked_at_any_moment(server, tiny_base, trials):
    """The command works, all files stay readable, and the same graph queued again ends with the same bits."""
    add_pictures(server)
    count = trials(4, 20)
    server.run(graph_of(server, "asked-straight", save_every=1))
    straight = runs.find_run(server, "asked-straight")
    with runs.Reader(server.path("output")) as reader:
        for number in range(count):
            # Each command meets each phase in turn.
            moment = Moment(number + number // len(PHASES))
            wish = WISHES[number % len(WISHES)]
            what = (moment, wish)
            moment.prepare(server)
            graph = graph_of(server, f"asked{number}")
            interrupted, answered = ask(server, graph, moment, wish)
            found = list(server.path("output", "graft").glob(f"asked{number}-*"))
            states = runs.states_of(found[0]) if found else []
            for step in states:
                assert runs.same(runs.state_of(found[0], step), runs.state_of(straight, step)), what
            last = states[-1] if states else 0
            if wish in ("pause", "cancel"):
                assert interrupted or last == STEPS, what
                assert last >= answered or interrupted, what
            if wish == "stop":
                # Before any step it acts as a cancel.
                assert interrupted == (last == 0), what
                assert interrupted or answered <= last, what
            if wish == "save":
                assert not interrupted and last == STEPS, what
                assert moment.phase == "caching" or set(states) & {answered, answered + 1}, what
            goes_on(server, graph, number, wish, last, straight, what)
    assert reader.unreadable == [] and reader.files > 8 * count
    print(f"{count} of {count}; {reader.files} files were read as soon as they were there")


def ask(server, graph, moment, wish):
    """Send a command; return (True if the prompt ended as interrupted, the step at the time of the command)."""
    with server.listen() as events:
        queued = server.queue(graph, client_id=events.client_id)
        moment.await_it(server, events)
        step = 0
        if wish == "cancel":
            server.interrupt()
        else:
            try:
                step = server.post(f"/graft/nodes/3/{wish}", {})["step"]
            except urllib.error.HTTPError as refusal:
                # Too late: the training is over.
                assert refusal.code == 409
                step = STEPS
        try:
            server.wait(queued)
        except PromptInterrupted:
            return True, step
        return False, step


def goes_on(server, graph, number, wish, last, straight, what):
    """Check the next queue: it returns a stopped run until a resume command, and finishes all other runs."""
    if wish == "stop" and 0 < last < STEPS:
        run = runs.find_run(server, f"asked{number}")
        entry = server.run(graph_of(server, f"asked{number}", keep_last=99))
        assert f"{last} steps returned without training, stopped before {STEPS}" in entry["outputs"]["3"]["text"][0], (
            what
        )
        server.post(f"/graft/runs/{run.name}/resume", {})
    entry = server.run(graph)
    run = runs.find_run(server, f"asked{number}")
    assert runs.same(runs.adapter_of(server, run, STEPS), runs.adapter_of(server, straight, STEPS)), what
    assert runs.same(runs.state_of(run, STEPS), runs.state_of(straight, STEPS)), what
    assert runs.steps_logged(run) == list(range(1, STEPS + 1)), what
    assert server.is_idle()
