"""Estimate how adapters of SDXL and Flux scale over processes, computed and simulated: `python -m benchmarks.scaling`.

Counted: the data that a step synchronizes, from the real networks (built without weights) and the pack's own choice of
layers, and the block weights that `shard` gathers for every picture. Measured here: drawing the noise of a whole batch,
which each process does. Assumed, and stated in the table: arithmetic, networks, and how much processes differ from step
to step. Nothing here was measured on GPUs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

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
    """The network between processes.

    Attributes:
        rate: bytes per second that each process can send and receive in a ring.
        latency: seconds per message.
    """

    name: str
    rate: float
    latency: float


INSIDE = Network("NVLink", 200e9, 5e-6)
BETWEEN = (Network("25 Gbit/s Ethernet", 25e9 / 8, 3e-5), Network("200 Gbit/s InfiniBand", 200e9 / 8, 5e-6))
A_MACHINE = 8


@dataclass(frozen=True)
class Work:
    """The work of one step.

    Attributes:
        numbers: parameters of the adapter.
        blocks: number of blocks in the network.
        weights: bytes of the frozen weights of all blocks, in bf16.
        seconds: per picture, forward and backward.
        latent: shape of the latent.
    """

    name: str
    numbers: int
    blocks: int
    weights: int
    seconds: float
    latent: tuple[int, ...]


def works() -> list[Work]:
    """Return the work of SDXL and Flux at 1024 x 1024, with a LoRA of rank 16 on attention.

    Operations of a forward, two for each multiply and add: SDXL 6.0e12 (the network of Podell et al. 2023); Flux two
    for each of 11.9e9 weights and 4608 tokens, plus attention's. A backward without weight gradients costs as much
    again. Flux is checkpointed, which adds one more forward.
    """
    flux = 2 * 11.9e9 * 4608 + 57 * 4 * 4608**2 * 3072
    return [
        _work("SDXL", 2 * 6.0e12 / FLOPS, (4, 128, 128)),
        _work("Flux", 3 * flux / FLOPS, (16, 128, 128)),
    ]


def _work(name: str, seconds: float, latent: tuple[int, ...]) -> Work:
    """Return the work with a LoRA on the layers that the pack chooses in the real network."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.memory.autograd import blocks_of
    from graft_pack.trainers.methods import METHODS

    from tests.support import models

    module = network(name)
    recipe = models.recipe(name, rank=RANK)
    found = METHODS["LoRA"].targets(module, family_of(name), recipe)
    layers = [module.get_submodule(path) for path in found]
    blocks = blocks_of(module)
    return Work(
        name,
        sum(RANK * (layer.in_features + layer.out_features) for layer in layers),
        len(blocks),
        2 * sum(weight.numel() for block in blocks for weight in block.parameters()),
        seconds,
        latent,
    )


def network(name: str):
    """Return the network in its published size, without weights."""
    import comfy.ops
    import comfy.supported_models

    options = {"device": "meta", "operations": comfy.ops.disable_weight_init}
    if name == "SDXL":
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        config = {**comfy.supported_models.SDXL.unet_config}
        config |= {"image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2]}
        config |= {"channel_mult": [1, 2, 4], "num_head_channels": 64, "use_spatial_transformer": True, "legacy": False}
        config |= {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
        config |= {"num_classes": "sequential", "model_channels": 320}
        return UNetModel(**config, **options)
    from comfy.ldm.flux.model import Flux

    sizes = {"in_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0}
    sizes |= {"num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000}
    return Flux(**sizes, patch_size=2, out_channels=16, qkv_bias=True, guidance_embed=True, **options)


def noise_seconds(shape: tuple[int, ...]) -> float:
    """Return the seconds to draw the noise of one picture on this machine's CPU."""
    import torch

    source = torch.Generator().manual_seed(0)
    torch.randn((8, *shape), generator=source)
    best = min(_timed(lambda: torch.randn((32, *shape), generator=source)) for _ in range(5))
    return best / 32


def _timed(work) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before


def sync_seconds(work: Work, world: int, between: Network) -> float:
    """Return the seconds of one step's messages: a ring over the slowest link, and three tree sums of a few numbers.

    The ring sends 2 (N-1)/N of the gradients (Patarasuk & Yuan 2009).
    """
    if world == 1:
        return 0.0
    link = between if world > A_MACHINE else INSIDE
    ring = 2 * (world - 1) / world * 4 * work.numbers / link.rate + 2 * (world - 1) * link.latency
    return ring + 3 * 2 * math.log2(world) * link.latency


def gather_seconds(work: Work, world: int, between: Network) -> float:
    """Return the seconds to gather every block's weights twice, for a picture's forward and for its backward."""
    if world == 1:
        return 0.0
    link = between if world > A_MACHINE else INSIDE
    return 2 * ((world - 1) / world * work.weights / link.rate + work.blocks * (world - 1) * link.latency)


def picture_seconds(work: Work, world: int, between: Network, shares: bool) -> float:
    """Return the seconds of a picture.

    With sharded weights, the next block's weights arrive while one block computes; only the first block's are waited
    for.
    """
    if not shares:
        return work.seconds
    gathering = gather_seconds(work, world, between)
    return max(work.seconds, gathering) + gathering / work.blocks


def step_seconds(work: Work, world: int, pictures: int, between: Network, noise: float, shares: bool = False) -> float:
    """Return the mean over simulated steps; each lasts as long as its slowest process, because all wait for it."""
    source = np.random.RandomState(world)
    a_picture = picture_seconds(work, world, between, shares)
    own = OVERHEAD + noise * pictures + a_picture * math.ceil(pictures / world)
    slowest = (own * np.exp(JITTER * source.randn(STEPS, world))).max(1)
    return float(slowest.mean()) + sync_seconds(work, world, between)


def rows(work: Work, between: Network, batch: int) -> list[tuple[int, float, float]]:
    """Return (processes, efficiency with a picture for each, efficiency with so many in all) per world size."""
    noise = noise_seconds(work.latent)

    def rate(world: int, pictures: int) -> float:
        return pictures / step_seconds(work, world, pictures, between, noise)

    return [
        (world, rate(world, world) / world / rate(1, 1), rate(world, batch) / world / rate(1, batch))
        for world in WORLDS
    ]


def shared_rows(work: Work, between: Network) -> list[tuple[int, float]]:
    """Return (processes, efficiency with sharded weights and a picture for each, against one unsharded process)."""
    noise = noise_seconds(work.latent)
    alone = step_seconds(work, 1, 1, between, noise)
    return [(world, alone / step_seconds(work, world, world, between, noise, True)) for world in WORLDS]


def main() -> None:
    from tests.support import pack

    pack.use_comfy()
    pack.load_pack()
    for work in works():
        size = 4 * work.numbers / 1e6
        drawn = noise_seconds(work.latent) * 1e3
        print(f"\n{work.name}: {work.numbers / 1e6:.1f} M numbers, {size:.0f} MB of gradients a step; ", end="")
        print(f"{work.seconds * 1e3:.0f} ms a picture (assumed), noise {drawn:.2f} ms a picture (measured)\n")
        titles = ["sync ms", "one each", "64 in all"]
        print(f"| {' | '.join(['processes', 'MB sent by each', *titles, *titles])} |")
        print("|---|---|---|---|---|---|---|---|")
        tables = [rows(work, between, 64) for between in BETWEEN]
        for (world, *slow), (_, *fast) in zip(*tables, strict=True):
            sent = 2 * (world - 1) / world * size
            cells = [f"{world}", f"{sent:.0f}"]
            for between, shares in zip(BETWEEN, (slow, fast), strict=True):
                cells += [f"{sync_seconds(work, world, between) * 1e3:.1f}", *(f"{share:.0%}" for share in shares)]
            print(f"| {' | '.join(cells)} |")
        print(f"\nWith weights in shares, {work.weights / 1e9:.1f} GB of blocks in bf16:\n")
        titles = ["gathered in, ms", "one each"]
        print(f"| {' | '.join(['processes', 'GB held by each', 'GB gathered a picture', *titles, *titles])} |")
        print("|---|---|---|---|---|---|---|")
        tables = [shared_rows(work, between) for between in BETWEEN]
        for (world, *slow), (_, *fast) in zip(*tables, strict=True):
            held = work.weights / world / 1e9
            cells = [f"{world}", f"{held:.1f}", f"{2 * (world - 1) * held:.1f}"]
            for between, (share,) in zip(BETWEEN, (slow, fast), strict=True):
                cells += [f"{gather_seconds(work, world, between) * 1e3:.0f}", f"{share:.0%}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
