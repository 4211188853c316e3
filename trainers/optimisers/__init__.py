"""The optimisers and the learning-rate schedules, one registry each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..settings import Recipe


def _adamw(parameters: list[torch.nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    import torch

    values = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    try:
        # One kernel for all parameters instead of a dozen each.
        return torch.optim.AdamW(parameters, **values, fused=True)
    except RuntimeError:
        # Not on every device, nor in every version of torch.
        return torch.optim.AdamW(parameters, **values)


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
