"""Checksums of whole tensors, computed once as long as a tensor does not change.

A model of 2 GB takes seconds. So a checksum is cached by module and weight name, or by the tensor itself. It is valid
while the tensor has the same memory and nothing wrote to it. ComfyUI moves weights between devices, and swaps patched
weights in and out. Then a sum of all numbers, several times as fast, decides whether the weights are the same.
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
    parts = _parts(tensor)
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
    parts = _parts(tensor)
    total = hashlib.sha256(repr(_shapes(tensor, parts)).encode())
    for part in parts:
        flat = _bytes(part)
        for start in range(0, flat.numel(), _CHUNK):
            total.update(flat[start : start + _CHUNK].to("cpu").numpy())
    memory = StorageWeakRef(parts[0].untyped_storage())
    return _Known(memory, _mark(tensor, parts), _sums(parts), total.digest())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _parts(getattr(tensor, name))]
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
