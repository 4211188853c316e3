"""Measure gradients and shards of weights between two machines: `python -m benchmarks.network`, as root on Linux.

The machines are network namespaces with a limited link between them (`ip`, `tc`), each with one process over gloo. The
backward sleeps in place of a GPU that computes. The table compares the fastest step and the bytes of a step with those
of `benchmarks.scaling`, for gradients that are sent during the backward and after it. With two processes on each
machine, a second table compares weights that are sharded over all processes with those sharded on each machine.
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
# Blocks whose weights are sharded, and the width of their only layer.
BLOCKS, WIDTH = 8, 512
SHARES = {"on": False, "hybrid": True}
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


def work(link: str, per_machine: int) -> None:
    """Run in one process: print the seconds of a step and the bytes sent, by way, as JSON."""
    from tests.support import pack

    pack.hide_root()
    pack.load_pack()
    from graft_pack.trainers.distributed.accelerate_group import AccelerateGroup

    group = AccelerateGroup(cpu=True)
    answer = _gradients(group, link) if per_machine == 1 else _shards(group)
    if group.is_main:
        print(json.dumps(answer))
    group.close()


def _sent() -> int:
    """Return the bytes that this machine has sent over the link so far."""
    return int(Path("/sys/class/net/graft0/statistics/tx_bytes").read_text())


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(BLOCKS)])
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def _shards(group) -> dict:
    """Return the seconds of a forward and backward, and the bytes that this machine sends, by kind of shards."""
    figures = {}
    for shares, hybrid in SHARES.items():
        net = _Net()
        group.shard(net, [], needs_input_grad=True, hybrid=hybrid)
        times, before = [], 0
        for step in range(STEPS + 1):
            group.all_reduce()
            if step == 1:
                before = _sent()
            started = time.perf_counter()
            net(torch.ones(1, WIDTH)).sum().backward()
            times.append(time.perf_counter() - started)
        group.all_reduce()
        figures[shares] = [min(times[1:]), (_sent() - before) / STEPS]
    return {"figures": figures}


def expected_shards(link: str, shares: str) -> tuple[float, float]:
    """Return the seconds and bytes of gathering twice over the link; within a machine it counts as nothing."""
    between = 0.0 if SHARES[shares] else 3 / 4 * 2 * 4 * BLOCKS * WIDTH**2
    return between * 8 / LINKS[link], between


def _gradients(group, link: str) -> dict:
    """Return the seconds of a step and the bytes that this machine sends, by way, and the sizes of the buckets."""
    from graft_pack.trainers.distributed import gradient_reducer

    gradient_reducer._BYTES = 4 << 20
    figures = {}
    for way, (overlaps, half) in WAYS.items():
        weights = [nn.Parameter(torch.zeros(NUMBERS)) for _ in range(LAYERS)]
        reducer = group.reducer(weights, half)
        times, before = [], 0
        for step in range(STEPS + 1):
            reducer.begin()
            if step == 1:
                before = _sent()
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
        figures[way] = [min(times[1:]), (_sent() - before) / STEPS]
        sizes = [sum(weight.nbytes for weight in bucket) for bucket in gradient_reducer.buckets(weights[::-1])]
        reducer.close()
    return {"figures": figures, "buckets": sizes}


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
    parser.add_argument("--per-machine", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.per_machine)
        return
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        sys.exit("This needs root, and the commands ip and tc (package iproute2).")
    for per_machine, title in ((1, "gradients"), (2, "shard")):
        print(f"\n| link | {title} | seconds a step | simulated | MB sent by each | simulated |")
        print("|---|---|---|---|---|---|")
        for link, rate in LINKS.items():
            outcome = measured(link, rate, per_machine)
            for way, (seconds, sent) in outcome["figures"].items():
                wanted = expected(link, way, outcome["buckets"]) if per_machine == 1 else expected_shards(link, way)
                cells = [f"{seconds:.2f}", f"{wanted[0]:.2f}", f"{sent / 1e6:.1f}", f"{wanted[1] / 1e6:.1f}"]
                print(f"| {link} | {way} | {' | '.join(cells)} |", flush=True)


def measured(link: str, rate: float, per_machine: int) -> dict:
    """Return what the main process prints on two machines with a link, with so many processes on each."""
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
        return _together(names, link, per_machine)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _together(names: list[str], link: str, per_machine: int) -> dict:
    world = str(len(names) * per_machine)
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "10.99.0.1", "MASTER_PORT": "29511", "OMP_NUM_THREADS": "1"}
    shared |= {"GLOO_SOCKET_IFNAME": "graft0", "LOCAL_WORLD_SIZE": str(per_machine)}
    processes = []
    with tempfile.TemporaryFile("w+") as answer:
        for rank in range(int(world)):
            place = ["ip", "netns", "exec", names[rank // per_machine]]
            command = [*place, sys.executable, "-m", "benchmarks.network", "--worker", link]
            command += ["--per-machine", str(per_machine)]
            output = subprocess.DEVNULL if rank else answer
            own = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank % per_machine)}
            processes.append(subprocess.Popen(command, env=own, stdout=output))
        if any(process.wait() for process in processes):
            sys.exit("A process failed.")
        answer.seek(0)
        return json.loads(answer.read().splitlines()[-1])


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
