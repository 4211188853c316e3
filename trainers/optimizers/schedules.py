"""Learning-rate schedules: factors on the learning rate as functions of the step, without state.

The schedules that diffusers or transformers has too give the same values to the last bit. These and torch make them
around an optimizer only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..recipe.options import FALLING

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe

# The inverse square root schedule falls from here if there is no warm-up, as in transformers.
_TIMESCALE = 10_000
# The polynomial schedule ends at this factor.
_POLYNOMIAL_END = 1e-7


@dataclass(frozen=True)
class ScheduleShape:
    """The length and shape of a schedule.

    Attributes:
        warmup_steps: steps over which the rate rises from 0.
        steps: in total.
        num_cycles: for "cosine with restarts".
        power: for "polynomial".
        decay_ratio: part of the steps in which "warmup-stable-decay" falls, 0..1.
        points: for "points": (step, factor) pairs, ascending.
        min_lr_ratio: factor at which a falling schedule ends.
    """

    warmup_steps: int
    steps: int
    num_cycles: int = 1
    power: float = 1.0
    decay_ratio: float = 0.2
    points: tuple[tuple[int, float], ...] = ()
    min_lr_ratio: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> ScheduleShape:
        """Return the shape of a recipe's schedule."""
        return cls(
            recipe.warmup_steps or round(recipe.warmup_ratio * recipe.steps),
            recipe.steps,
            recipe.num_cycles,
            recipe.power,
            recipe.decay_ratio,
            recipe.schedule_points,
            recipe.min_lr_ratio,
        )

    @property
    def length(self) -> int:
        """Return the number of steps after the warm-up."""
        return max(1, self.steps - self.warmup_steps)

    def progress(self, step: int) -> float:
        """Return the progress from 0 to 1 after the warm-up."""
        return (step - self.warmup_steps) / self.length


def _constant(shape: ScheduleShape, step: int) -> float:
    return 1.0


def _linear(shape: ScheduleShape, step: int) -> float:
    return (shape.steps - step) / shape.length


def _cosine(shape: ScheduleShape, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * shape.progress(step)))


def _cosine_with_restarts(shape: ScheduleShape, step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * (shape.num_cycles * shape.progress(step) % 1.0)))


def _polynomial(shape: ScheduleShape, step: int) -> float:
    return (1 - _POLYNOMIAL_END) * (1 - shape.progress(step)) ** shape.power + _POLYNOMIAL_END


def _rex(shape: ScheduleShape, step: int) -> float:
    """Return the REX schedule: high for long, then falling fast to 0 (Chen et al. 2021).

    At progress p the factor is (1 - p) / (1/2 + (1 - p) / 2).
    """
    left = 1 - shape.progress(step)
    return left / (0.5 + 0.5 * left)


def _warmup_stable_decay(shape: ScheduleShape, step: int) -> float:
    """Return 1, and in the last steps a fall along a cosine (Hu et al. 2024, "MiniCPM")."""
    decay = max(1, round(shape.decay_ratio * shape.steps))
    start = max(shape.warmup_steps, shape.steps - decay)
    return 1.0 if step < start else 0.5 * (1 + math.cos(math.pi * (step - start) / decay))


def _inverse_square_root(shape: ScheduleShape, step: int) -> float:
    """Return the fall with the root of the step after the warm-up (Vaswani et al. 2017; Zhai et al. 2022)."""
    timescale = shape.warmup_steps or _TIMESCALE
    return 1 / math.sqrt((step + timescale - shape.warmup_steps) / timescale)


def _points(shape: ScheduleShape, step: int) -> float:
    """Return the line between the points around a step."""
    before, after = shape.points[0], shape.points[-1]
    for point in shape.points:
        if point[0] > step:
            after = point
            break
        before = point
    if step <= before[0] or before[0] >= after[0]:
        return before[1]
    return before[1] + (after[1] - before[1]) * (step - before[0]) / (after[0] - before[0])


# Keys are the names in the widget. The functions give the factor after the warm-up.
SCHEDULES: dict[str, Callable[[ScheduleShape, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine with restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "REX": _rex,
    "warmup-stable-decay": _warmup_stable_decay,
    "inverse square root": _inverse_square_root,
    "points": _points,
}


def lr_factor(schedule: str, shape: ScheduleShape) -> Callable[[int], float]:
    """Return the schedule's factor on the learning rate as a function of the step, counted from 0.

    It depends on the step alone, so a resumed run needs no state. After the last step it keeps the last step's value.
    """
    after_warmup = SCHEDULES[schedule]
    least = shape.min_lr_ratio if schedule in FALLING else 0.0

    def factor(step: int) -> float:
        step = min(step, max(1, shape.steps) - 1)
        if step < shape.warmup_steps:
            return step / shape.warmup_steps
        value = after_warmup(shape, step)
        return value * (1 - least) + least if least else value

    return factor
