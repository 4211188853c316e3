"""Optimizer state as numbers and tensors that a file can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Fields that the recipe and the schedule set at each start.
_SET_AT_START = {"params", "lr", "weight_decay"}


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return the state of an optimizer.

    Returns:
        Per parameter, by its index over all groups, {name: tensor or number}. Per group, the numbers that differ from
        the values it was made with (Prodigy's rate, schedule-free's weights, counts of steps).
    """
    # Not `state_dict`: bitsandbytes packs tensors into nested dicts there.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = {}
    for place, parameter in enumerate(parameters):
        if optimizer.state.get(parameter):
            slots[place] = dict(optimizer.state[parameter])
    groups = []
    for group in optimizer.param_groups:
        groups.append({name: value for name, value in group.items() if _changed(name, value, optimizer.defaults)})
    return slots, groups


def _changed(name: str, value: Any, defaults: dict[str, Any]) -> bool:
    if name in _SET_AT_START or not isinstance(value, (bool, int, float)):
        return False
    return name not in defaults or value != defaults[name]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """Restore a state from `state_of` into a new optimizer.

    Args:
        slots: state per parameter.
        groups: empty in old files, written when AdamW was the only optimizer, which needs none.
    """
    param_groups = optimizer.state_dict()["param_groups"]
    for group, kept in zip(param_groups, groups, strict=False):
        group.update(kept)
    optimizer.load_state_dict({"state": slots, "param_groups": param_groups})
