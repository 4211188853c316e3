"""Measure the sum of gradients between two machines: `python -m benchmarks.network`, as root on Linux.

The machines are network namespaces with a limited link between them (`ip`, `tc`), each with one process over gloo. The
backward sleeps in place of a GPU that computes. The table compares the fastest step and the bytes of a step with those
of `benchmarks.scaling`, for gradients that are sent during the backward and after it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from .scaling import end_of_messages

LINKS = {"1 Gbit/s": 1e9, "100 Mbit/s": 1e8}
# Layers of the network, float32 numbers of each, and seconds of each layer's backward by link.
LAYERS, NUMBERS, STEPS = 24, 1 << 18, 8
SLEEP = {"1 Gbit/s": 0.02, "100 Mbit/s": 0.1}
WAYS = {"after the backward": (False, False), "exact": (True, False), "bf16": (True, True)}


class _Sleep(torch.autograd.Function):
    """A layer whose backward ends at a time of its own, however late this process wakes up."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.size, ctx.ends = weight.numel(), ends
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(max(0.0, ctx.ends.pop(0) - time.perf_counter()))
        return grad, torch.ones(ctx.size), None


def work(link: str) -> None:
    """Run in one process: print the seconds of a step and the bytes sent, by way, as JSON."""
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    from graft_pack.trainers.distributed import gradient_reducer
    from graft_pack.trainers.distributed.accelerate_group import AccelerateGroup

    gradient_reducer._BYTES = 4 << 20
    group = AccelerateGroup(cpu=True)
    sent = Path("/sys/class/net/graft0/statistics/tx_bytes")
    figures = {}
    for way, (overlaps, half) in WAYS.items():
        weights = [nn.Parameter(torch.zeros(NUMBERS)) for _ in range(LAYERS)]
        reducer = group.reducer(weights, half)
        times, before = [], 0
        for step in range(STEPS + 1):
            reducer.begin()
            if step == 1:
                before = int(sent.read_text())
            x, ends = torch.zeros(1, requires_grad=True), []
            for weight in weights:
                x = _Sleep.apply(x, weight, ends)
            started = time.perf_counter()
            ends += [started + number * SLEEP[link] for number in range(1, LAYERS + 1)]
            if overlaps:
                with reducer.last_backward():
                    x.sum().backward()
            else:
                x.sum().backward()
            reducer.finish()
            times.append(time.perf_counter() - started)
            for weight in weights:
                weight.grad = None
        figures[way] = [min(times[1:]), (int(sent.read_text()) - before) / STEPS]
        sizes = [sum(weight.nbytes for weight in bucket) for bucket in gradient_reducer.buckets(weights[::-1])]
        reducer.close()
    if group.is_main:
        print(json.dumps({"figures": figures, "buckets": sizes}))
    group.close()


def expected(link: str, way: str, sizes: list[int]) -> tuple[float, float]:
    """Return the seconds of a step and the bytes that each process sends, as `benchmarks.scaling` computes them."""
    overlaps, half = WAYS[way]
    backward, a_layer = LAYERS * SLEEP[link], 4 * NUMBERS
    layers = [sum(sizes[: place + 1]) / a_layer for place in range(len(sizes))]
    ready = [SLEEP[link] * number if overlaps else backward for number in layers]
    sent = [size / (2 if half else 1) for size in sizes]
    return max(backward, end_of_messages(ready, [size * 8 / LINKS[link] for size in sent])), sum(sent)


def main() -> None:
    """Print the table, or why it cannot be measured here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=list(LINKS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        sys.exit("This needs root, and the commands ip and tc (package iproute2).")
    print("| link | gradients | seconds a step | simulated | MB sent by each | simulated |\n|---|---|---|---|---|---|")
    for link, rate in LINKS.items():
        outcome = measured(link, rate)
        for way, (seconds, sent) in outcome["figures"].items():
            seconds_expected, sent_expected = expected(link, way, outcome["buckets"])
            cells = [f"{seconds:.2f}", f"{seconds_expected:.2f}", f"{sent / 1e6:.1f}", f"{sent_expected / 1e6:.1f}"]
            print(f"| {link} | {way} | {' | '.join(cells)} |", flush=True)


def measured(link: str, rate: float) -> dict:
    """Return what the main process prints on two machines with a link."""
    names = [f"graft{os.getpid()}{end}" for end in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = [word for name in names for word in ("name", "graft0", "netns", name, "peer")][:-1]
        _run("ip", "link", "add", *ends[:4], "type", "veth", "peer", *ends[5:])
        for number, name in enumerate(names, 1):
            inside = ("ip", "netns", "exec", name)
            _run(*inside, "ip", "addr", "add", f"10.99.0.{number}/24", "dev", "graft0")
            _run(*inside, "ip", "link", "set", "graft0", "up")
            _run(*inside, "ip", "link", "set", "lo", "up")
            limit = ("rate", f"{rate:.0f}bit", "burst", "256kb", "latency", "100ms")
            _run(*inside, "tc", "qdisc", "add", "dev", "graft0", "root", "tbf", *limit)
        return _together(names, link)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _together(names: list[str], link: str) -> dict:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    shared |= {"GLOO_SOCKET_IFNAME": "graft0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    processes = []
    with tempfile.TemporaryFile("w+") as answer:
        for rank, name in enumerate(names):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "benchmarks.network", "--worker", link]
            output = subprocess.DEVNULL if rank else answer
            own = {**os.environ, **shared, "RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=output))
        if any(process.wait() for process in processes):
            sys.exit("A process failed.")
        answer.seek(0)
        return json.loads(answer.read().splitlines()[-1])


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
