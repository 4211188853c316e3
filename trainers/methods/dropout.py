"""Dropout on an adapter's inputs that a resumed run repeats bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..rng import stream_seed
from .variants import NAME

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..recipe.recipe import Recipe


@contextmanager
def dropping_out(
    trees: Sequence[nn.Module], device: torch.device, recipe: Recipe, step: int, rank: int = 0
) -> Iterator[None]:
    """Enable the adapters' dropout within the block, drawn from the seed and the step alone.

    The dropout of the frozen network stays off. Outside the block the adapters' dropout is off too: in previews,
    validation and gradient checks.

    Args:
        rank: rank of the process. Each process draws its own masks: otherwise all samples of a step would lose the
            same inputs.
    """
    if not (recipe.dropout or {"rank_dropout", "module_dropout"} & dict(recipe.adapter_args).keys()):
        yield
        return
    import torch

    named = [pair for tree in trees for pair in tree.named_modules()]
    layers = [layer for name, layer in named if name.endswith((".lora_dropout.default", f".{NAME}"))]
    # torch's dropout draws from torch's global generator. Checkpointing restores that generator before it recomputes.
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(stream_seed("dropout", recipe.seed, step, *([rank] if rank else [])))
        for layer in layers:
            layer.train()
        try:
            yield
        finally:
            for layer in layers:
                layer.eval()
