"""Trees that stay prepared, with their trainables, while their run waits for its return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..lowrank.layers import SharedInput, low_rank_layers
from ..recipe.options import AS_IT_IS

if TYPE_CHECKING:
    from torch import nn

    from ..protocols import Host
    from ..steps.plan import Plan


@dataclass(frozen=True)
class Kept:
    """Trainables of a kept tree. The values of the run's last save replace theirs, as in a new tree.

    Attributes:
        layers: number of layers that they were added to.
        block_count: number of checkpointed blocks.
    """

    trainables: dict[str, nn.Parameter]
    layers: int
    block_count: int


def keep_tree(host: Host, plan: Plan, key: Any, kept: Kept) -> None:
    """Let the host keep the tree of a training that ends by an exception, if it trains one tree, whole in memory."""
    recipe = plan.recipe
    is_whole = recipe.offload != "on" and recipe.base_dtype == AS_IT_IS and host.group.world_size == 1
    if host.keeper is None or recipe.live_text or not is_whole:
        return
    for parameter in kept.trainables.values():
        parameter.grad = None
    for layer in low_rank_layers(host.denoiser.module).values():
        # Groups of layers hold the last step's tensors.
        SharedInput([layer])
    host.keeper.keep(key, kept)


def take_tree(host: Host, key: Any, step: int) -> Kept | None:
    """Let the host bring back the tree of a run that continues from a step; return None if it has none."""
    return host.keeper.take(key) if host.keeper is not None and step else None
