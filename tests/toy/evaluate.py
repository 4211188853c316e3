"""Measure the tiny base: let the real host draw prompts, and classify the pictures by their pixels.

    COMFYUI_PATH=... python -m tests.toy.evaluate [CHECKPOINT] [--count 64] [--sheet sheet.png]

Without a checkpoint the shipped weights are assembled into .cache/toy. The prompts are shape-color pairs that the base
has never seen together, drawn with euler, 20 steps, cfg 4.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from . import assemble, host, world
from .classifier import classify

CACHE = Path(__file__).parents[2] / ".cache" / "toy"
BAR = {"shape": 0.95, "color": 0.98, "background": 0.98}


def choose(combinations, count, seed):
    """Return `count` random (shape, color, background) from a list, each pair about as often as any other."""
    rng = np.random.RandomState(seed)
    order = [combinations[i] for i in rng.permutation(len(combinations))]
    return [order[i % len(order)] for i in range(count)]


def prompt_for(combination):
    """Return the prompt of a (shape, color, background)."""
    return world.caption(world.Scene(*combination))


def score(pictures, combinations):
    """Return the fractions of right shapes, colors and backgrounds, of all three right, and of recognized concepts."""
    verdicts = [classify(picture) for picture in pictures]
    told = [(v.shape, v.color, v.background) for v in verdicts]
    right = np.array(told) == np.array(combinations)
    shares = {name: float(right[:, i].mean()) for i, name in enumerate(("shape", "color", "background"))}
    shares["all"] = float(right.all(axis=1).mean())
    shares["toy"] = float(np.mean([v.toy for v in verdicts]))
    shares["tint"] = float(np.mean([v.tint for v in verdicts]))
    return shares


def evaluate(model, clip, vae, combinations, seed=0, steps=20):
    """Draw a picture per combination with the host and score it: (pictures, fractions)."""
    pictures = host.generate(model, clip, vae, [prompt_for(c) for c in combinations], seed, steps)
    return pictures, score(pictures, combinations)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    checkpoint = args.checkpoint or assemble.assemble(CACHE / "graft_tiny.safetensors")
    combinations = choose(world.held_out_scenes(), args.count, args.seed)
    pictures, shares = evaluate(*host.load(checkpoint), combinations, args.seed)
    for name, share in shares.items():
        bar = f"  (bar {BAR[name]:.2f})" if name in BAR else ""
        print(f"{name:11s} {share:.3f}{bar}")
    if args.sheet:
        sheet = world.contact_sheet(list(pictures))
        sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(args.sheet)


if __name__ == "__main__":
    main()
