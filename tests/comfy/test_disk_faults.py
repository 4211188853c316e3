"""Tests of disks that are full, read-only or lose a folder: a clear error, and the last save is intact."""

import contextlib
import ctypes
import json
import os
import resource
import shutil

import pytest

from tests.support import runs
from tests.support.server import ComfyServer, PromptError, link
from tests.toy import world

STEPS = 6
LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY = 1
MS_REMOUNT = 32


def graph_of(server, name, steps=STEPS, **options):
    return runs.graph_of(server, "toy", name, steps, **{"save_every": 1, "keep_last": 2, **options})


def mount(folder, flags=0, options=""):
    """Mount a tmpfs on a folder and return True if it worked."""
    return LIBC.mount(b"none", os.fsencode(folder), b"tmpfs", flags, options.encode()) == 0


@pytest.fixture(scope="module")
def disk(tiny_base, tmp_path_factory):
    """Start a server whose output/ is a separate small disk, if the system lets tests mount one."""
    server = ComfyServer(tmp_path_factory.mktemp("disk"))
    link(tiny_base, server.path("models", "checkpoints", tiny_base.name))
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
    output = server.path("output")
    output.mkdir(parents=True, exist_ok=True)
    server.is_small_disk = mount(output, options="size=64m")
    try:
        with server:
            server.run(graph_of(server, "straight"))
            yield server
    finally:
        LIBC.umount2(os.fsencode(output), 2)


@pytest.fixture
def small_disk(disk):
    """Return the same server, or skip; `test_files_that_are_not_allowed_to_grow` needs no separate disk."""
    if not disk.is_small_disk:
        pytest.skip("no disk can be mounted here")
    return disk


@contextlib.contextmanager
def filled(server, left):
    """Fill the disk up to so many free bytes."""
    filler = server.path("output", "filler")
    filler.write_bytes(b"0" * (shutil.disk_usage(filler.parent).free - left))
    try:
        yield
    finally:
        filler.unlink()


def refused(server, graph):
    with pytest.raises(PromptError) as error:
        server.run(graph)
    assert server.is_idle()
    return str(error.value)


def whole_states(server, name):
    """Return the steps of the saved states; check that each is readable and that no partial file is left."""
    run = runs.find_run(server, name)
    assert runs.list_unreadable(server.path("output")) == []
    assert not [path for path in server.path("output").rglob(".*.tmp") if path.is_file()]
    for step in runs.states_of(run):
        runs.state_of(run, step)
    return runs.states_of(run)


def goes_on(server, name):
    """Check that the same graph, with the fault gone, ends with the bits of an undisturbed run."""
    server.run(graph_of(server, name))
    run, straight = runs.find_run(server, name), runs.find_run(server, "straight")
    assert runs.same(runs.state_of(run, STEPS), runs.state_of(straight, STEPS))
    assert runs.same(runs.adapter_of(server, run, STEPS), runs.adapter_of(server, straight, STEPS))
    assert json.loads((run / "recipe.json").read_text())["recipe"]["steps"] == STEPS


def size_of_a_state(server):
    return max(path.stat().st_size for path in runs.find_run(server, "straight").glob("state-*"))


def test_a_disk_without_room_for_a_save_is_found_out_before_the_first_step(small_disk):
    with filled(small_disk, size_of_a_state(small_disk) // 2):
        told = refused(small_disk, graph_of(small_disk, "small"))
    assert "MB left" in told and "Free space on that disk" in told
    assert not list(small_disk.path("output", "graft").glob("small-*"))
    goes_on(small_disk, "small")


def test_a_disk_that_fills_up(small_disk):
    """A save is cut short; the one before stays intact."""
    small_disk.run(graph_of(small_disk, "full", 2))
    # The adapter fits, and only a part of the state.
    with filled(small_disk, int(1.15 * size_of_a_state(small_disk))):
        told = refused(small_disk, graph_of(small_disk, "full"))
        assert "No space left on device" in told and "Free space" in told
        assert whole_states(small_disk, "full") == [1, 2]
    goes_on(small_disk, "full")


def test_files_that_are_not_allowed_to_grow(disk):
    """A quota is set on the running server."""
    disk.run(graph_of(disk, "quota", 2))
    limits = resource.prlimit(disk.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(disk.process.pid, resource.RLIMIT_FSIZE, (size_of_a_state(disk) // 2, limits[1]))
    try:
        told = refused(disk, graph_of(disk, "quota"))
    finally:
        resource.prlimit(disk.process.pid, resource.RLIMIT_FSIZE, limits)
    assert "File too large" in told and "cannot be written" in told
    assert max(whole_states(disk, "quota")) == 2
    goes_on(disk, "quota")


def test_a_folder_that_cannot_be_written(small_disk):
    small_disk.run(graph_of(small_disk, "closed", 2))
    assert mount(small_disk.path("output"), MS_REMOUNT | MS_RDONLY)
    try:
        told = refused(small_disk, graph_of(small_disk, "closed"))
    finally:
        assert mount(small_disk.path("output"), MS_REMOUNT)
    assert "Read-only file system" in told and "writable" in told
    assert whole_states(small_disk, "closed") == [1, 2]
    goes_on(small_disk, "closed")


@pytest.mark.parametrize("kind", ["run", "adapters"])
def test_a_folder_that_is_removed_while_it_trains(disk, kind):
    """A run without its folder ends with an error; its progress is kept, and the next queue resumes it."""
    name = f"gone-{kind}"
    with disk.listen() as events:
        queued = disk.queue(graph_of(disk, name, save_every=100), client_id=events.client_id)
        events.wait_for("graft.progress", timeout=120, event="step")
        (folder,) = disk.path("output", "graft").glob(f"{name}-*")
        # The first save creates the folder of saves.
        shutil.rmtree(folder if kind == "run" else folder / kind, ignore_errors=kind != "run")
        if kind == "run":
            with pytest.raises(PromptError, match="if it was removed, queue the graph again"):
                disk.wait(queued)
        else:
            disk.wait(queued)
    assert disk.is_idle()
    assert max(whole_states(disk, name)) >= 1
    goes_on(disk, name)
