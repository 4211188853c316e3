"""Tests of the run lock across processes and computers: which process may train a run, and when one takes it over."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from graft_pack.trainers.errors import RunError, RunHeldError
from graft_pack.trainers.formats import json_files
from graft_pack.trainers.recipe.recipe import Recipe
from graft_pack.trainers.runs import history, run_lock
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.run import Run

from tests.support import pack

NAME = "toy-00000001"


@pytest.fixture
def folders(tmp_path):
    return Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "words")))


@pytest.fixture
def run(folders):
    run = Run.named(folders, NAME)
    os.makedirs(run.folder)
    os.makedirs(run.adapters)
    return run


@pytest.fixture
def holder(run):
    """Return start(body), which starts another process that holds the run and then executes the body."""
    started = []

    def start(body="time.sleep(600)"):
        program = f"""
            import os, sys, time
            from tests.support import pack
            pack.hide_root()
            pack.load_pack()
            from graft_pack.trainers.runs.run import Run
            run = Run({run.folder!r}, {run.adapters!r}, {run.embeddings!r})
            with run.held():
                print("held", flush=True)
                {body}
        """
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True, cwd=pack.ROOT
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def record_of(run):
    return json.loads(open(run_lock.lock_path(run.folder), "rb").read())


def write_record(run, seconds_ago=0.0, **other):
    """Write a lock as a process of another computer writes it."""
    record = {**vars(run_lock.Holder.here()), "host": "studio", "system": "another", "process": 7, **other}
    path = run_lock.lock_path(run.folder)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(record, file)
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def test_a_run_is_held_by_one_process_at_a_time(run, holder):
    other = holder()
    held = f"Another training uses the run '{NAME}': process {other.pid} on the computer"
    with pytest.raises(RunHeldError, match=held):
        with run.held():
            pass
    assert run_lock.find_holder(run.folder).process == other.pid


def test_one_process_holds_a_run_once(run):
    with run.held():
        with pytest.raises(RunHeldError), Run(run.folder, run.adapters, run.embeddings).held():
            pass
    with run.held():
        pass
    assert os.listdir(os.path.dirname(run.folder)) == [NAME], "nothing stays of a lock"


def test_a_killed_holder_is_no_obstacle(run, holder):
    other = holder()
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert run_lock.find_holder(run.folder) is None
    with run.held():
        assert record_of(run)["process"] == os.getpid()


def test_a_zombie_holder_is_no_obstacle(run, holder):
    other = holder()
    other.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    with run.held():
        pass


def test_a_child_of_a_killed_holder_is_no_obstacle(run, holder):
    """It inherited the open file, and with it the system's lock."""
    other = holder("pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(600)")
    child = int(other.stdout.readline())
    try:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with run.held():
            assert record_of(run)["process"] == os.getpid()
            run.log({"event": "step", "step": 1})
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_holder_that_stands_still_keeps_its_run(run, holder):
    """A process in a debugger, or one that swaps, is not gone."""
    other = holder()
    other.send_signal(signal.SIGSTOP)
    path = run_lock.lock_path(run.folder)
    os.utime(path, (1, 1))
    with pytest.raises(RunHeldError), run.held():
        pass


def test_another_computers_lock_holds_while_it_gives_signs_of_life(run):
    write_record(run, seconds_ago=run_lock.LIMIT - 20)
    with pytest.raises(RunHeldError, match="process 7 on the computer 'studio'"), run.held():
        pass
    assert run_lock.find_holder(run.folder).host == "studio"


def test_another_computers_lock_without_signs_of_life_is_taken_over(run):
    write_record(run, seconds_ago=run_lock.LIMIT + 20)
    assert run_lock.find_holder(run.folder) is None
    with run.held():
        assert record_of(run)["process"] == os.getpid()


@pytest.mark.parametrize("record", ["", "junk", "[]", '{"host": 3}', '{"host": "x"}', "9" * 10_000])
def test_a_damaged_lock_is_no_obstacle(run, record):
    with open(run_lock.lock_path(run.folder), "w") as file:
        file.write(record)
    with run.held():
        pass


def test_a_process_id_that_was_given_anew_is_no_holder(run, monkeypatch):
    """On a file system without locks, the record alone decides."""
    monkeypatch.setattr(run_lock, "_lock_file", lambda descriptor: None)
    here = vars(run_lock.Holder.here())
    write_record(run, **{**here, "started": "1"})
    with run.held():
        pass
    write_record(run, **here)
    with pytest.raises(RunHeldError), run.held():
        pass


def test_a_lock_that_is_a_link_is_refused(run, tmp_path):
    target = tmp_path / "mine.txt"
    target.write_text("mine")
    os.symlink(target, run_lock.lock_path(run.folder))
    with pytest.raises(RunError, match="link"), run.held():
        pass
    assert target.read_text() == "mine"


def test_a_holder_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.01)
    path = run_lock.lock_path(run.folder)
    with run.held():
        os.utime(path, (1, 1))
        until = time.monotonic() + 60
        while os.stat(path).st_mtime < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert os.stat(path).st_mtime > 2


@pytest.mark.parametrize("act", ["log", "save_samples", "note_halt", "clear"])
def test_who_lost_a_run_writes_nothing_more(run, monkeypatch, act):
    """For example a laptop that slept while another computer took over its run."""
    acts = {
        "log": lambda: run.log({"event": "step", "step": 1}),
        "save_samples": lambda: run.save_samples(1, []),
        "note_halt": lambda: run.note_halt("paused", 1, 2),
        "clear": run.clear,
    }
    with run.held():
        write_record(run)
        monkeypatch.setattr(run._lock, "_beaten", time.time() - 3600)
        with pytest.raises(RunHeldError, match="took over the run"):
            acts[act]()
    assert not [name for _, _, names in os.walk(run.folder) for name in names]
    assert run_lock.find_holder(run.folder).host == "studio", "the other one's lock stays"


def test_half_written_files_are_swept_by_the_holder_alone(run, holder):
    half = os.path.join(run.adapters, ".step-00000001.safetensors.0123abcd.tmp")
    other = holder()
    open(half, "w").close()
    run.write_recipe(recipe(), "1", {})
    assert os.path.exists(half)
    other.kill()
    other.wait()
    with run.held():
        assert not os.path.exists(half)


def recipe(**other):
    from tests.support import models

    return models.recipe("SD1", **other)


def test_a_run_that_is_trained_is_not_deleted(run, holder):
    json_files.write_json(run.recipe_path, {"identity": "1", "recipe": {"steps": 3}})
    other = holder()
    with pytest.raises(RunHeldError, match=str(other.pid)):
        history.delete_run(run)
    assert os.path.exists(run.recipe_path)
    other.kill()
    other.wait()
    history.delete_run(run)
    assert not os.path.exists(run.folder)


def test_a_new_run_steps_aside_from_one_that_is_trained(folders):
    wanted: Recipe = recipe(on_existing="new")
    first = Run.open(folders, wanted, "0" * 64, "toy")
    with first.held():
        second = Run.open(folders, wanted, "0" * 64, "toy")
        assert second.name == f"{first.name}-2"
        os.makedirs(second.folder)
        with second.held():
            assert Run.open(folders, wanted, "0" * 64, "toy").name == f"{first.name}-3"


def test_of_many_that_want_a_run_one_gets_it(run):
    """Threads suffice, because each opens the lock file itself as a process does."""
    got, gate = [], threading.Barrier(8)

    def want():
        other = Run(run.folder, run.adapters, run.embeddings)
        gate.wait()
        for _ in range(20):
            try:
                with other.held():
                    got.append(1)
                    assert len(got) == 1
                    time.sleep(0.001)
                    got.pop()
            except RunHeldError:
                continue

    problems = []
    monitored = threading.excepthook
    threading.excepthook = lambda args: problems.append(args.exc_value)
    try:
        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = monitored
    assert problems == []


def test_pruning_leaves_what_a_training_elsewhere_uses(folders, run):
    began = time.time() - 3600
    write_record(run, since=began)
    assert run_lock.earliest_start(folders.runs) == began
    os.remove(run_lock.lock_path(run.folder))
    assert abs(run_lock.earliest_start(folders.runs) - time.time()) < 60
