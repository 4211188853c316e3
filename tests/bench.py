"""What a training step costs, against the bare model's forward and backward.

    python -m tests.bench [--repeats N] [--threads N]

The limit is what no trainer of activations can go below: forward and backward of the bare model where the latent
requires a gradient and no parameter or text does. Each case runs in a process of its own; in it, forward, limit and
whole step (the real loop: data, noise, prediction, loss, backward, clipping, optimiser, log) take turns, so that a
machine that is busy for a while is busy for all three.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "SD1 middling"
# Pictures, and latent positions a side; 32 is 256 pixels.
CASES = ((1, 16), (4, 16), (1, 32))
RANK = 8
WARM_UP = 2
BAR = 1.25
# Below this a step's fixed cost weighs too much for the bar to mean anything.
BAR_FROM = 0.25


class Turns:
    """A report for the loop: after each step it times the bare model, and knows how long the step took.

    Attributes:
        rows: (forward, limit, step) in seconds.
    """

    def __init__(self, forward, limit):
        self._measured = (forward, limit)
        self._left = time.perf_counter()
        self.rows = []

    def __call__(self, event, payload):
        step = time.perf_counter() - self._left
        if event == "step":
            self.rows.append((*(timed(call) for call in self._measured), step))
        self._left = time.perf_counter()


def timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(batch: int, side: int, repeats: int, threads: int) -> dict:
    """One case in this process: its rows and the model's size."""
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    pack.use_comfy()
    import torch

    from tests.support import models

    torch.set_num_threads(threads)
    with torch.inference_mode():
        model = models.patcher(MODEL)
    fields = {"steps": repeats + WARM_UP, "batch_size": batch, "rank": RANK, "alpha": float(RANK), "save_every": 10**6}
    turns = []
    report = lambda *event: turns[0](*event)  # noqa: E731
    with models.in_training(model, MODEL, examples=batch, side=side, report=report, **fields) as training:
        turns.append(Turns(*bare_calls(model, batch, side)))
        with tempfile.TemporaryDirectory() as folder:
            models.train(training, Path(folder))
    size = sum(parameter.numel() for parameter in model.model.diffusion_model.parameters())
    return {"rows": turns[0].rows[WARM_UP:], "parameters": size, "layers": len(training.plan.trainables) // 2}


def bare_calls(model, batch: int, side: int):
    """(forward, forward and backward) of the bare network on a batch, as functions."""
    import torch
    from graft_pack.trainers.autograd import private_tree

    from tests.support import models

    network = private_tree(model.model.diffusion_model)
    x = torch.randn(batch, models.SIZES[MODEL].latent[0], side, side, requires_grad=True)
    context = torch.cat([models.conditioning(MODEL, seed).tensors["cross_attn"] for seed in range(batch)])
    t = torch.linspace(1, 999, batch)

    def forward():
        with torch.no_grad():
            network(x, t, context=context)

    def limit():
        network(x, t, context=context).square().mean().backward()
        x.grad = None

    return forward, limit


def in_process_of_its_own(case: tuple[int, int], repeats: int, threads: int) -> dict:
    command = [sys.executable, "-m", "tests.bench", "--repeats", str(repeats), "--threads", str(threads)]
    command += ["--case", *map(str, case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(found: dict) -> dict:
    """Medians in ms; the ratio's quartiles are over the turns, each step against the limit next to it."""
    forward, limit, step = (statistics.median(column) for column in zip(*found["rows"], strict=True))
    low, _, high = statistics.quantiles([row[2] / row[1] for row in found["rows"]], n=4)
    verdict = "limit < 250 ms"
    if limit >= BAR_FROM:
        verdict = "held" if step / limit <= BAR else "MISSED"
    milliseconds = {"forward": forward * 1e3, "limit": limit * 1e3, "step": step * 1e3}
    return {**milliseconds, "ratio": step / limit, "low": low, "high": high, "verdict": verdict}


def table(found: dict[tuple[int, int], dict], repeats: int, threads: int) -> str:
    """The cases as lines, and whether the bar is held."""
    first = next(iter(found.values()))
    lines = [
        f"SD1 layout, {first['parameters'] / 1e6:.1f} M parameters, fp32 on the CPU with {threads} threads;",
        f"LoRA of rank {RANK} on {first['layers']} attention layers, AdamW; medians of {repeats} turns, ms",
        "",
        f"{'batch':>5} {'latent':>7} {'forward':>9} {'limit':>9} {'step':>9} {'step/limit':>11} {'quartiles':>13}"
        f"  bar {BAR}",
    ]
    rows = {case: summarise(one) for case, one in found.items()}
    for (batch, side), row in rows.items():
        lines.append(
            f"{batch:>5} {f'{side}x{side}':>7} {row['forward']:>9.1f} {row['limit']:>9.1f} {row['step']:>9.1f} "
            f"{row['ratio']:>11.3f} {row['low']:>7.3f}-{row['high']:.3f}  {row['verdict']}"
        )
    one, many = rows[CASES[0]], rows[CASES[1]]
    lines += ["", f"{CASES[1][0]} times the pictures take {many['step'] / one['step']:.2f} times as long."]
    return "\n".join(lines)


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="turns that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args.repeats, args.threads)))
        return
    found = {case: in_process_of_its_own(case, args.repeats, args.threads) for case in CASES}
    print(table(found, args.repeats, args.threads))


if __name__ == "__main__":
    main()
