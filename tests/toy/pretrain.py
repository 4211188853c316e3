"""Pretrain the thin networks of the tiny base on the toy world, from scratch, on a CPU.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m tests.toy.pretrain vae unet

First the VAE, then the UNet. Sample counts and seeds define both, so a run can be repeated. A stopped run resumes from
its last checkpoint below .cache/toy. The shipped weights are written to tests/toy/weights in float16.
"""

import argparse
import hashlib
import logging
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from . import text, thin, world

log = logging.getLogger(__name__)

CACHE = Path(__file__).parents[2] / ".cache" / "toy"
WEIGHTS = Path(__file__).with_name("weights")
WIDTH = 120
SAVE_EVERY_SECONDS = 150
LOG_EVERY_STEPS = 25


@dataclass(frozen=True)
class Plan:
    """Training settings of a network; counts are in pictures."""

    samples: int
    batch: int
    learning_rate: float
    decay_from: float  # fraction of the run after which the learning rate falls to zero (cosine)
    ema: float
    seed: int
    pool: int


VAE_PLAN = Plan(samples=16_000, batch=16, learning_rate=1e-3, decay_from=0.3, ema=0.995, seed=1, pool=8_000)
UNET_PLAN = Plan(samples=188_000, batch=32, learning_rate=8e-4, decay_from=0.4, ema=0.998, seed=2, pool=24_000)


# ---- training data of the VAE --------------------------------------------------------------------


def draw_clutter(rng):
    """Draw 1-3 random shapes in random colors, which make the VAE a general one."""
    picture = np.ones((world.SIZE, world.SIZE, 3)) * rng.randint(0, 256, 3)
    for _ in range(rng.randint(1, 4)):
        shape = world.SHAPES[rng.randint(8)]
        x, y = rng.uniform(8, 56, 2)
        scene = world.Scene(shape, "red", "gray", x, y, rng.uniform(5, 28), rng.uniform(-180, 180))
        cover = world.mask(scene)[:, :, None]
        picture = picture * (1 - cover) + rng.randint(0, 256, 3) * cover
    return np.floor(picture + 0.5).astype(np.uint8)


def vae_pool(count, seed):
    """Return [count, 64, 64, 3] uint8: half from the toy world, half clutter."""
    rng = np.random.RandomState(seed)
    known = world.known_scenes()
    pool = np.empty((count, world.SIZE, world.SIZE, 3), dtype=np.uint8)
    for i in range(count):
        pool[i] = world.draw(world.sample_scene(rng, known)) if i % 2 else draw_clutter(rng)
    return pool


def to_pixels(pictures):
    """Convert [n, h, w, 3] uint8 to [n, 3, h, w] float in 0..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


# ---- shared training loop ------------------------------------------------------------------------


def learning_rate(plan, seen):
    """Return the learning rate after `seen` samples: warm-up over 1 %, flat, cosine to zero."""
    done = seen / plan.samples
    warm = min(1.0, done / 0.01 + 0.02)
    fall = max(0.0, (done - plan.decay_from) / (1 - plan.decay_from))
    return plan.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))


def train(name, model, plan, loss_of, folder=CACHE, pause=SAVE_EVERY_SECONDS):
    """Train model by plan; loss_of(generator) -> scalar. Return the averaged (EMA) parameters.

    Resumes from <name>_progress.safetensors in the folder if it exists.

    Args:
        pause: seconds between saves.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=1e-3, foreach=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(plan.seed)
    progress = folder / f"{name}_progress.safetensors"
    seen = restore(progress, model, optimizer, generator, average) if progress.exists() else 0
    losses = []
    saved = time.monotonic()
    while seen < plan.samples:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, seen)
        loss = loss_of(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += plan.batch
        _follow(average, model, min(plan.ema, seen / (seen + 10 * plan.batch)))
        losses.append(loss.item())
        if len(losses) == LOG_EVERY_STEPS:
            log.info("%s %d/%d loss %.5f", name, seen, plan.samples, np.mean(losses))
            losses = []
        if time.monotonic() - saved > pause or seen >= plan.samples:
            keep(progress, model, optimizer, generator, average, seen)
            save_weights(folder / f"{name}.safetensors", average)
            saved = time.monotonic()
    return average


@torch.no_grad()
def _follow(average, model, decay):
    """Move the average towards the model's parameters."""
    state = model.state_dict()
    torch._foreach_lerp_(list(average.values()), [state[k] for k in average], 1 - decay)


def keep(path, model, optimizer, generator, average, seen):
    """Write everything that a resume needs: parameters, their average, AdamW's moments, the generator."""
    state = {"seen": torch.tensor(seen), "generator": generator.get_state()}
    state.update({f"model.{k}": v for k, v in model.state_dict().items()})
    state.update({f"average.{k}": v for k, v in average.items()})
    for i, moments in optimizer.state_dict()["state"].items():
        state.update({f"optimizer.{i}.{k}": v for k, v in moments.items()})
    write_whole(path, state)


def restore(path, model, optimizer, generator, average):
    """Read the file of `keep` into the four objects; return the count of samples seen."""
    state = load_file(path)
    generator.set_state(state["generator"])
    model.load_state_dict(_below(state, "model."))
    for name, value in _below(state, "average.").items():
        average[name].copy_(value)
    moments = {}
    for name, value in _below(state, "optimizer.").items():
        row, key = name.split(".")
        moments.setdefault(int(row), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return int(state["seen"])


def _below(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def save_weights(path, state):
    """Write parameters in float16."""
    write_whole(path, {k: v.half() for k, v in state.items()})


def write_whole(path, state):
    """Write tensors to a safetensors file, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in state.items()}, partial)
    os.replace(partial, path)


# ---- the two networks ----------------------------------------------------------------------------


def train_vae(plan=VAE_PLAN):
    """Train the VAE: pixel reconstruction, latents of zero mean and unit variance, decoding robust to noise."""
    torch.manual_seed(plan.seed)
    model = thin.ThinVAE()
    pool = vae_pool(plan.pool, plan.seed)
    thin.start_blurred(model, to_pixels(pool[:64]))

    def loss_of(generator):
        rows = torch.randint(plan.pool, (plan.batch,), generator=generator)
        pixels = to_pixels(pool[rows.numpy()])
        latents = model.encode(pixels)
        noise = torch.randn(latents.shape, generator=generator)
        decoded = model.decode(latents + 0.05 * noise)
        mean = latents.mean(dim=(0, 2, 3))
        variance = latents.var(dim=(0, 2, 3))
        moments = mean.square().mean() + (variance - 1).square().mean()
        wild = F.relu(latents.abs() - 2.5).square().mean()
        return F.l1_loss(decoded, pixels) + 2 * F.mse_loss(decoded, pixels) + 0.05 * moments + 0.05 * wild

    return train("vae", model, plan, loss_of)


def load_vae(path):
    model = thin.ThinVAE()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval()


def scene_pool(count, seed):
    """Return pictures [count, 64, 64, 3] uint8 of random known scenes, and each one's caption; cached."""
    rng = np.random.RandomState(seed)
    known = world.known_scenes()
    scenes = [world.sample_scene(rng, known) for _ in range(count)]
    path = CACHE / f"scenes_{count}_{seed}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.stack([world.draw(s) for s in scenes]))
    return np.load(path), [world.caption(s) for s in scenes]


@torch.no_grad()
def encode_pool(vae, pictures):
    """Encode pictures [n, 64, 64, 3] uint8 to latents [n, 4, 8, 8]."""
    parts = [vae.encode(to_pixels(pictures[i : i + 100])) for i in range(0, len(pictures), 100)]
    return torch.cat(parts)


def schedule():
    """Return the cumulative alphas [1000] of SD1's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def loss_weights(alphas):
    """Return min(1 + sigma^2, 20), scaled to mean one over the timesteps."""
    weights = (1 / alphas).clamp(max=20)
    return (weights / weights.mean()).float()


def stratified_timesteps(count, generator):
    """Return one timestep from each of `count` equal parts of 0..999, shuffled."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return (parts * 1000).long().clamp(max=999)[torch.randperm(count, generator=generator)]


def contexts_for(captions):
    """Return contexts [n, 77, 768] of the distinct captions and of the empty one, and {caption: row}; cached."""
    distinct = ["", *sorted(set(captions))]
    digest = hashlib.sha256("\n".join(distinct).encode()).hexdigest()[:12]
    path = CACHE / f"contexts_{digest}.safetensors"
    if not path.exists():
        write_whole(path, {"contexts": text.encode_captions(distinct)})
    return load_file(path)["contexts"], {caption: row for row, caption in enumerate(distinct)}


def train_unet(plan=UNET_PLAN, width=WIDTH):
    """Train the UNet on eps with SD1's schedule; a tenth of the captions is empty."""
    torch.manual_seed(plan.seed)
    model = thin.ThinUNet(width)
    thin.zero_outputs(model)
    vae = load_vae(WEIGHTS / "vae.safetensors")
    pictures, captions = scene_pool(plan.pool, plan.seed)
    pool = encode_pool(vae, pictures)
    log.info("latents: mean %.3f, std %.3f", pool.mean(), pool.std())
    contexts, row_of = contexts_for(captions)
    caption_rows = torch.tensor([row_of[c] for c in captions])
    alphas = schedule()
    weights = loss_weights(alphas)

    def loss_of(generator):
        rows = torch.randint(plan.pool, (plan.batch,), generator=generator)
        dropped = torch.rand(plan.batch, generator=generator) < 0.1
        context = contexts[torch.where(dropped, row_of[""], caption_rows[rows])]
        t = stratified_timesteps(plan.batch, generator)
        noise = torch.randn(plan.batch, 4, 8, 8, generator=generator)
        alpha = alphas[t].float()[:, None, None, None]
        noised = alpha.sqrt() * pool[rows] + (1 - alpha).sqrt() * noise
        error = (model(noised, t, context) - noise).square().mean(dim=(1, 2, 3))
        return (weights[t] * error).mean()

    return train("unet", model, plan, loss_of)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("vae", "unet"))
    parser.add_argument("--samples", type=int, help="pictures to train on instead of the plan's")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the UNet, a multiple of 40")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    changes = {"samples": args.samples} if args.samples else {}
    if "vae" in args.what:
        save_weights(WEIGHTS / "vae.safetensors", train_vae(replace(VAE_PLAN, **changes)))
    if "unet" in args.what:
        save_weights(WEIGHTS / "unet.safetensors", train_unet(replace(UNET_PLAN, **changes), args.width))


if __name__ == "__main__":
    main()
