"""An adapter of smaller rank: of each layer the part that holds most of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..formats.adapter import Adapter
from ..formats.keys import split
from ..formats.kohya import to_kohya
from ..formats.metadata import derived
from .difference import Difference, differences, file_tensors, limited

if TYPE_CHECKING:
    import torch


def resize(
    adapter: dict[str, torch.Tensor],
    rank: int,
    energy: float,
    device: str | torch.device = "cpu",
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Adapter:
    """Every layer as a LoRA of at most a rank, by singular values; those that are small enough stay as they are.

    Args:
        rank: 0 for no limit.
        energy: part of the squared singular values that a layer keeps, in 0..1 (kohya's sv_fro is its root).
        device: where singular values are worked out.
        tick: told of (layers done, layers there are).

    Raises:
        ModelError: a layer's difference is not known without the model's weights.
    """
    check(energy)
    given = differences(adapter, "adapter")
    layers, _ = split(adapter)
    found = {}
    for place, (name, one) in enumerate(given.items()):
        tick(place, len(given))
        if _is_small(one, rank, energy):
            found[name] = layers[name]
        else:
            found[name] = file_tensors(limited(one.to(device), rank, energy))
    tick(len(given), len(given))
    tensors = to_kohya(found, str)
    ranks = {tensors[key].shape[0] for key in tensors if key.endswith(".lora_down.weight")}
    made = {"tool": "resize", "rank": rank, "energy": energy}
    common = ranks.pop() if len(ranks) == 1 else None
    return Adapter(tensors, derived(made, [getattr(adapter, "metadata", {})], common))


def check(energy: float) -> None:
    """Refuses an energy that keeps nothing."""
    if not 0 < energy <= 1:
        raise SettingsError(
            f"energy is {energy:g}; it is the part that is kept, above 0 and at most 1.",
            "Set 1 to keep all that the rank allows, or 0.95.",
            "energy",
        )


def _is_small(given: Difference, rank: int, energy: float) -> bool:
    """Whether there is nothing to take away."""
    if given.shape is None or len(given.shape) < 2:
        return True
    fits = given.rank is not None and given.rank <= rank
    return energy == 1 and (rank == 0 or fits)
