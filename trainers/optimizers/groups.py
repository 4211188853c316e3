"""Parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Trainables with the same learning rate and weight decay.

    Attributes:
        names: in the order in which the optimizer holds them.
        learning_rate: before the schedule's factor.
        weight_decay: None for the recipe's.
        until: the step at which the group is frozen, None for never.
    """

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float | None = None
    until: int | None = None


def parameter_groups(groups: Sequence[Group], trainables: dict[str, torch.nn.Parameter], recipe: Recipe) -> list[dict]:
    """Return the groups as torch's optimizers take them."""
    rows = []
    for group in groups:
        decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
        parameters = [trainables[name] for name in group.names]
        rows.append({"params": parameters, "lr": group.learning_rate, "weight_decay": decay})
    return rows
