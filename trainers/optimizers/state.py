"""An optimiser's whole state, as numbers and tensors that a file can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What the recipe and the schedule set, anew at each start.
_GIVEN = {"params", "lr", "weight_decay"}


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """What an optimiser has come to know.

    Returns:
        Of each parameter, by its place in the groups, {name: tensor or number}; and of each group the numbers that
        are no longer as it was made with (Prodigy's rate, schedule-free's weights, counts of steps).
    """
    # Not its state_dict: bitsandbytes packs tensors into dicts of its own there.
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
    if name in _GIVEN or not isinstance(value, (bool, int, float)):
        return False
    return name not in defaults or value != defaults[name]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]]
) -> None:
    """Gives a newly made optimiser what `state_of` found.

    Args:
        groups: empty in files of before they were kept; AdamW, the only optimiser there was, needs none.
    """
    made = optimizer.state_dict()["param_groups"]
    for group, kept in zip(made, groups, strict=False):
        group.update(kept)
    optimizer.load_state_dict({"state": slots, "param_groups": made})
