"""Fingerprints of what arrives over a graph's wires: weights by strided samples, everything else by value."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

_SAMPLES = 32


def patcher_digest(patcher: ModelPatcher) -> str:
    """Hash of a patcher's base and of all that waits on it: patches with strengths, object patches, options."""
    total = hashlib.sha256()
    for name, weight in _base_weights(patcher):
        total.update(name.encode())
        total.update(_sample(weight))
    patches = {name: patcher.patches[name] for name in sorted(patcher.patches)}
    _feed(total, patches)
    _feed(total, {name: patcher.object_patches[name] for name in sorted(patcher.object_patches)})
    _feed(total, patcher.model_options)
    return total.hexdigest()


def module_digest(module: torch.nn.Module) -> str:
    """Hash of a module's keys, shapes, dtypes and sampled weights."""
    total = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        total.update(name.encode())
        total.update(_sample(weight))
    return total.hexdigest()


def _base_weights(patcher: ModelPatcher):
    """Name and value of each weight as it was loaded, also while patches are applied in place."""
    backup = patcher.backup
    for name, weight in sorted(patcher.model.state_dict().items()):
        kept = backup.get(name)
        yield name, (weight if kept is None else kept.weight)


def _sample(tensor: torch.Tensor) -> bytes:
    import torch

    head = f"{tuple(tensor.shape)}|{tensor.dtype}|".encode()
    if tensor.numel() == 0 or tensor.is_meta:
        return head
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return head + flat[::step][:_SAMPLES].to("cpu", torch.float32).numpy().tobytes()


def _feed(total, value: Any, depth: int = 0) -> None:
    """Adds any value to a hash: by content where that is stable, by type where it is not."""
    import torch

    if depth > 8:
        return
    if torch.is_tensor(value):
        total.update(_sample(value))
    elif isinstance(value, dict):
        for name in sorted(value, key=str):
            total.update(str(name).encode())
            _feed(total, value[name], depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)):
        total.update(f"{len(value)}[".encode())
        for part in value if isinstance(value, (list, tuple)) else sorted(value, key=str):
            _feed(total, part, depth + 1)
    elif isinstance(value, (str, int, float, bool, bytes, type(None), torch.dtype)):
        total.update(repr(value).encode())
    elif isinstance(value, torch.nn.Module):
        total.update("|".join(kind.__name__ for kind in type(value).__mro__).encode())
        _feed(total, {n: v for n, v in vars(value).items() if isinstance(v, (int, float, str, bool))}, depth + 1)
        _feed(total, dict(value.state_dict()), depth + 1)
    else:
        total.update(getattr(value, "__qualname__", type(value).__qualname__).encode())
        weights = getattr(value, "weights", None)
        if weights is not None:
            _feed(total, weights, depth + 1)
