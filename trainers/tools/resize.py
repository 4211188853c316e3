"""Reduction of an adapter to a smaller rank by singular values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..formats.adapter import Adapter
from ..formats.keys import split
from ..formats.kohya import to_kohya
from ..formats.metadata import derived
from .difference import RELATIVE, Difference, file_tensors, limited
from .relative import Weights, differences

if TYPE_CHECKING:
    import torch


def resize(
    adapter: dict[str, torch.Tensor],
    rank: int,
    energy: float,
    device: str | torch.device = "cpu",
    tick: Callable[[int, int], None] = lambda done, total: None,
    weights: Weights | None = None,
) -> Adapter:
    """Turn every layer into a LoRA of limited rank. Layers that are small enough stay unchanged.

    Args:
        rank: maximum rank, 0 for no limit.
        energy: fraction of the squared singular values that each layer keeps, in 0..1 (kohya's sv_fro is its root).
        device: computes the singular values.
        tick: called with (layers done, layers in total).
        weights: returns the layers' values in the model; None if no model is connected.

    Raises:
        ModelError: a layer's difference depends on the model's weights, and no model is connected.
    """
    check(energy)
    given = differences(adapter, "adapter", weights)
    layers, _ = split(adapter)
    resized = {}
    for place, (name, change) in enumerate(given.items()):
        tick(place, len(given))
        if not _is_small(change, rank, energy):
            resized[name] = file_tensors(limited(change.to(device), rank, energy))
        elif name in layers and not RELATIVE.keys() & layers[name].keys():
            resized[name] = layers[name]
        else:
            resized[name] = file_tensors(change)
    tick(len(given), len(given))
    tensors = to_kohya(resized, str)
    ranks = {tensors[key].shape[0] for key in tensors if key.endswith(".lora_down.weight")}
    origin = {"tool": "resize", "rank": rank, "energy": energy}
    common = ranks.pop() if len(ranks) == 1 else None
    return Adapter(tensors, derived(origin, [getattr(adapter, "metadata", {})], common))


def check(energy: float) -> None:
    """Refuse an energy outside 0 < energy <= 1.

    Raises:
        SettingsError: naming the input.
    """
    if not 0 < energy <= 1:
        raise SettingsError(
            f"energy is {energy:g}; it is the fraction to keep, above 0 and at most 1.",
            "Set 1 to keep all that the rank allows, or 0.95.",
            "energy",
        )


def _is_small(given: Difference, rank: int, energy: float) -> bool:
    if given.shape is None or len(given.shape) < 2:
        return True
    fits = given.rank is not None and given.rank <= rank
    return energy == 1 and (rank == 0 or fits)
