"""Cost of large datasets: the scan of their folder, and the memory of training on them.

    python -m benchmarks.datasets [--pictures N]

The benchmark writes small pictures, each with a caption, into a temporary folder. It scans the folder as ComfyUI does
when a node is opened and when a graph is queued. Then the engine trains for two epochs on some of the pictures and on
all of them, each in its own process. Captions are encoded at SD1's size, so that the cache between steps reaches its
limit; the network and the VAE are tiny. Files come out of the system's page cache because they were just written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

PICTURES = 10_000
SIDE = 64
BATCH = 50
# Seconds for opening the node and checking for changes in the folder, after the first scan.
LOOK_BAR = 2.0
# KB per picture that training may keep: path, caption, digest, and the location of its cache entries.
EACH_BAR = 8.0
# Text conditioning of SD1: 77 tokens, width 768.
TEXT = (1, 77, 768)


def draw_pictures(folder: Path, count: int) -> None:
    """Write distinct pictures of colored blocks, each with a caption."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rng = np.random.RandomState(0)
    for number in range(count):
        blocks = Image.fromarray(rng.randint(0, 255, (8, 8, 3)).astype(np.uint8))
        path = folder / f"{number:05}.jpg"
        blocks.resize((SIDE, SIDE), Image.NEAREST).save(path, quality=90)
        path.with_suffix(".txt").write_text(f"picture {number}, of many colours, square, seen from the front")


def share_pictures(folder: Path, target: Path, count: int) -> None:
    """Link the first pictures and their captions into another folder, without copying them."""
    target.mkdir()
    for path in sorted(folder.iterdir())[: 2 * count]:
        os.link(path, target / path.name)


def timed(call):
    """Return (result of a call, seconds)."""
    started = time.perf_counter()
    given = call()
    return given, time.perf_counter() - started


def look(folder: Path, base: Path) -> dict[str, float]:
    """Return the seconds of each thing that ComfyUI does with the node, in this process."""
    import folder_paths
    from graft_pack.nodes.dataset import GraftLoadDataset
    from graft_pack.trainers.curation.page import PageOptions, read_page
    from graft_pack.trainers.data.scan import scan_folder

    folder_paths.set_input_directory(str(folder.parent))
    index = str(base / "index")

    def scan():
        return scan_folder(str(folder), "sks", 0, 1, None, None, index)

    found = {}
    first, found["first look"] = timed(scan)
    schema, found["opening the node"] = timed(GraftLoadDataset.define_schema)
    assert folder.name in schema.inputs[0].options
    valid, found["checking its inputs"] = timed(lambda: GraftLoadDataset.validate_inputs(folder=folder.name))
    assert valid is True
    _, found["has it changed"] = timed(lambda: GraftLoadDataset.fingerprint_inputs(folder.name))
    second, found["second look"] = timed(scan)
    read = lambda: read_page(str(folder), PageOptions("sks"), None, index)  # noqa: E731
    page, found["opening its page"] = timed(read)
    _, found["opening it again"] = timed(read)
    assert len(page.pictures) == len(first.examples)
    assert second.fingerprint() == first.fingerprint()
    return found


def counting_host(report):
    """Return the diffusers host with texts of SD1's size and counted calls of its VAE and text encoder."""
    import torch

    from tests.support.diffusers_host import PosteriorCodec, WordEncoder, make_host

    class Encoder(WordEncoder):
        calls = 0

        def encode(self, caption):
            self.calls += 1
            # More than the tiny network reads, so that the cache holds as much as it would for SD1.
            return {**super().encode(caption), "full": torch.full(TEXT, float(self.calls))}

    return replace(make_host(report), codec=PosteriorCodec(), text=Encoder())


def train(folder: str) -> dict:
    """Train two epochs on a folder in this process; return their memory and the VAE and text encoder calls per epoch.

    Also return the processor time to the first step of another run with everything encoded. It equals wall time on an
    idle machine.
    """
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    from graft_pack.trainers.data.scan import scan_folder

    from tests.support.diffusers_host import run_session

    calls = []

    def report(event, payload):
        if event == "step":
            while len(calls) <= payload["epoch"]:
                calls.append((host.codec.calls, host.text.calls))
            calls[payload["epoch"]] = (host.codec.calls, host.text.calls)
        if event == "run":
            found.setdefault("before", peak())

    found = {}
    host = counting_host(report)
    dataset = scan_folder(folder, "sks", SIDE, 1)
    steps = 2 * -(-len(dataset.examples) // BATCH)
    with tempfile.TemporaryDirectory() as place:
        run_session(Path(place), host=host, dataset=dataset, steps=steps, batch_size=BATCH, save_every=10**6)
        ends = [(0, 0), *calls]
        during = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(ends, ends[1:], strict=False)]
        found |= {"peak": peak(), "calls": during, "pictures": len(dataset.examples)}
        # The other host's network already has adapters.
        fresh = counting_host(lambda event, payload: None)
        started = time.process_time()
        run_session(Path(place), host=fresh, dataset=dataset, steps=1, batch_size=BATCH, learning_rate=1e-3)
    return {**found, "again": time.process_time() - started}


def peak() -> float:
    """Return this process's peak memory so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1 if sys.platform == "darwin" else 1 / 1024) / 1e6


def in_process_of_its_own(folder: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.datasets", "--train", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def verdict(held: bool) -> str:
    return "held" if held else "MISSED"


def describe_look(pictures: int, seconds: dict[str, float]) -> str:
    """Return the figures of the folder scan as lines."""
    lines = [f"A folder of {pictures} pictures and captions, seconds", ""]
    lines += [f"{what:>22} {value:>8.2f}" for what, value in seconds.items()]
    asked = seconds["opening the node"] + seconds["checking its inputs"] + seconds["has it changed"]
    lines += ["", f"Opening the node and asking for changes: {asked:.2f} s, bar {LOOK_BAR:g} s: "]
    lines[-1] += verdict(asked < LOOK_BAR)
    return "\n".join(lines)


def describe_training(rows: list[dict], budget: float) -> str:
    """Return the figures of the trainings as lines; the last two rows have filled the cache."""
    lines = [
        f"Two epochs in batches of {BATCH}, MB of memory at the most; kept at hand between steps: {budget:.0f} MB",
        "again: to the first step of another run, with all encoded",
        "",
        f"{'pictures':>9} {'at the start':>13} {'in training':>12} {'again, s':>9}   calls of VAE and text by epoch",
    ]
    for row in rows:
        calls = ", ".join(f"{vae} + {text}" for vae, text in row["calls"])
        memory = f"{row['before']:>13.0f} {row['peak']:>12.0f}"
        lines.append(f"{row['pictures']:>9} {memory} {row['again']:>9.1f}   {calls}")
    some, all_of_them = rows[-2:]
    more = all_of_them["pictures"] - some["pictures"]
    each = (all_of_them["peak"] - some["peak"]) * 1e3 / more
    later = sum(sum(call) for row in rows for call in row["calls"][1:])
    lines += [
        "",
        f"{more} more pictures take {each * more / 1e3:.0f} MB more, {each:.1f} KB each, bar {EACH_BAR:g} KB: "
        + verdict(each <= EACH_BAR),
        f"Calls of VAE or text encoder after epoch 1: {later}, bar 0: {verdict(later == 0)}",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        print(json.dumps(train(args.train)))
        return
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    from graft_pack.trainers.preprocessing.prefetch import BUDGET

    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        folder = root / "input" / "many"
        draw_pictures(folder, args.pictures)
        # The scan does not yet trust files written within the last two seconds, and would read them again.
        time.sleep(2.5)
        print(describe_look(args.pictures, look(folder, root)), flush=True)
        rows = []
        # Half of 10,000 is twice the cache's capacity, so eviction has gone on for a while.
        for count in (args.pictures // 20, args.pictures // 2):
            share_pictures(folder, root / str(count), count)
            rows.append(in_process_of_its_own(root / str(count)))
        rows.append(in_process_of_its_own(folder))
        print("\n" + describe_training(rows, BUDGET / 1e6))


if __name__ == "__main__":
    main()
