"""Optimizers, parameter groups, learning-rate schedules, averages and saved optimizer state."""

from .registry import OPTIMIZERS, default_learning_rate, finds_its_rate
from .schedules import SCHEDULES, ScheduleShape, lr_factor
from .state import Group, parameter_groups, restore_optimizer, state_of

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Group",
    "ScheduleShape",
    "default_learning_rate",
    "finds_its_rate",
    "lr_factor",
    "parameter_groups",
    "restore_optimizer",
    "state_of",
]
