"""Saved training states: files that are written atomically and validated strictly when read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import RunError
from ..formats import files, json_files
from .loss_by_picture import LossByPicture
from .loss_by_timestep import LossByTimestep

if TYPE_CHECKING:
    import torch

_VERSION = 1

# JSON fields of a state file. Code below must write and read every field that is listed here.
_FIELDS = {"version", "step", "batches", "losses", "validation", "optimiser", "groups", "scaler", "frozen", "levels"}
_FIELDS |= {"ema_updates", "pictures"}


@dataclass
class State:
    """Complete state of training. A run resumed from it gives the same bits as an uninterrupted run.

    Noise, sample order and timesteps are functions of seed and step, so the state does not hold them.

    Attributes:
        batches: number of batches drawn so far.
        trainables: values of trained tensors by name.
        ema: their exponential moving averages by name; empty without EMA.
        ema_updates: number of updates of the average; None without EMA and in files of earlier versions.
        constants: untrained tensors that were drawn at the start, by name.
        optimizer: the optimizer's state per parameter index: {index: {name: tensor or number}}.
        groups: per parameter group of the optimizer, the numbers that training changed; empty in older files.
        scaler: state of the fp16 loss scaler, empty without fp16.
        frozen: names of trainables that were frozen before the end of the run.
        loss_by_timestep: loss by timestep; it lacks the steps that older files did not record.
        loss_by_picture: loss by picture; likewise.
    """

    step: int = 0
    batches: int = 0
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    trainables: dict[str, torch.Tensor] = field(default_factory=dict)
    ema: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[int, dict[str, Any]] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    scaler: dict[str, float] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    loss_by_timestep: LossByTimestep = field(default_factory=LossByTimestep)
    ema_updates: int | None = None
    loss_by_picture: LossByPicture = field(default_factory=LossByPicture)


def write_state(path: str, state: State) -> None:
    """Write a state atomically, as a safetensors file that keeps everything but tensors in its metadata.

    Args:
        state: its tensors may also be `WholeTensor`s, which are gathered one after the other.
    """
    tensors = {}
    for group in ("trainables", "ema", "constants"):
        for name, tensor in getattr(state, group).items():
            tensors[f"{group}/{name}"] = tensor
    numbers: dict[str, dict[str, Any]] = {}
    for index, slots in state.optimizer.items():
        for name, value in slots.items():
            if hasattr(value, "shape"):
                tensors[f"optimiser/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    plain = {
        "version": _VERSION,
        "step": state.step,
        "batches": state.batches,
        "losses": state.losses,
        "validation": state.validation,
        "optimiser": numbers,
        "groups": state.groups,
        "scaler": state.scaler,
        "frozen": state.frozen,
        "levels": state.loss_by_timestep.as_json(),
        "pictures": state.loss_by_picture.as_json(),
    }
    if state.ema_updates is not None:
        plain["ema_updates"] = state.ema_updates
    files.write_tensors(path, tensors, {"state": json.dumps(plain)})


def read_state(path: str, step: int) -> State:
    """Read a state from a file.

    Args:
        step: the step in the file's name.

    Raises:
        RunError: the file has another version, is damaged, or holds another step.
    """
    tensors, metadata = files.read_tensors(path, strict=True)
    try:
        if metadata.keys() != {"state"}:
            # An unknown key may be the checksums under a damaged name.
            raise ValueError(f"its metadata has the keys {sorted(metadata)!r:.100}")
        plain = json_files.parse_json(metadata["state"])
        if plain["version"] != _VERSION:
            raise RunError(
                f"The state '{path}' has the unknown version {plain['version']!r:.40}.", "Start the run over."
            )
        _check_plain(plain, step)
        state = _state_of(plain)
        _add_tensors(state, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"The state '{path}' is damaged ({error!r:.200}).", "Remove it.") from error
    return state


def _state_of(plain: dict) -> State:
    return State(
        step=plain["step"],
        batches=plain["batches"],
        losses=[float(loss) for loss in plain["losses"]],
        validation=[(int(step), float(loss)) for step, loss in plain["validation"]],
        optimizer={int(index): _numbers_in(slots) for index, slots in plain["optimiser"].items()},
        groups=[_numbers_in(group) for group in plain.get("groups", [])],
        scaler=_numbers_in(plain["scaler"]),
        frozen=[str(name) for name in plain.get("frozen", [])],
        loss_by_timestep=LossByTimestep.of_json(plain["levels"]) if "levels" in plain else LossByTimestep(),
        ema_updates=plain.get("ema_updates"),
        loss_by_picture=LossByPicture.of_json(plain.get("pictures", {})),
    )


def _add_tensors(state: State, tensors: dict[str, torch.Tensor]) -> None:
    """Put a file's tensors where their names say. Raise ValueError for values that are not finite and other names."""
    for name, tensor in tensors.items():
        group, _, rest = name.partition("/")
        if group == "optimiser":
            index, _, slot = rest.partition("/")
            state.optimizer.setdefault(int(index), {})[slot] = tensor
        elif group in ("trainables", "ema", "constants"):
            if not files.is_finite(tensor):
                raise ValueError(f"{name} is not finite")
            getattr(state, group)[rest] = tensor
        else:
            raise ValueError(f"{name} does not belong to a state")


def _check_plain(plain: dict, step: int) -> None:
    unknown = plain.keys() - _FIELDS
    if unknown:
        raise ValueError(f"it has the unknown field {min(unknown)}")
    if type(plain["step"]) is not int or plain["step"] != step:
        raise ValueError(f"its step is {plain['step']!r:.40}")
    if type(plain["batches"]) is not int or plain["batches"] < 0:
        raise ValueError("its 'batches' is not a number")
    updates = plain.get("ema_updates", 0)
    if type(updates) is not int or not 0 <= updates <= step:
        raise ValueError(f"its ema_updates is {updates!r:.40}")


def _numbers_in(values: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a dict of numbers. Raise ValueError for other values and for keys that only the recipe sets."""
    plain = all(value is None or isinstance(value, (bool, int, float)) for value in values.values())
    if not plain or values.keys() & {"params", "lr"}:
        raise ValueError("a field with other values than numbers by name")
    return dict(values)
