"""An optimizer's parameter groups, and its state as numbers and tensors by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


# Fields that the recipe and the schedule set at each start.
_SET_AT_START = {"params", "lr", "weight_decay"}


# Ending of a matrix in a list that is kept transposed.
_TURNED = "/t"


def state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return the state of an optimizer.

    Returns:
        Per parameter, by its index over all groups, {name: tensor or number}. Per group, the numbers that differ from
        the values it was made with (Prodigy's rate, schedule-free's weights, counts of steps).
    """
    # Not `state_dict`: bitsandbytes packs tensors into nested dicts there.
    slots = {}
    for place, parameter in enumerate(_parameters(optimizer)):
        if optimizer.state.get(parameter):
            slots[place] = _flat(optimizer.state[parameter])
    groups = []
    for group in optimizer.param_groups:
        groups.append({name: value for name, value in group.items() if _changed(name, value, optimizer.defaults)})
    return slots, groups


def _flat(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state with each list of tensors (SOAP) as `name/count` and `name/index`; empty entries are left out.

    A tuple of numbers (axes of a factored moment) has `name/length` in place of the count.
    """
    flat = {}
    for name, value in state.items():
        if isinstance(value, tuple):
            flat |= {f"{name}/length": len(value), **{f"{name}/{place}": entry for place, entry in enumerate(value)}}
        elif isinstance(value, list):
            flat[f"{name}/count"] = len(value)
            for place, entry in enumerate(value):
                if len(entry):
                    # A file loses the order of the axes in memory, and with it the last bits of a product.
                    is_turned = entry.dim() == 2 and not entry.is_contiguous() and entry.t().is_contiguous()
                    flat[f"{name}/{place}{_TURNED * is_turned}"] = entry.t() if is_turned else entry
        else:
            flat[name] = value
    return flat


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return the state that `_flat` was made of."""
    state = {name: value for name, value in flat.items() if "/" not in name}
    for name in [name.removesuffix("/count") for name in flat if name.endswith("/count")]:
        state[name] = [_entry(flat, f"{name}/{place}") for place in range(flat[f"{name}/count"])]
    for name in [name.removesuffix("/length") for name in flat if name.endswith("/length")]:
        state[name] = tuple(flat[f"{name}/{place}"] for place in range(flat[f"{name}/length"]))
    return state


def _entry(flat: dict[str, Any], name: str) -> Any:
    return flat[name + _TURNED].t() if name + _TURNED in flat else flat.get(name, [])


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
    state = {place: _nested(held) for place, held in slots.items()}
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})
    # torch casts all to the parameter's dtype, but Prodigy Plus computes with sums in bf16.
    parameters = _parameters(optimizer)
    for place, held in state.items():
        loaded = optimizer.state[parameters[place]]
        for name, value in held.items():
            if getattr(value, "dtype", None) != getattr(loaded[name], "dtype", None):
                loaded[name] = value.to(loaded[name].device)


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
