"""Dropout of an adapter's inputs that a resumed run repeats to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..rng import stream_seed

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


@contextmanager
def dropping_out(
    trees: Sequence[nn.Module], device: torch.device, recipe: Recipe, step: int, rank: int = 0
) -> Iterator[None]:
    """Lets the trees' adapters drop inputs within the block, drawn from seed and step alone.

    The frozen network's own dropout stays off, and so does the adapters' outside the block: in previews, in
    validation and in gradient checks.

    Args:
        rank: of the process: each drops others, or all pictures of a step would lose the same inputs.
    """
    if not recipe.dropout:
        yield
        return
    import torch

    named = [pair for tree in trees for pair in tree.named_modules()]
    layers = [layer for name, layer in named if name.endswith(".lora_dropout.default")]
    # torch's dropout draws from torch's own source, and checkpointing puts just that back when it computes again.
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(stream_seed("dropout", recipe.seed, step, *([rank] if rank else [])))
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()
