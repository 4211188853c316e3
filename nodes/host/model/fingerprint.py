"""Fingerprints of a graph's inputs: checksums of whole weights, and the values of everything else.

A fingerprint must be the same in another process, whatever ComfyUI has loaded meanwhile. So no address is hashed, and
patches that a clone has applied to the shared model do not count.

A model of 2 GB takes seconds. So a checksum is cached by module and weight name, or by the tensor itself. It is valid
while the tensor has the same memory and nothing wrote to it. ComfyUI moves weights between devices, and swaps patched
weights in and out. Then a sum of all numbers, several times as fast, decides whether the weights are the same.

Earlier versions sampled 32 numbers of each weight. Their fingerprints are still computed to find the files that those
versions wrote.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from comfy.model_patcher import ModelPatcher

log = logging.getLogger(__name__)

# Bytes copied to the CPU at a time, bytes from which on the duration is logged, and the limit of threads.
_CHUNK = 64 * 1024 * 1024
_LOGGED_SIZE = 1024**3
_THREADS = 8


@dataclass
class _Known:
    """A checksum, and the evidence that it is still valid.

    Attributes:
        memory: weak reference to the tensor's storage; another tensor could have reused a bare address.
        mark: changes if the tensor is another view of that storage, or if torch wrote to it.
        sums: sums of the numbers, one for each plain tensor inside.
    """

    memory: StorageWeakRef
    mark: tuple
    sums: tuple[int, ...]
    checksum: bytes


# The caches must outlive the nodes that use them.
_BY_MODULE: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Known]] = weakref.WeakKeyDictionary()
_BY_TENSOR = WeakIdKeyDictionary()


def module_checksums(module: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, bytes]:
    """Return the checksum of each of a module's weights, by name."""
    known = _BY_MODULE.setdefault(module, {})
    weights = dict(weights)
    missing = {name: tensor for name, tensor in weights.items() if not _holds(known.get(name), tensor)}
    if not missing:
        return {name: known[name].checksum for name in weights}
    started, size = time.monotonic(), sum(tensor.nbytes for tensor in missing.values())
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        known.update(zip(missing, pool.map(_compute, missing.values()), strict=True))
    if size >= _LOGGED_SIZE:
        took = time.monotonic() - started
        log.info("Graft: computed checksums of %.1f GB of weights in %.1f s, once for this model.", size / 1e9, took)
    return {name: known[name].checksum for name in weights}


def tensor_checksum(tensor: torch.Tensor) -> bytes:
    """Return the checksum of a tensor that belongs to no module."""
    known = _BY_TENSOR.get(tensor)
    if not _holds(known, tensor):
        known = _BY_TENSOR[tensor] = _compute(tensor)
    return known.checksum


def _holds(known: _Known | None, tensor: torch.Tensor) -> bool:
    if known is None:
        return False
    parts = _plain_tensors(tensor)
    mark = _mark(tensor, parts)
    if mark == known.mark and not known.memory.expired():
        return True
    places = [[where for where, _ in state[1:]] for state in (mark, known.mark)]
    is_written_to = not known.memory.expired() and places[0] == places[1]
    # After a write, read the tensor again: a sum misses swapped rows. A sum suffices for a tensor that was moved, or
    # restored after a patch.
    if is_written_to or mark[0] != known.mark[0] or _sums(parts) != known.sums:
        return False
    known.memory, known.mark = StorageWeakRef(parts[0].untyped_storage()), mark
    return True


def _compute(tensor: torch.Tensor) -> _Known:
    parts = _plain_tensors(tensor)
    total = hashlib.sha256(repr(_shapes(tensor, parts)).encode())
    for part in parts:
        flat = _bytes(part)
        for start in range(0, flat.numel(), _CHUNK):
            total.update(flat[start : start + _CHUNK].to("cpu").numpy())
    memory = StorageWeakRef(parts[0].untyped_storage())
    return _Known(memory, _mark(tensor, parts), _sums(parts), total.digest())


def _plain_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain_tensors(getattr(tensor, name))]
    # Hash the stored data of other subclasses, not their view of it.
    return [tensor.detach().as_subclass(torch.Tensor)]


def _shapes(tensor: torch.Tensor, parts: list[torch.Tensor]) -> tuple:
    shapes = (tuple(tensor.shape), str(tensor.dtype), *((tuple(part.shape), str(part.dtype)) for part in parts))
    # Two types of GGUF may give the same bytes other values.
    return (*shapes, str(tensor.tensor_type)) if hasattr(tensor, "tensor_type") else shapes


def _mark(tensor: torch.Tensor, parts: list[torch.Tensor]) -> tuple:
    def written(part: torch.Tensor) -> int:
        # Inference tensors have no version counter.
        return -1 if part.is_inference() else part._version

    where = (None if part.is_meta else (part.data_ptr(), part.stride(), str(part.device)) for part in parts)
    return (_shapes(tensor, parts), *zip(where, map(written, parts), strict=True))


def _bytes(part: torch.Tensor) -> torch.Tensor:
    """Return the bytes as [bytes] uint8 on the tensor's device; empty for meta and empty tensors."""
    if part.is_meta or part.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8)
    return part.contiguous().reshape(-1).view(torch.uint8)


def _sums(parts: list[torch.Tensor]) -> tuple[int, ...]:
    """Return the sum of each part's bytes, read as 64-bit words."""
    sums = []
    for part in parts:
        flat = _bytes(part)
        words = flat.numel() // 8 * 8
        # A view may start at an address that is not a multiple of 8.
        whole = flat[:words] if flat.data_ptr() % 8 == 0 else flat[:words].clone()
        sums.append(int(whole.view(torch.int64).sum()) + int(flat[words:].sum()) if flat.numel() else 0)
    return tuple(sums)


_SAMPLES = 32
_SAMPLING = "model_sampling"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.dtype)

# Attributes of a patcher that change its model's output.
_WAITING = ("patches", "object_patches", "model_options", "wrappers", "weight_wrapper_patches", "injections")


@dataclass(frozen=True)
class _Reading:
    """Functions that turn weights into bytes for a hash.

    Attributes:
        weights: for some weights of a module, by name and in their order.
        tensor: for a tensor that belongs to no module.
        module: for all weights of a module.
    """

    weights: Callable[[torch.nn.Module, list[tuple[str, torch.Tensor]]], dict[str, bytes]]
    tensor: Callable[[torch.Tensor], bytes]
    module: Callable[[torch.nn.Module], dict[str, Any]]


def patcher_digest(patcher: ModelPatcher, idle: Collection[str] = ()) -> str:
    """Return a hash of a patcher's base and of all that it applies: patches with strengths, object patches, options.

    Args:
        idle: names of weights that do not affect the result.
    """
    return _patcher_digest(patcher, idle, _WHOLE)


def sampled_patcher_digest(patcher: ModelPatcher, idle: Collection[str] = ()) -> str:
    """Return the hash that earlier versions computed for a patcher, from samples of its weights."""
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
    """Return a hash of a module's keys, shapes, dtypes and weights."""
    return _module_digest(module, _WHOLE)


def sampled_module_digest(module: torch.nn.Module) -> str:
    """Return the hash that earlier versions computed for a module, from samples of its weights."""
    return _module_digest(module, _SAMPLED)


def _module_digest(module: torch.nn.Module, reading: _Reading) -> str:
    total = hashlib.sha256()
    for name, content in reading.weights(module, sorted(module.state_dict().items())).items():
        total.update(name.encode())
        total.update(content)
    return total.hexdigest()


def _base_weights(patcher: ModelPatcher) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each weight as loaded, even while a clone's patches are applied in place."""
    backup = patcher.backup
    weights = patcher.model.state_dict()
    # A GGUF model's state dict has empty tensors in the place of quantized weights.
    weights.update({name: value for name, value in patcher.model.named_parameters() if hasattr(value, "tensor_type")})
    for name, weight in sorted(weights.items()):
        # ComfyUI swaps the sampling object on the shared model while it has loaded a clone that patches it.
        if name.startswith(f"{_SAMPLING}."):
            continue
        kept = backup.get(name)
        yield name, (weight if kept is None else kept.weight)


def _sampling_of(patcher: ModelPatcher) -> Any:
    """Return the patcher's own sampling object, even while a clone's object is on the shared model."""
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
    """Add a value to a hash by its content, never by its address. An object that occurs again adds only its kind.

    Args:
        seen: objects met so far, by id. It holds the objects so that Python cannot reuse an id.
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
    own = getattr(value, "__qualname__", None)
    if own is not None:
        return f"{getattr(value, '__module__', '')}.{own}"
    return "|".join(kind.__qualname__ for kind in type(value).__mro__)


def _parts(value: Any, reading: _Reading) -> list:
    """Return the parts of an object that decide its behavior, such as a function's defaults and closure, or fields."""
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
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:
            # The name is bound later.
            continue
    return values


def _fields(value: Any) -> dict[str, Any]:
    """Return an object's plain, tensor and container fields. Others may hold ComfyUI's own changing state."""
    kept = (*_PLAIN, torch.Tensor, list, tuple, dict)
    return {name: field for name, field in getattr(value, "__dict__", {}).items() if isinstance(field, kept)}


def _module_checksums(module: torch.nn.Module) -> dict[str, bytes]:
    return module_checksums(module, module.state_dict().items())


_WHOLE = _Reading(module_checksums, tensor_checksum, _module_checksums)
_SAMPLED = _Reading(_samples, _sample, lambda module: dict(module.state_dict()))
