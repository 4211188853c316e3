"""Tests that a server needs no more memory, threads or open files after many queues than after the first ones."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.server import PromptInterrupted
from tests.toy import world

STEPS = 3


def held(pid):
    """Return (resident bytes, threads, open files and sockets) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = [int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")]
    return found[0] * 1024, found[1], len(os.listdir(f"/proc/{pid}/fd"))


def cycle(server, number, source):
    """Run one training to its end or cancel it, by a seeded choice; return True if it was cancelled."""
    graph = runs.graph_of(server, "toy", f"cycle{number}", STEPS)
    graph["3"]["inputs"]["seed"] = number
    if source.random() < 0.5:
        server.run(graph)
        return False
    with server.listen() as events:
        queued = server.queue(graph, client_id=events.client_id)
        events.wait_for("graft.progress", timeout=120, event=source.choice(["run", "step"]))
        server.interrupt()
        try:
            server.wait(queued)
        except PromptInterrupted:
            return True
    return False


@pytest.mark.soak
def test_queue_after_queue_takes_no_more(make_server, trials):
    """Resident memory grows less than 2 % after the first tenth; the quick form checks threads and files alone."""
    server = make_server()
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
    source = random.Random(0)
    count = trials(6, 500)
    warm = max(4, count // 10)
    cancelled = 0
    with server:
        for number in range(count):
            cancelled += cycle(server, number, source)
            for old in server.path("output", "graft").glob("cycle*"):
                shutil.rmtree(old)
            if number + 1 == warm:
                before = held(server.process.pid)
        after = held(server.process.pid)
        assert server.is_idle()
    growth = after[0] / before[0] - 1
    memory = f"memory {before[0] / 1e6:.1f} MB {growth:+.2%}, threads {before[1]} -> {after[1]}"
    print(f"{count} cycles, {cancelled} cancelled: {memory}, open files {before[2]} -> {after[2]}")
    assert 0 < cancelled < count
    assert after[1] <= before[1] and after[2] <= before[2]
    assert growth < (0.02 if count > 100 else 0.10)
