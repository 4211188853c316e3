"""Tests of the time that the processes of a training get to save."""

from types import SimpleNamespace

import pytest


class Worker:
    """A process that saves for some seconds after it was told to leave."""

    last = None

    def __init__(self, clock, seconds):
        self.clock, self.until = clock, clock.now + seconds

    @property
    def process(self):
        return SimpleNamespace(exitcode=None if self.clock.now < self.until else 0)

    def send(self, message):
        assert message == "leave"


@pytest.mark.parametrize("command, waited", [("PAUSE", 30), (None, 5)])
def test_after_a_pause_processes_may_save_for_longer_than_after_a_cancel(comfy, monkeypatch, command, waited):
    from graft_pack.nodes.host.jobs import launcher
    from graft_pack.nodes.host.server.control import REGISTRY, UserCommand

    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(launcher, "time", SimpleNamespace(monotonic=lambda: clock.now))
    workers = launcher.WorkerGroup.__new__(launcher.WorkerGroup)
    workers._workers = [Worker(clock, 30)]

    def forward(note):
        clock.now += 0.5

    monkeypatch.setattr(workers, "_forward_messages", forward)
    with REGISTRY.register("3") as training:
        if command:
            training.submit(UserCommand[command])
        workers._leave(None)
    assert abs(clock.now - waited) <= 1
