"""Fingerprints of what arrives over a graph's wires: weights by checksums of all numbers, everything else by value.

They must be the same in another process and whatever the host has loaded meanwhile, so nothing is hashed by
address, and what a clone's patches have put in place on the shared model is seen through.

Versions before sampled 32 numbers of each weight. Their fingerprints are still computed: files that those versions made
are found by them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .checksums import module_checksums, tensor_checksum

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from comfy.model_patcher import ModelPatcher

_SAMPLES = 32
_SAMPLING = "model_sampling"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)

# What waits on a patcher and changes what its model answers.
_WAITING = ("patches", "object_patches", "model_options", "wrappers", "weight_wrapper_patches", "injections")


@dataclass(frozen=True)
class _Reading:
    """The way from weights to what stands for them in a hash.

    Attributes:
        weights: of some of a module's weights, by name and in their order.
        tensor: of one that is no module's.
        module: of all weights of a module.
    """

    weights: Callable[[torch.nn.Module, list[tuple[str, torch.Tensor]]], dict[str, bytes]]
    tensor: Callable[[torch.Tensor], bytes]
    module: Callable[[torch.nn.Module], dict[str, Any]]


def patcher_digest(patcher: ModelPatcher, idle: Collection[str] = ()) -> str:
    """Hash of a patcher's base and of all that waits on it: patches with strengths, object patches, options.

    Args:
        idle: weights that decide nothing.
    """
    return _patcher_digest(patcher, idle, _WHOLE)


def sampled_patcher_digest(patcher: ModelPatcher, idle: Collection[str] = ()) -> str:
    """The same as versions before computed it, of samples."""
    return _patcher_digest(patcher, idle, _SAMPLED)


def _patcher_digest(patcher: ModelPatcher, idle: Collection[str], reading: _Reading) -> str:
    total = hashlib.sha256()
    weights = [(name, weight) for name, weight in _base_weights(patcher) if name not in idle]
    for name, content in reading.weights(patcher.model, weights).items():
        total.update(name.encode())
        total.update(content)
    seen: dict[int, Any] = {}
    if hasattr(patcher.model, _SAMPLING):
        _feed(total, _sampling_of(patcher), seen, reading)
    for name in _WAITING:
        total.update(name.encode())
        _feed(total, getattr(patcher, name, None), seen, reading)
    for name, patchers in sorted(getattr(patcher, "additional_models", {}).items()):
        total.update(name.encode())
        for other in patchers:
            total.update(_patcher_digest(other, (), reading).encode())
    return total.hexdigest()


def module_digest(module: torch.nn.Module) -> str:
    """Hash of a module's keys, shapes, dtypes and weights."""
    return _module_digest(module, _WHOLE)


def sampled_module_digest(module: torch.nn.Module) -> str:
    """The same as versions before computed it, of samples."""
    return _module_digest(module, _SAMPLED)


def _module_digest(module: torch.nn.Module, reading: _Reading) -> str:
    total = hashlib.sha256()
    for name, content in reading.weights(module, sorted(module.state_dict().items())).items():
        total.update(name.encode())
        total.update(content)
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


def _samples(module: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]) -> dict[str, bytes]:
    return {name: _sample(weight) for name, weight in weights}


def _sample(tensor: torch.Tensor) -> bytes:
    head = f"{tuple(tensor.shape)}|{tensor.dtype}|".encode()
    if tensor.numel() == 0 or tensor.is_meta:
        return head
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return head + flat[::step][:_SAMPLES].to("cpu", torch.float32).numpy().tobytes()


def _feed(total, value: Any, seen: dict[int, Any], reading: _Reading) -> None:
    """Adds any value to a hash by its content, never by its address; what was met before counts once.

    Args:
        seen: what was met, by identity; it holds the values so that no identity is given to another one meanwhile.
    """
    if isinstance(value, _PLAIN):
        total.update(f"{type(value).__name__}:{value!r};".encode())
        return
    if torch.is_tensor(value):
        total.update(reading.tensor(value))
        return
    total.update(_kind(value).encode())
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, dict):
        for name in sorted(value, key=str):
            total.update(f"{name}=".encode())
            _feed(total, value[name], seen, reading)
    elif isinstance(value, (list, tuple, set, frozenset)):
        total.update(f"{len(value)}[".encode())
        for part in value if isinstance(value, (list, tuple)) else sorted(value, key=str):
            _feed(total, part, seen, reading)
    else:
        _feed(total, _parts(value, reading), seen, reading)


def _kind(value: Any) -> str:
    """A name that says what a value is: its own for functions and classes, its classes' for the rest."""
    own = getattr(value, "__qualname__", None)
    if own is not None:
        return f"{getattr(value, '__module__', '')}.{own}"
    return "|".join(kind.__qualname__ for kind in type(value).__mro__)


def _parts(value: Any, reading: _Reading) -> list:
    """What of an object decides what it does: a function's defaults and closure, an object's own fields."""
    if isinstance(value, torch.nn.Module):
        return [_fields(value), reading.module(value)]
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


def _module_checksums(module: torch.nn.Module) -> dict[str, bytes]:
    return module_checksums(module, module.state_dict().items())


_WHOLE = _Reading(module_checksums, tensor_checksum, _module_checksums)
_SAMPLED = _Reading(_samples, _sample, lambda module: dict(module.state_dict()))
