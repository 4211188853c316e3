"""How trainables are moved: groups of them, the optimisers, the learning-rate schedules, and what resuming needs."""

from .groups import Group, parameter_groups
from .registry import OPTIMISERS, default_learning_rate, finds_its_rate
from .schedules import SCHEDULES, lr_factor
from .state import restore_optimiser, state_of

__all__ = [
    "OPTIMISERS",
    "SCHEDULES",
    "Group",
    "default_learning_rate",
    "finds_its_rate",
    "lr_factor",
    "parameter_groups",
    "restore_optimiser",
    "state_of",
]
