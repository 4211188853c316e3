"""Learning-rate schedules, from diffusers where it has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Course:
    """The length and shape of a schedule.

    Attributes:
        warmup_steps: steps over which the rate rises from 0.
        steps: in total.
        num_cycles: for "cosine with restarts".
        power: for "polynomial".
    """

    warmup_steps: int
    steps: int
    num_cycles: int = 1
    power: float = 1.0


def _by_diffusers(name: str) -> Callable[[Course], Callable[[int], float]]:
    def make(course: Course) -> Callable[[int], float]:
        import torch
        from diffusers.optimization import get_scheduler

        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_scheduler(
            name,
            dummy,
            num_warmup_steps=course.warmup_steps,
            num_training_steps=course.steps,
            num_cycles=course.num_cycles,
            power=course.power,
        )
        return scheduler.lr_lambdas[0]

    return make


def _constant(course: Course) -> Callable[[int], float]:
    if course.warmup_steps:
        return _by_diffusers("constant_with_warmup")(course)
    # The most common schedule. Importing diffusers for it would delay the first step.
    return lambda step: 1.0


def _rex(course: Course) -> Callable[[int], float]:
    """Return the REX schedule: high for long, then falling fast to 0 (Chen et al. 2021).

    At progress p the factor is (1 - p) / (1/2 + (1 - p) / 2).
    """

    def factor(step: int) -> float:
        if step < course.warmup_steps:
            return step / course.warmup_steps
        left = 1 - (step - course.warmup_steps) / max(1, course.steps - course.warmup_steps)
        return max(0.0, left / (0.5 + 0.5 * left))

    return factor


# Keys are the names in the widget.
SCHEDULES: dict[str, Callable[[Course], Callable[[int], float]]] = {
    "constant": _constant,
    "linear": _by_diffusers("linear"),
    "cosine": _by_diffusers("cosine"),
    "cosine with restarts": _by_diffusers("cosine_with_restarts"),
    "polynomial": _by_diffusers("polynomial"),
    "REX": _rex,
}


def lr_factor(
    schedule: str, warmup_steps: int, steps: int, num_cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """Return the schedule's factor on the learning rate as a function of the step, counted from 0.

    It depends on the step alone, so a resumed run needs no state. After the last step it keeps the last step's value.
    """
    factor = SCHEDULES[schedule](Course(warmup_steps, max(1, steps), num_cycles, power))
    return lambda step: float(factor(min(step, max(0, steps - 1))))
