"""The optimisers and the learning-rate schedules, one registry each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..settings import Recipe


@dataclass(frozen=True)
class Group:
    """Trainables that are moved alike.

    Attributes:
        names: in the order in which the optimiser holds them.
        learning_rate: before the schedule's factor.
        weight_decay: None for the recipe's.
        until: the step at which they are frozen; None for never.
    """

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float | None = None
    until: int | None = None


def parameter_groups(groups: Sequence[Group], trainables: dict[str, torch.nn.Parameter], recipe: Recipe) -> list[dict]:
    """The groups as torch's optimisers take them."""
    made = []
    for group in groups:
        decay = recipe.weight_decay if group.weight_decay is None else group.weight_decay
        parameters = [trainables[name] for name in group.names]
        made.append({"params": parameters, "lr": group.learning_rate, "weight_decay": decay})
    return made


def _adamw(groups: list[dict], recipe: Recipe) -> torch.optim.Optimizer:
    import torch

    values = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    try:
        # One kernel for all parameters instead of a dozen each.
        return torch.optim.AdamW(groups, **values, fused=True)
    except RuntimeError:
        # Not on every device, nor in every version of torch.
        return torch.optim.AdamW(groups, **values)


# Each makes an optimiser of `parameter_groups` and a recipe.
OPTIMISERS: dict[str, Callable] = {"AdamW": _adamw}

# diffusers' names; the widget shows the left ones.
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine with restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
}


def lr_factor(schedule: str, warmup_steps: int, steps: int) -> Callable[[int], float]:
    """The schedule's factor on the learning rate, by step from 0; diffusers' own function.

    It is a function of the step alone, so resuming needs none of its state. Past the last step it keeps the
    last step's value.
    """
    import torch
    from diffusers.optimization import get_scheduler

    dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        SCHEDULES[schedule], dummy, num_warmup_steps=warmup_steps, num_training_steps=max(1, steps)
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(factor(min(step, max(0, steps - 1))))
