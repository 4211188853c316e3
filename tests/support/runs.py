"""Runs that the real server made: graphs for them, what they wrote, and whether all of it can be read."""

import json
import threading

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from . import graphs


def graph_of(server, folder, name, steps, previews=None, **options):
    """A training whose run has a name of its own, which changes nothing of its result.

    Args:
        folder: of the pictures, below input/.
        previews: fields of Graft Preview Options, None for no such node.
        options: fields of Graft Run Options.
    """
    defaults = graphs.defaults_of(server.object_info("GraftRunOptions")["GraftRunOptions"])
    chain = {"50": graphs.options("GraftRunOptions", defaults, name=name, **options)}
    if previews:
        defaults = graphs.defaults_of(server.object_info("GraftPreviewOptions")["GraftPreviewOptions"])
        chain["51"] = graphs.options("GraftPreviewOptions", defaults, "50", **previews)
    return graphs.training(folder, steps, option_nodes=chain, batch_size=1)


def find_run(server, name):
    """The one run folder of a name."""
    (run,) = server.path("output", "graft").glob(f"{name}-*")
    return run


def adapter_of(server, run, step):
    """The tensors of an adapter that a run wrote."""
    return load_file(server.path("output", "loras", run.name, f"step-{step:08d}.safetensors"))


def state_of(run, step):
    """The tensors of a state that a run wrote."""
    return load_file(run / f"state-{step:08d}.safetensors")


def states_of(run):
    """Steps of which there is a state, rising."""
    return sorted(int(path.stem.removeprefix("state-")) for path in run.glob("state-*.safetensors"))


def steps_logged(run):
    """Steps in a run's log, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["event"] == "step"]


def same(a, b):
    """Whether two dicts of tensors are the same bits."""
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def list_unreadable(folder, known=None):
    """What below a folder cannot be read for what its name says it is; files on their way to a name are passed over.

    Args:
        known: {path: what changes with its file}; what is in it is not read again, and what was read is added.
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
    """Reads whatever is new below a folder as long as the block lasts; `unreadable` is what could not be read."""

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
