"""Tests of malformed inputs on the real server: it survives, writes nothing elsewhere, and names each cause."""

import collections
import re
import shutil
import time

import numpy as np
import pytest

from tests.support import malformed, runs
from tests.toy import world

# Places that ComfyUI itself writes to: its log, its database, its previews.
_HOSTS_OWN = ("temp", "user", "server.log", "output", "custom_nodes")
# Trials per class in the quick form; fewer for classes that train.
QUICK = 3
TRAINING = ("legal caption", "legal folder", "state", "cache")


def listed(*folders):
    """Return {path: (size, time)} of everything in some folders, without following links."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            status = path.lstat()
            found[str(path)] = (status.st_size, status.st_mtime_ns if path.is_file() else 0)
    return found


def outside(server, canary):
    """Return everything that must not change: files beside output/ and beside the server's folder."""
    folders = [path for path in server.base.iterdir() if path.name not in _HOSTS_OWN and path.is_dir()]
    top = {path.name for path in server.base.iterdir()} | {path.name for path in server.base.parent.iterdir()}
    return {**listed(*folders, canary), "top": top}


def set_up(server):
    """Create pictures, a valid adapter, a valid embedding, links that lead out, and a folder outside everything."""
    canary = server.base.parent / "canary"
    (canary / "pictures").mkdir(parents=True)
    (canary / "recipe.json").write_text('{"recipe": {"steps": 1}}')
    shutil.copy(world.CONCEPT_FOLDER / "toy" / "00.png", canary / "pictures")
    toy = server.path("input", "toy")
    toy.mkdir(parents=True)
    for number in range(2):
        for ending in ("png", "txt"):
            shutil.copy(world.CONCEPT_FOLDER / "toy" / f"{number:02}.{ending}", toy)
    server.path("input", "way-out").symlink_to(canary)
    for folder in ("loras", "embeddings"):
        server.path("models", folder).mkdir(parents=True, exist_ok=True)
        server.path("output", folder).mkdir(parents=True, exist_ok=True)
        server.path("output", folder, "way-out").symlink_to(canary)
    server.path("models", "loras", "sound.safetensors").write_bytes(malformed.safetensors(malformed.lora()))
    word = malformed.safetensors({"emb_params": np.ones((1, 768))})
    server.path("models", "embeddings", "sound.safetensors").write_bytes(word)
    return canary


def chosen(trials, quick):
    """Return a few trials of each class, or all."""
    if quick is None:
        return trials
    counts = collections.Counter()
    found = []
    for trial in trials:
        counts[trial.kind] += 1
        if counts[trial.kind] <= (1 if trial.kind in TRAINING else quick):
            found.append(trial)
    return found


@pytest.mark.soak
def test_hostile_and_broken_inputs(make_server, trials):
    server = make_server()
    canary = set_up(server)
    wrong = []
    times = []
    rows = collections.Counter()
    with server:
        known = malformed.known_nodes(server)
        server.run(malformed.training_of(server, 2))
        assert runs.states_of(runs.find_run(server, "kept")) == [1, 2]
        corpus = malformed.every(known, "kept")
        assert len(corpus) >= 300
        process = server.process.pid
        for trial in chosen(corpus, trials(QUICK, None)):
            trial.prepare(server)
            before = outside(server, canary)
            started = time.monotonic()
            try:
                taken, said = trial.act(server)
            except Exception as error:
                # An unexpected error is reported together with the others.
                taken, said = None, repr(error)
            what = f"{trial.kind}, {trial.name}"
            assert server.is_running() and server.process.pid == process, what
            assert server.is_idle(), what
            if outside(server, canary) != before:
                wrong.append(f"{what}: files elsewhere: {set(outside(server, canary).items()) ^ set(before.items())}")
            if taken != trial.taken or not re.search(trial.says, said, re.DOTALL):
                wrong.append(f"{what}: {'taken' if taken else 'refused'}, '{trial.says}' not in: {said[:600]}")
            rows[trial.kind] += 1
            times.append((time.monotonic() - started, what))
            if time.monotonic() - started > 20:
                wrong.append(f"{what}: it took {time.monotonic() - started:.0f} s")
        assert server.get("/system_stats")["system"]
    print("\n".join(f"{spent:.1f} s {what}" for spent, what in sorted(times)[-15:]))
    print("; ".join(f"{kind} {count}" for kind, count in sorted(rows.items())), "; all", rows.total())
    assert not wrong, f"{len(wrong)} of {rows.total()}:\n" + "\n".join(wrong)
