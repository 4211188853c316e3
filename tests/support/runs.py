"""Runs that the real server made: graphs for them, their files, and a check that all files are readable."""

import json
import threading

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from . import graphs


def option_nodes(server, **kinds):
    """Return option nodes as they come from the menu, chained in the given order.

    Args:
        kinds: fields to set, by the node's class.
    """
    chain = {}
    before = None
    for number, (kind, fields) in enumerate(kinds.items(), 50):
        defaults = graphs.defaults_of(server.object_info(kind)[kind])
        chain[str(number)] = graphs.options(kind, defaults, before, **fields)
        before = str(number)
    return chain


def graph_of(server, folder, name, steps, previews=None, more=None, **options):
    """Return a graph whose run has its own name, which does not change its result.

    Args:
        folder: folder of the pictures, below input/.
        previews: fields of Graft Preview Options, None for no such node.
        more: fields of further option nodes, by their class.
        options: fields of Graft Run Options.
    """
    kinds = {"GraftRunOptions": {"name": name, **options}}
    if previews:
        kinds["GraftPreviewOptions"] = previews
    kinds |= more or {}
    return graphs.training(folder, steps, option_nodes=option_nodes(server, **kinds), batch_size=1)


def list_runs(server, name):
    """Return the run folders of a name, or of a dataset of that name."""
    return sorted(server.path("output", "graft").glob(f"{name}-*"))


def find_run(server, name):
    """Return the only run folder of a name."""
    (run,) = list_runs(server, name)
    return run


def adapter_of(server, run, step):
    """Return the tensors of an adapter that a run wrote."""
    return load_file(run / "adapters" / f"step-{step:08d}.safetensors")


def state_of(run, step):
    """Return the tensors of a state that a run wrote."""
    return load_file(run / f"state-{step:08d}.safetensors")


def states_of(run):
    """Return the steps with a saved state, rising."""
    return sorted(int(path.stem.removeprefix("state-")) for path in run.glob("state-*.safetensors"))


def steps_logged(run):
    """Return the steps in a run's log, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "step"]


def started_at(server, graph):
    """Queue a graph to its end; return the step that its training started from."""
    with server.listen() as events:
        queued = server.queue(graph, client_id=events.client_id)
        step = events.wait_for("graft.progress", timeout=120, event="run").data["step"]
        server.wait(queued)
    return step


def same(a, b):
    """Report whether two dicts of tensors are bit-identical."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def list_unreadable(folder, known=None):
    """Return the files below a folder that cannot be read as their name says; unfinished temporary files are skipped.

    Args:
        known: {path: marker that changes with its file}. Known files are not read again; files read now are added.
    """
    found = []
    known = {} if known is None else known
    for path in sorted(folder.rglob("*")):
        if path.name.startswith("."):
            continue
        try:
            status = path.stat()
            mark = (status.st_ino, status.st_size, status.st_mtime_ns)
            if known.get(path) == mark:
                continue
            _read(path)
            known[path] = mark
        except FileNotFoundError:
            # Pruned or replaced since the folder was listed.
            continue
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {error!r}")
    return found


def _read(path):
    if path.suffix == ".safetensors":
        load_file(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            json.loads(line)
    elif path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()


class Reader:
    """Reader of every new file below a folder while the block lasts; `unreadable` holds the files it failed on."""

    def __init__(self, folder):
        self.unreadable = []
        self.files = 0
        self._folder = folder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join(60)

    def _run(self):
        known = {}
        while not self._done.wait(0.05):
            self.unreadable += list_unreadable(self._folder, known)
            self.files = len(known)
