"""Estimate how adapters of SDXL and Flux scale over processes, counted and simulated: `python -m benchmarks.scaling`.

Counted on the real networks without weights: operations of forward and backward, how much of the backward each bucket
of gradients waits for, what a step synchronizes, and the block weights that `shard` gathers for every picture. Measured
here: drawing the noise of a whole batch, which a thread of each process does during the step before. Assumed, and
stated in the table: arithmetic, networks, and how much processes differ from step to step. Nothing here was measured on
GPUs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch

from .full_size import CHECKPOINTED
from .full_size import Work as Counts
from .real_networks import adapt, fake_tensors, inputs, network

RANK = 16
WORLDS = (1, 2, 4, 8, 16, 32, 64)
STEPS = 400

# FLOP/s of one GPU at work: 312 TFLOP/s in bf16 (A100), and large networks train at some 40 % of it.
FLOPS = 0.4 * 312e12

# Spread of a process's step time around its usual value: standard deviation of the logarithm.
JITTER = 0.03

# Seconds per process and step, whatever the batch: launching, optimizer, log.
OVERHEAD = 0.015


@dataclass(frozen=True)
class Network:
    """The network between processes or machines.

    Attributes:
        rate: bytes per second that each process, or each machine, can send and receive.
        latency: seconds per message.
    """

    name: str
    rate: float
    latency: float


INSIDE = Network("NVLink", 200e9, 5e-6)
BETWEEN = (Network("25 Gbit/s Ethernet", 25e9 / 8, 3e-5), Network("200 Gbit/s InfiniBand", 200e9 / 8, 5e-6))
A_MACHINE = 8


# Small sums of a step that nothing overlaps: start, end, loss, timesteps, losses by picture, command.
SMALL_SUMS = 6


@dataclass(frozen=True)
class Work:
    """The work of one step.

    Attributes:
        buckets: (bytes of float32 gradients, part of the backward after which they are complete), in sending order.
        blocks: number of blocks in the network.
        weights: bytes of the frozen weights of all blocks, in bf16.
        forward, backward: seconds per picture.
        latent: shape of the latent.
    """

    name: str
    buckets: list[tuple[int, float]]
    blocks: int
    weights: int
    forward: float
    backward: float
    latent: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """Return the seconds of a picture."""
        return self.forward + self.backward

    @property
    def bytes(self) -> int:
        """Return the bytes of all gradients."""
        return sum(size for size, _ in self.buckets)


def works() -> list[Work]:
    """Return the work of SDXL and Flux at 1024 x 1024, with a LoRA of rank 16 on attention; Flux is checkpointed."""
    return [_work("SDXL", (4, 128, 128)), _work("Flux", (16, 128, 128))]


def _work(name: str, latent: tuple[int, ...]) -> Work:
    """Count a picture's forward and backward in bf16, as a process of several runs them."""
    from graft_pack.trainers.distributed.gradient_reducer import buckets
    from graft_pack.trainers.lowrank.layers import cast_by_block
    from graft_pack.trainers.memory.autograd import blocks_of
    from graft_pack.trainers.memory.checkpointing import checkpoint_blocks

    reached = {}
    with fake_tensors(), mock.patch("graft_pack.trainers.lowrank.products.is_on_cpu", lambda tensor: False):
        module = network(name, torch.bfloat16)
        frozen = [weight for block in blocks_of(module) for weight in block.parameters()]
        weights = 2 * sum(weight.numel() for weight in frozen)
        trainables = list(adapt(module, name, "attention", RANK, torch.bfloat16).values())
        if name in CHECKPOINTED:
            checkpoint_blocks(blocks_of(module))
        cast_by_block([module], blocks_of)
        args, keywords = inputs(name, 1024, torch.bfloat16)
        with Counts() as counts:
            for parameter in trainables:
                parameter.register_post_accumulate_grad_hook(lambda weight: reached.update({weight: counts.flops}))
            output = module(*args, **keywords, transformer_options={})
            forward = counts.flops
            output.float().square().mean().backward()
    backward = counts.flops - forward
    rows = [
        (sum(weight.nbytes for weight in bucket), (max(reached[weight] for weight in bucket) - forward) / backward)
        for bucket in buckets(trainables[::-1])
    ]
    return Work(name, rows, len(blocks_of(module)), weights, forward / FLOPS, backward / FLOPS, latent)


def noise_seconds(shape: tuple[int, ...]) -> float:
    """Return the seconds to draw the noise of one picture on this machine's CPU."""
    source = torch.Generator().manual_seed(0)
    torch.randn((8, *shape), generator=source)
    best = min(_timed(lambda: torch.randn((32, *shape), generator=source)) for _ in range(5))
    return best / 32


def _timed(work) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def message_seconds(size: float, world: int, between: Network) -> float:
    """Return the seconds to sum `size` bytes over the processes.

    Within a machine a ring sends 2 (N-1)/N of them (Patarasuk & Yuan 2009). Between machines NCCL's double binary trees
    (Sanders et al. 2009) send each machine's sum twice over its network card; two machines exchange it once.
    """
    if world == 1:
        return 0.0
    local, machines = min(world, A_MACHINE), math.ceil(world / A_MACHINE)
    inside = 2 * (local - 1) / local * size / INSIDE.rate + 2 * (local - 1) * INSIDE.latency
    if machines == 1:
        return inside
    return inside + min(2, machines - 1) * size / between.rate + 2 * math.log2(machines) * between.latency


def small_seconds(world: int, between: Network) -> float:
    """Return the seconds of a step's sums of a few numbers, by trees."""
    link = between if world > A_MACHINE else INSIDE
    return SMALL_SUMS * 2 * math.log2(world) * link.latency


def end_of_messages(ready: list[float], costs: list[float]) -> float:
    """Return when the last message has arrived. Each is sent when it is ready and the one before has arrived."""
    end = 0.0
    for start, cost in zip(ready, costs, strict=True):
        end = max(end, start) + cost
    return end


def sharers(world: int, shares: str) -> int:
    """Return the number of processes that share one copy of the weights; `shares` is "on" or "hybrid"."""
    return min(world, A_MACHINE) if shares == "hybrid" else world


def gather_seconds(work: Work, world: int, between: Network) -> float:
    """Return the seconds in which so many processes gather every block's weights twice.

    That is for a picture's forward and for its backward.
    """
    if world == 1:
        return 0.0
    link = between if world > A_MACHINE else INSIDE
    return 2 * ((world - 1) / world * work.weights / link.rate + work.blocks * (world - 1) * link.latency)


def picture_seconds(work: Work, world: int, between: Network, shares: str) -> float:
    """Return the seconds of a picture.

    With sharded weights, the next block's weights arrive while one block computes; only the first block's are waited
    for.
    """
    if not shares:
        return work.seconds
    gathering = gather_seconds(work, sharers(world, shares), between)
    return max(work.seconds, gathering) + gathering / work.blocks


def step_seconds(
    work: Work,
    world: int,
    pictures: int,
    between: Network,
    noise: float,
    shares: str = "",
    half: bool = False,
    overlaps: bool = True,
) -> float:
    """Return the mean over simulated steps; each lasts as long as its slowest process, because all wait for it.

    Each picture is one pass, so only the last picture's backward overlaps. The next step's noise is drawn meanwhile.
    """
    source = np.random.RandomState(world)
    a_picture = picture_seconds(work, world, between, shares)
    computing = max(noise * pictures, a_picture * math.ceil(pictures / world))
    slowest = np.exp(JITTER * source.randn(STEPS, world)).max(1)
    costs = [message_seconds(size / (2 if half else 1), world, between) for size, _ in work.buckets]
    last = work.backward * a_picture / work.seconds
    ready = [computing - last * (1 - part) if overlaps else computing for _, part in work.buckets]
    steps = [max(factor * computing, end_of_messages([factor * at for at in ready], costs)) for factor in slowest]
    return float(np.mean(steps) + OVERHEAD * slowest.mean()) + small_seconds(world, between)


def rows(work: Work, between: Network, batch: int, **how: bool) -> list[tuple[int, float, float]]:
    """Return (processes, efficiency with a picture for each, efficiency with so many in all) per world size."""
    noise = noise_seconds(work.latent)

    def rate(world: int, pictures: int) -> float:
        return pictures / step_seconds(work, world, pictures, between, noise, **how)

    return [
        (world, rate(world, world) / world / rate(1, 1), rate(world, batch) / world / rate(1, batch))
        for world in WORLDS
    ]


def shared_rows(work: Work, between: Network, shares: str, half: bool = False) -> list[tuple[int, float]]:
    """Return (processes, efficiency with sharded weights and a picture for each, against one unsharded process)."""
    noise = noise_seconds(work.latent)
    alone = step_seconds(work, 1, 1, between, noise)
    return [(world, alone / step_seconds(work, world, world, between, noise, shares, half)) for world in WORLDS]


def main() -> None:
    from tests.support import pack

    pack.use_comfy()
    pack.load_pack()
    ways = {"after the backward": {"overlaps": False}, "exact": {}, "bf16": {"half": True}}
    for work in works():
        drawn = noise_seconds(work.latent) * 1e3
        print(f"\n{work.name}: {work.bytes / 1e6:.0f} MB of gradients a step in {len(work.buckets)} buckets; ", end="")
        print(f"forward {work.forward * 1e3:.0f} ms, backward {work.backward * 1e3:.0f} ms a picture; ", end="")
        print(f"noise {drawn:.2f} ms a picture (measured)\n")
        print("| MB | of the backward |\n|---|---|")
        print("\n".join(f"| {size / 1e6:.1f} | {part:.0%} |" for size, part in work.buckets))
        for between in BETWEEN:
            print(f"\n{between.name}, one picture each and 64 in all:\n")
            print(f"| processes | alone ms | {' | '.join(f'{way} | 64 in all' for way in ways)} |")
            print("|---" * (2 + 2 * len(ways)) + "|")
            tables = [rows(work, between, 64, **how) for how in ways.values()]
            for row in zip(*tables, strict=True):
                world = row[0][0]
                alone = sum(message_seconds(size, world, between) for size, _ in work.buckets)
                cells = [f"{world}", f"{alone * 1e3:.1f}", *(f"{part:.1%}" for _, *parts in row for part in parts)]
                print(f"| {' | '.join(cells)} |")
        print(f"\nWith weights in shares, {work.weights / 1e9:.1f} GB of blocks in bf16:\n")
        titles = ["gathered in, ms", "exact", "bf16"]
        print(f"| {' | '.join(['shard', 'processes', 'GB held by each', 'GB gathered a picture', *titles, *titles])} |")
        print("|---" * 10 + "|")
        for shares in ("on", "hybrid"):
            tables = [shared_rows(work, between, shares, half) for between in BETWEEN for half in (False, True)]
            for row in zip(*tables, strict=True):
                world = row[0][0]
                count = sharers(world, shares)
                held = work.weights / count / 1e9
                cells = [shares, f"{world}", f"{held:.1f}", f"{2 * (count - 1) * held:.1f}"]
                for number, between in enumerate(BETWEEN):
                    cells.append(f"{gather_seconds(work, count, between) * 1e3:.0f}")
                    cells += [f"{share:.1%}" for _, share in row[2 * number : 2 * number + 2]]
                print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
