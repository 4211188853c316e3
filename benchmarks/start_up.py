"""Waiting time of a user: for the first step, for a finished run, for a pause, and for the encoding before a run.

    python -m benchmarks.start_up [--repeats N] [--docs]

Measured from queueing to the answer in a real server on the small base. Measured from the start of the node in its own
process on the 45 M-parameter layout of SD1, with a text encoder and a VAE as large as SD1's. *Just started* is a server
or process that has trained nothing yet, so its imports count. The numbers are medians of that process's processor time,
which equals wall time on an idle machine.

Encoding one item at a time and encoding several together are measured in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

from . import report
from .interleaved import Turn, repeat, rounds
from .subprocess_run import OPTION, subprocess_run

MIDDLING = "SD1 middling"
# Seconds.
BARS = {"pack": 0.3, "first step": 2.0, "finished": 1.0}
NAMES = {
    "pack": "the pack, of ComfyUI's start",
    "first step": "first step of a new run, all encoded",
    "first step, just started": "the same, just started",
    "finished": "a finished run queued again",
    "finished, just started": "the same, just started",
    "pause": "a pause for another prompt, to its start",
    "return": "the return after it, to the next step",
    "return, kept": "the same, kept in memory",
}
_RATE = 1e-3
# Picture sides, and how many at once: the count that a CPU encodes together, and for comparison one that it does not.
_SIDES = {64: 4, 256: 2}
_CAPTION = "picture {}, of many colours, square, seen from the front"
_CAPTIONS = 8
_WARM_UP = 1


def measure(repeats: int) -> str:
    """Measure everything and return two tables."""
    server = _server(repeats)
    engine = _engine(repeats)
    return f"{_waiting(server, engine)}\n\n{_encoding(_apart(kind='encoding', repeats=repeats))}"


def _waiting(server: dict[str, list[float]], engine: dict[str, list[float]]) -> str:
    lines = ["| seconds of processor time | small base, in a server | SD1 middling | bar |", "|---|---|---|---|"]
    for name, words in NAMES.items():
        bar = BARS.get(name.partition(",")[0])
        cells = [f"{statistics.median(found[name]):.2f}" if name in found else "-" for found in (server, engine)]
        missed = any(name in found and bar and statistics.median(found[name]) > bar for found in (server, engine))
        lines.append(f"| {words} | {' | '.join(cells)} | {f'{bar:g}' if bar else '-'}{', missed' if missed else ''} |")
    return "\n".join(lines)


def _encoding(found: dict[str, dict[str, list]]) -> str:
    lines = ["| encoded, a second of one processor | one at a time | together | faster |", "|---|---|---|---|"]
    for name, row in found.items():
        alone, together = (row["count"] / report.median(row[way]) for way in ("alone", "together"))
        pairs = zip(row["alone"], row["together"], strict=True)
        gain = statistics.median(one[1] / other[1] for one, other in pairs)
        lines.append(f"| {name} | {alone:.1f} | {together:.1f} | x {gain:.2f} |")
    return "\n".join(lines)


_apart = functools.partial(subprocess_run, "benchmarks.start_up")


# In a real server


def _server(repeats: int) -> dict[str, list[float]]:
    from tests.support import graphs
    from tests.support.base import get_tiny_base
    from tests.support.server import ComfyServer, link
    from tests.toy import world

    found: dict[str, list[float]] = {name: [] for name in NAMES}
    base = get_tiny_base()
    rates = iter(_RATE * (1 + number / 1000) for number in range(10**6))

    def new():
        return graphs.training("toy", 2, learning_rate=next(rates))

    with tempfile.TemporaryDirectory() as folder:
        server = ComfyServer(folder, env={"OMP_NUM_THREADS": "1"})
        link(base, server.path("models", "checkpoints", base.name))
        shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "toy"))
        with server:
            done = new()
            server.run(done)
            for _ in range(repeats):
                server.restart()
                found["finished, just started"].append(_until(server, done, "done"))
                server.restart()
                found["pack"].append(_pack_seconds(server))
                found["first step, just started"].append(_until(server, new(), "step"))
                found["first step"].append(_until(server, new(), "step"))
                # One more node, so that the host's own cache does not answer.
                other = {**done, "9": graphs.node("GraftInspectAdapter", adapter=["3", 2])}
                other["3"] = graphs.node("GraftTrainLoRA", **{**done["3"]["inputs"], "steps": 2})
                other["2"] = graphs.node("GraftLoadDataset", **{**done["2"]["inputs"], "flip": False})
                found["finished"].append(_until(server, other, "done"))
                for minutes in (0, 10):
                    server.post("/settings/Graft.GiveWayKeep", minutes)
                    pause, back = _give_way(server, next(rates))
                    found["pause"].append(pause)
                    found["return, kept" if minutes else "return"].append(back)
    return found


def _give_way(server, rate: float) -> tuple[float, float]:
    """Return the server's processor seconds from queueing a prompt to its start, and from its end to the next step."""
    from tests.support import graphs, runs

    server.post("/settings/Graft.GiveWayAfter", 0)
    chain = runs.option_nodes(server, GraftRunOptions={"give_way": "to everything"})
    graph = graphs.training("toy", 3000, learning_rate=rate, option_nodes=chain)
    # Another seed for each, so that ComfyUI's cache does not answer. It keeps the loader of the training.
    other = {"1": graph["1"]}
    graphs.sampling(other, "a red circle", ["1", 0], ["1", 1], "other", seed=round(rate * 1e6), steps=1)
    with server.listen() as events:
        server.queue(graph, client_id=events.client_id)
        events.wait_for("graft.progress", timeout=300, event="step")
        queued = _used(server.process.pid)
        prompt = server.queue(other, client_id=events.client_id)
        events.wait_for("execution_start", timeout=300, prompt_id=prompt)
        began = _used(server.process.pid)
        events.wait_for("execution_success", timeout=300, prompt_id=prompt)
        ended = _used(server.process.pid)
        events.wait_for("graft.progress", timeout=300, event="step")
        returned = _used(server.process.pid)
    server.interrupt()
    server.poll(server.is_idle, 60, "the queue")
    return began - queued, returned - ended


def _until(server, prompt: dict, event: str) -> float:
    """Return the server's processor seconds from queueing until the trainer sends an event."""
    with server.listen() as events:
        started = _used(server.process.pid)
        queued = server.queue(prompt, client_id=events.client_id)
        events.wait_for("graft.progress", timeout=300, event=event)
        seconds = _used(server.process.pid) - started
        server.wait(queued)
    return seconds


def _used(process: int) -> float:
    """Return a process's processor seconds so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _pack_seconds(server) -> float:
    return float(re.findall(r"([\d.]+) seconds: \S*custom_nodes/graft\b", server.read_log())[-1])


# The engine on a model of middling size


def _engine(repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        _apart(kind="engine", folder=folder, number=0)
        for number in range(1, repeats + 1):
            for name, seconds in _apart(kind="engine", folder=folder, number=number).items():
                found.setdefault(name, []).append(seconds)
        for _ in range(repeats):
            for kind in ("finished", "pause"):
                for name, seconds in _apart(kind=kind, folder=folder).items():
                    found.setdefault(name, []).append(seconds)
    return found


def _first_steps(folder: str, number: int) -> dict[str, float]:
    """Time the first step of two runs, one after the other; number 0 fills the caches and is finished."""
    with _graph() as parts:
        first = _training(folder, parts, _RATE * (1 + number), "step")
        second = _training(folder, parts, _RATE * (1.5 + number), "step")
    return {"first step, just started": first, "first step": second}


def _finished(folder: str) -> dict[str, float]:
    with _graph() as parts:
        first = _training(folder, parts, _RATE, None)
        second = _training(folder, parts, _RATE, None)
    return {"finished, just started": first, "finished": second}


def _pause(folder: str) -> dict[str, float]:
    with _graph() as parts:
        rate = _RATE * (1 + random.random())
        paused = _training(folder, parts, rate, "step", pauses=True)
        found = {"pause": paused, "return": _training(folder, parts, rate, "step")}
        rate *= 1.5
        _training(folder, parts, rate, "step", pauses=True, keeps=True)
        return {**found, "return, kept": _training(folder, parts, rate, "step", keeps=True)}


@contextlib.contextmanager
def _graph() -> Iterator[tuple]:
    """Yield model, text encoder and VAE as they arrive at the node."""
    import torch

    from tests.support import models

    torch.set_num_threads(1)
    with torch.inference_mode():
        parts = models.patcher(MIDDLING), _clip(512, 8), models.kl_vae(4)
    yield parts


def _clip(width: int, heads: int):
    """Return a CLIP with CLIP-L's layers and a given width."""
    import comfy.sd
    import torch

    from tests.support import models

    config = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    options = {"dtype": torch.float32, "clip_l_model_config": {**config, "num_hidden_layers": 12}}
    made = comfy.sd.CLIP(models.SIZES["SD1"].build().clip_target({}), model_options=options)
    models.randomize(made.cond_stage_model, 0)
    return made


def _training(
    folder: str, parts: tuple, rate: float, event: str | None, pauses: bool = False, keeps: bool = False
) -> float:
    """Return the seconds until a training of two steps sends an event, or until it ends if the event is None.

    With `pauses`, the event interrupts it; the seconds are those from there to its end. With `keeps`, its tree stays.
    """
    from graft_pack.nodes.host import settings
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.kept_tree import TreeKeeper
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.nodes.host.model.vae import ComfyCodec
    from graft_pack.trainers.data.scan import scan_folder
    from graft_pack.trainers.engine.session import run_recipe
    from graft_pack.trainers.protocols import Host
    from graft_pack.trainers.runs.folders import Folders

    from tests.support import models
    from tests.toy import world

    told: dict[str, float] = {}
    started = time.process_time()

    def hear(name: str, payload: dict) -> None:
        told.setdefault(name, time.process_time() - started)
        if pauses and name == event:
            raise KeyboardInterrupt

    model, clip, vae = parts
    text = ComfyText(clip)
    denoiser = ComfyDenoiser(model, text, vae)
    state = SimpleNamespace(gives_way=pauses, is_held=False, has_fallback=False)
    settings.give_way_keep = lambda: 600.0 * keeps
    host = Host(denoiser, text, ComfyCodec(vae), hear, keeper=TreeKeeper(denoiser, state))
    dataset = scan_folder(str(world.CONCEPT_FOLDER / "toy"), "", 64, 1)
    fields = {"steps": 2, "learning_rate": rate, "batch_size": 1, "resolution": 64}
    places = Folders(*(str(Path(folder) / name) for name in ("runs", "cache", "loras", "embeddings")))
    try:
        run_recipe(models.recipe("SD1", **fields), dataset, host, places)
    except KeyboardInterrupt:
        return time.process_time() - started - told[event]
    return told[event] if event else time.process_time() - started


# Encoding


def _encoded(repeats: int) -> dict[str, dict]:
    """Time rounds of encoding the same inputs one at a time and together; return them by kind of input."""
    import torch
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.nodes.host.model.vae import ComfyCodec

    from tests.support import models

    torch.set_num_threads(1)
    text = ComfyText(_clip(768, 12))
    captions = [_CAPTION.format(number) for number in range(_CAPTIONS)]
    found = {
        "captions, CLIP-L": _turns(
            len(captions),
            repeats,
            alone=lambda: [text.encode(caption) for caption in captions],
            together=lambda: text.encode_all(captions),
        )
    }
    codec = ComfyCodec(models.kl_vae(4))
    for side, count in _SIDES.items():
        pixels = torch.rand(count, side, side, 3, generator=torch.Generator().manual_seed(0))
        name = f"pictures of {side} x {side}, SD1's VAE{'' if _is_taken(codec, side) else ' (not done on a CPU)'}"
        found[name] = _turns(
            count,
            repeats,
            alone=functools.partial(_one_by_one, codec, pixels),
            together=functools.partial(codec.encode, pixels),
        )
    return found


def _is_taken(codec, side: int) -> bool:
    return codec.pixels_at_once >= 2 * side * side


def _one_by_one(codec, pixels) -> None:
    for one in pixels.split(1):
        codec.encode(one)


def _turns(count: int, repeats: int, **ways: Callable[[], object]) -> dict:
    turns = {name: Turn(repeat(way), 1) for name, way in ways.items()}
    return {"count": count, **rounds(turns, repeats, _WARM_UP)}


_KINDS = {"engine": _first_steps, "finished": _finished, "pause": _pause, "encoding": _encoded}


def _one(kind: str, **more) -> dict:
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    return _KINDS[kind](**more)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--docs", action="store_true", help="puts the tables into docs/benchmarks.md")
    parser.add_argument(OPTION, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_one(**json.loads(args.one))))
        return
    text = measure(args.repeats)
    print(text)
    if args.docs:
        report.put_into_docs(text)


if __name__ == "__main__":
    main()
