"""Tensor cache on disk: each entry is made once and found again by the hash of its inputs.

Entries lie in shards, safetensors files of some dozens of entries each. A shard is written whole or not at all, and
holds a checksum of every tensor. An entry with a wrong checksum is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RunError
from ..formats import atomic, files, json_files

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_FORMAT = "graft cache 1"
_SUFFIX = ".safetensors"
# Prefix of every version's format, and the start of a shard's file after the length of its header.
_FORMATS = "graft cache "
_HEAD = b'{"__metadata__":{"format":"graft cache '
# Names of shards, and of the first version's files, which hold one entry each.
_NAME = re.compile(r"(?:[0-9a-f]{24}|[0-9a-f]{64})\.safetensors")

# Write a shard at this number of entries, bytes, or seconds since its first entry; a kill can cost this much.
_ENTRIES = 32
_BYTES = 64 * 1024 * 1024
_SECONDS = 5.0


@dataclass
class _Place:
    """Location of an entry: its shard, its key there, and the checksum of each of its tensors."""

    path: str
    key: str
    sums: dict[str, int]


class Cache:
    """Tensors by key in the shards of a folder; several processes may share it.

    `put` keeps tensors in memory until a shard is full. Call `flush` after the last one.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._requested: dict[str, None] = {}
        self._places: dict[str, _Place] = {}
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._since = 0.0
        self._read_headers()

    def _read_headers(self) -> None:
        for path in sorted(_shards(self.folder)):
            try:
                for name, total in _sums(path).items():
                    key, _, tensor = name.partition("/")
                    self._places.setdefault(key, _Place(path, key, {})).sums[tensor] = total
            except _Foreign as other:
                log.warning("Graft: ignored the cache shard %s: %s", path, other)
            except (RunError, ValueError) as error:
                log.warning("Graft: the cache shard %s is damaged. Graft computes its entries again. %s", path, error)
                _remove_own(path)

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Return the keys without a sound entry, after comparing the entries on disk with their checksums.

        Remove a damaged shard after writing its sound entries to another one. Mark the intact shards that hold
        the keys as used now.
        """
        wanted = dict.fromkeys(keys)
        self._requested.update(wanted)
        by_path: dict[str, list[str]] = {}
        for key in wanted:
            if key not in self._pending and key in self._places:
                by_path.setdefault(self._places[key].path, []).append(key)
        for path, held in by_path.items():
            damaged = len(held) - len(self._sound(path, held))
            if damaged:
                self._drop_shard(path, damaged)
            else:
                _touch(path)
        return {key for key in wanted if key not in self._places and key not in self._pending}

    def _drop_shard(self, path: str, damaged: int) -> None:
        log.warning("Graft: %d entries of the cache shard %s are damaged. Graft computes them again.", damaged, path)
        for key in [key for key, place in self._places.items() if place.path == path]:
            tensors = self._sound(path, [key]).get(key)
            del self._places[key]
            if tensors is not None:
                self.put(key, tensors)
        self.flush()
        _remove_own(path)

    def _sound(self, path: str, keys: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Return the tensors of those keys of a shard whose checksums match; read the header once for all keys."""
        places = {key: self._places[key] for key in keys}
        stored = {key: {name: f"{place.key}/{name}" for name in place.sums} for key, place in places.items()}
        try:
            tensors, _ = files.read_tensors(path, [full for names in stored.values() for full in names.values()])
        except RunError:
            return {}
        entries = {key: {name: tensors[full] for name, full in names.items()} for key, names in stored.items()}
        return {key: entry for key, entry in entries.items() if _sums_of(entry) == self._places[key].sums}

    def find_as(self, key: str, earlier: str) -> None:
        """Make an entry with an earlier version's key available under its key of today."""
        if key not in self._places and key not in self._pending and earlier in self._places:
            self._places[key] = self._places[earlier]

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors of a key, None if they are absent or damaged."""
        if key in self._pending:
            return self._pending[key]
        return self._sound(self._places[key].path, [key]).get(key) if key in self._places else None

    def copy_used(self, folder: str) -> None:
        """Copy all entries that exist, of the keys given to `missing`, into another folder.

        Raises:
            RunError: an entry is gone, or the folder cannot be written.
        """
        other = Cache(folder)
        for key in self._requested:
            if key not in self._pending and key not in self._places:
                continue
            tensors = self.get(key)
            if tensors is None:
                raise RunError(f"The cached entry {key} is missing.", "Queue the graph again to compute it.")
            other.put(key, tensors)
        other.flush()

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors under a key."""
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        size = sum(value.nbytes for entry in self._pending.values() for value in entry.values())
        if len(self._pending) >= _ENTRIES or size >= _BYTES or time.monotonic() - self._since >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries as a shard."""
        if not self._pending:
            return
        flat = {f"{key}/{name}": value for key, entry in self._pending.items() for name, value in entry.items()}
        sums = {name: _checksum(value) for name, value in flat.items()}
        path = os.path.join(self.folder, f"{secrets.token_hex(12)}{_SUFFIX}")
        files.write_tensors(path, flat, {"format": _FORMAT, "sums": json.dumps(sums)}, checksums=False)
        for key, entry in self._pending.items():
            self._places[key] = _Place(path, key, {name: sums[f"{key}/{name}"] for name in entry})
        self._pending = {}


class _Foreign(Exception):
    """Error for a shard of another version of the pack, or a file that is not a shard."""


def _sums(path: str) -> dict[str, int]:
    """Read the checksums in a shard, by `<key>/<tensor>`.

    Raises:
        _Foreign: the shard has another format.
        RunError, ValueError: the shard is damaged.
    """
    header = files.read_header(path)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise _Foreign(f"its format is {metadata.get('format', 'not given')[:40]!r}.")
    sums = json_files.parse_json(metadata.get("sums", ""))
    if not isinstance(sums, dict) or sums.keys() != header.keys():
        raise ValueError("its checksums belong to other tensors")
    if not all(type(total) is int for total in sums.values()):
        raise ValueError("its checksums are not numbers")
    return sums


def _shards(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    # Removes only old temporary files: another process may be writing the younger ones.
    atomic.sweep(folder)
    entries = [entry for entry in os.scandir(folder) if entry.name.endswith(_SUFFIX)]
    return [entry.path for entry in entries if entry.is_file(follow_symlinks=False)]


def _sums_of(entry: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: _checksum(tensor) for name, tensor in entry.items()}


def _checksum(tensor: torch.Tensor) -> int:
    import torch

    head = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), head)


def _touch(path: str) -> None:
    """Mark a shard as used now; if the file system refuses, the shard is only pruned earlier."""
    try:
        os.utime(path)
    except OSError as error:
        log.debug("Graft: %s", error)


def _remove_own(path: str) -> bool:
    """Remove a file that identifies itself as a cache file, and report whether it is gone; leave other files alone."""
    if not _is_own(path):
        log.warning("Graft: %s is not marked as Graft's cache file, so Graft keeps it. Remove it yourself.", path)
        return False
    try:
        os.remove(path)
        return True
    except OSError as error:
        log.warning("Graft: the cache file %s cannot be removed: %s", path, error)
        return False


def _is_own(path: str) -> bool:
    """Return True if a file's header names a format of the cache, or if an empty file has a shard's name."""
    if atomic.is_link(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(8 + len(_HEAD))
        # A damaged shard may have no readable header.
        if start[8:] == _HEAD or (not start and _NAME.fullmatch(os.path.basename(path))):
            return True
        metadata = files.read_metadata(path)
    except (OSError, RunError):
        return False
    stem = os.path.basename(path).removesuffix(_SUFFIX)
    return metadata.get("format", "").startswith(_FORMATS) or metadata.get("key") == stem


def is_sound(path: str) -> bool:
    """Report whether a shard can be read and all its tensors match their checksums."""
    try:
        sums = _sums(path)
        tensors, _ = files.read_tensors(path, list(sums))
    except (_Foreign, RunError, ValueError):
        return False
    return _sums_of(tensors) == sums


def cache_size(folder: str) -> int:
    """Return the bytes of all cache files in a folder and below it."""
    return sum(size for _, size, _ in _cache_files(folder))


def prune(folder: str, limit: int, since: float) -> int:
    """Remove the least recently used cache files until at most `limit` bytes are left.

    Args:
        since: a time (seconds since the epoch); files used at or after it stay, regardless of the limit.

    Returns:
        Bytes removed.
    """
    rows = sorted(_cache_files(folder))
    left = sum(size for _, size, _ in rows)
    removed = 0
    for used, size, path in rows:
        if left - removed <= limit or used >= since:
            break
        if _remove_own(path):
            removed += size
    return removed


def _cache_files(folder: str) -> list[tuple[float, int, str]]:
    rows = []
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.stat(path)
            except OSError:
                # Another process has pruned it meanwhile.
                continue
            if _NAME.fullmatch(name) and not atomic.is_link(path):
                rows.append((status.st_mtime, status.st_size, path))
    return rows


def key_of(*parts) -> str:
    """Return the hash of JSON-serializable parts."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()
