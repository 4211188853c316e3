"""Fingerprints of what arrives over a graph's wires: weights by strided samples, everything else by value.

They must be the same in another process and whatever the host has loaded meanwhile, so nothing is hashed by
address, and what a clone's patches have put in place on the shared model is seen through.
"""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from comfy.model_patcher import ModelPatcher

_SAMPLES = 32
_SAMPLING = "model_sampling"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)

# What waits on a patcher and changes what its model answers.
_WAITING = ("patches", "object_patches", "model_options", "wrappers", "weight_wrapper_patches", "injections")


def patcher_digest(patcher: ModelPatcher, idle: Collection[str] = ()) -> str:
    """Hash of a patcher's base and of all that waits on it: patches with strengths, object patches, options.

    Args:
        idle: weights that decide nothing.
    """
    total = hashlib.sha256()
    for name, weight in _base_weights(patcher):
        if name in idle:
            continue
        total.update(name.encode())
        total.update(_sample(weight))
    seen: dict[int, Any] = {}
    if hasattr(patcher.model, _SAMPLING):
        _feed(total, _sampling_of(patcher), seen)
    for name in _WAITING:
        total.update(name.encode())
        _feed(total, getattr(patcher, name, None), seen)
    for name, patchers in sorted(getattr(patcher, "additional_models", {}).items()):
        total.update(name.encode())
        for other in patchers:
            total.update(patcher_digest(other).encode())
    return total.hexdigest()


def module_digest(module: torch.nn.Module) -> str:
    """Hash of a module's keys, shapes, dtypes and sampled weights."""
    total = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(_sample(weight))
    return total.hexdigest()


def _base_weights(patcher: ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and value of each weight as it was loaded, also while a clone's patches are applied in place."""
    backup = patcher.backup
    for name, weight in sorted(patcher.model.state_dict().items()):
        # The sampling object is swapped on the shared model while a clone that patches it is loaded.
        if name.startswith(f"{_SAMPLING}."):
            continue
        kept = backup.get(name)
        yield name, (weight if kept is None else kept.weight)


def _sampling_of(patcher: ModelPatcher) -> Any:
    """The patcher's own sampling object, though a clone's may sit on the shared model now."""
    if _SAMPLING in patcher.object_patches:
        return patcher.object_patches[_SAMPLING]
    if _SAMPLING in patcher.object_patches_backup:
        return patcher.object_patches_backup[_SAMPLING]
    return patcher.model.model_sampling


def _sample(tensor: torch.Tensor) -> bytes:
    head = f"{tuple(tensor.shape)}|{tensor.dtype}|".encode()
    if tensor.numel() == 0 or tensor.is_meta:
        return head
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return head + flat[::step][:_SAMPLES].to("cpu", torch.float32).numpy().tobytes()


def _feed(total, value: Any, seen: dict[int, Any]) -> None:
    """Adds any value to a hash by its content, never by its address; what was met before counts once.

    Args:
        seen: what was met, by identity; it holds the values so that no identity is given to another one meanwhile.
    """
    if isinstance(value, _PLAIN):
        total.update(f"{type(value).__name__}:{value!r};".encode())
        return
    if torch.is_tensor(value):
        total.update(_sample(value))
        return
    total.update(_kind(value).encode())
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, dict):
        for name in sorted(value, key=str):
            total.update(f"{name}=".encode())
            _feed(total, value[name], seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        total.update(f"{len(value)}[".encode())
        for part in value if isinstance(value, (list, tuple)) else sorted(value, key=str):
            _feed(total, part, seen)
    else:
        _feed(total, _parts(value), seen)


def _kind(value: Any) -> str:
    """A name that says what a value is: its own for functions and classes, its classes' for the rest."""
    own = getattr(value, "__qualname__", None)
    if own is not None:
        return f"{getattr(value, '__module__', '')}.{own}"
    return "|".join(kind.__qualname__ for kind in type(value).__mro__)


def _parts(value: Any) -> list:
    """What of an object decides what it does: a function's defaults and closure, an object's own fields."""
    if isinstance(value, torch.nn.Module):
        return [_fields(value), dict(value.state_dict())]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if hasattr(value, "__func__"):
        return [value.__func__, _fields(value.__self__)]
    if hasattr(value, "__code__"):
        return [value.__defaults__, value.__kwdefaults__, _closure(value)]
    return [_fields(value)]


def _closure(function) -> list:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:
            # A name that is bound only later.
            continue
    return found


def _fields(value: Any) -> dict[str, Any]:
    """Fields that are plain, tensors, or containers; others may hold the host's own moving parts."""
    kept = (*_PLAIN, torch.Tensor, list, tuple, dict)
    return {name: field for name, field in getattr(value, "__dict__", {}).items() if isinstance(field, kept)}
