"""Learning-rate schedules: factors on the learning rate as functions of the step, without state.

The schedules that diffusers has too give the same values to the last bit. diffusers and torch make them around an
optimizer only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# The polynomial schedule ends at this factor.
_LEAST = 1e-7


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

    @property
    def length(self) -> int:
        """Return the number of steps after the warm-up."""
        return max(1, self.steps - self.warmup_steps)

    def progress(self, step: int) -> float:
        """Return the progress from 0 to 1 after the warm-up."""
        return (step - self.warmup_steps) / self.length


def _constant(course: Course, step: int) -> float:
    return 1.0


def _linear(course: Course, step: int) -> float:
    return (course.steps - step) / course.length


def _cosine(course: Course, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * course.progress(step)))


def _cosine_with_restarts(course: Course, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (course.num_cycles * course.progress(step) % 1.0)))


def _polynomial(course: Course, step: int) -> float:
    return (1 - _LEAST) * (1 - course.progress(step)) ** course.power + _LEAST


def _rex(course: Course, step: int) -> float:
    """Return the REX schedule: high for long, then falling fast to 0 (Chen et al. 2021).

    At progress p the factor is (1 - p) / (1/2 + (1 - p) / 2).
    """
    left = 1 - course.progress(step)
    return left / (0.5 + 0.5 * left)


# Keys are the names in the widget. The functions give the factor after the warm-up.
SCHEDULES: dict[str, Callable[[Course, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine with restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "REX": _rex,
}


def lr_factor(
    schedule: str, warmup_steps: int, steps: int, num_cycles: int = 1, power: float = 1.0
) -> Callable[[int], float]:
    """Return the schedule's factor on the learning rate as a function of the step, counted from 0.

    It depends on the step alone, so a resumed run needs no state. After the last step it keeps the last step's value.
    """
    course = Course(warmup_steps, max(1, steps), num_cycles, power)
    after_warmup = SCHEDULES[schedule]

    def factor(step: int) -> float:
        step = min(step, course.steps - 1)
        return step / warmup_steps if step < warmup_steps else after_warmup(course, step)

    return factor
