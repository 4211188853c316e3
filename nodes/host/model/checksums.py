"""Checksums of whole tensors, each computed once as long as the tensor stays what it is.

A model of 2 GB takes seconds. So a checksum is remembered for the place that a tensor has: a name in a module, or the
tensor itself. It holds while the memory is the same and was not written to. ComfyUI moves weights between devices, and
puts patched ones in their place and back: then a sum of all numbers, several times as fast, decides whether they are
the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

log = logging.getLogger(__name__)

# Bytes that are brought to the CPU at a time, from which on it is said how long it took, and the most threads.
_CHUNK = 64 * 1024 * 1024
_TOLD = 1024**3
_THREADS = 8


@dataclass
class _Known:
    """A checksum, and what tells that it still holds.

    Attributes:
        memory: a weak reference to the tensor's memory; an address alone could be another tensor's by now.
        mark: changes when the tensor is another part of that memory, or was written to by torch.
        sums: of the numbers, by part of the tensor.
    """

    memory: StorageWeakRef
    mark: tuple
    sums: tuple[int, ...]
    checksum: bytes


# What is remembered has to outlive the nodes that ask.
_BY_MODULE: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, _Known]] = weakref.WeakKeyDictionary()
_BY_TENSOR = WeakIdKeyDictionary()


def module_checksums(module: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, bytes]:
    """The checksum of each of a module's weights, by name."""
    known = _BY_MODULE.setdefault(module, {})
    weights = dict(weights)
    missing = {name: tensor for name, tensor in weights.items() if not _holds(known.get(name), tensor)}
    if not missing:
        return {name: known[name].checksum for name in weights}
    started, size = time.monotonic(), sum(tensor.nbytes for tensor in missing.values())
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        known.update(zip(missing, pool.map(_compute, missing.values()), strict=True))
    if size >= _TOLD:
        took = time.monotonic() - started
        log.info("Graft: %.1f GB of weights were checked in %.1f s, once for this model.", size / 1e9, took)
    return {name: known[name].checksum for name in weights}


def tensor_checksum(tensor: torch.Tensor) -> bytes:
    """The checksum of a tensor that is no module's."""
    known = _BY_TENSOR.get(tensor)
    if not _holds(known, tensor):
        known = _BY_TENSOR[tensor] = _compute(tensor)
    return known.checksum


def _holds(known: _Known | None, tensor: torch.Tensor) -> bool:
    if known is None:
        return False
    parts = _parts(tensor)
    mark = _mark(tensor, parts)
    if mark == known.mark and not known.memory.expired():
        return True
    places = [[where for where, _ in one[1:]] for one in (mark, known.mark)]
    is_written_to = not known.memory.expired() and places[0] == places[1]
    # In other memory it was moved, or put back after a patch: a sum tells, which would not tell rows that were swapped.
    if is_written_to or mark[0] != known.mark[0] or _sums(parts) != known.sums:
        return False
    known.memory, known.mark = StorageWeakRef(parts[0].untyped_storage()), mark
    return True


def _compute(tensor: torch.Tensor) -> _Known:
    parts = _parts(tensor)
    total = hashlib.sha256(repr(_shapes(tensor, parts)).encode())
    for part in parts:
        flat = _bytes(part)
        for start in range(0, flat.numel(), _CHUNK):
            total.update(flat[start : start + _CHUNK].to("cpu").numpy())
    memory = StorageWeakRef(parts[0].untyped_storage())
    return _Known(memory, _mark(tensor, parts), _sums(parts), total.digest())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor consists of: quantized ones hold numbers and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
    # Of other subclasses what they hold, not what they show.
    return [tensor.detach().as_subclass(torch.Tensor)]


def _shapes(tensor: torch.Tensor, parts: list[torch.Tensor]) -> tuple:
    return (tuple(tensor.shape), str(tensor.dtype), *((tuple(part.shape), str(part.dtype)) for part in parts))


def _mark(tensor: torch.Tensor, parts: list[torch.Tensor]) -> tuple:
    def written(part: torch.Tensor) -> int:
        # What was made in inference mode has no count of writes.
        return -1 if part.is_inference() else part._version

    where = (None if part.is_meta else (part.data_ptr(), part.stride(), str(part.device)) for part in parts)
    return (_shapes(tensor, parts), *zip(where, map(written, parts), strict=True))


def _bytes(part: torch.Tensor) -> torch.Tensor:
    """[bytes] uint8, on the tensor's device; nothing of a tensor without numbers."""
    if part.is_meta or part.numel() == 0:
        return torch.zeros(0, dtype=torch.uint8)
    return part.contiguous().reshape(-1).view(torch.uint8)


def _sums(parts: list[torch.Tensor]) -> tuple[int, ...]:
    """The sum of each part's bytes, in words of eight."""
    found = []
    for part in parts:
        flat = _bytes(part)
        words = flat.numel() // 8 * 8
        # A view of part of a tensor may begin between two words.
        whole = flat[:words] if flat.data_ptr() % 8 == 0 else flat[:words].clone()
        found.append(int(whole.view(torch.int64).sum()) + int(flat[words:].sum()) if flat.numel() else 0)
    return tuple(found)
