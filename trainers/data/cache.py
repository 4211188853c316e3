"""Latents and conditionings on disk, each made once and found again by what decides it.

Entries lie in shards, safetensors files of some dozens each. A shard is written whole or not at all, and carries a
checksum of every tensor: one that does not match is made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError, RunError
from ..formats import files
from .examples import LeftOut
from .pixels import cut, to_array
from .scan import reason_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..protocols import ImageCodec, TextEncoder
    from .buckets import Crop
    from .examples import Example, Source

log = logging.getLogger(__name__)

_FORMAT = "graft cache 1"
_SUFFIX = ".safetensors"

# A shard is written when it holds so much, or when its first entry has waited so long: what a kill can cost.
_ENTRIES = 32
_BYTES = 64 * 1024 * 1024
_SECONDS = 5.0


@dataclass
class _Place:
    """Where an entry lies, and the checksum of each of its tensors."""

    path: str
    sums: dict[str, int]


class Cache:
    """Tensors by key in the shards of a folder; several processes may share it.

    What is put is kept in memory until a shard is full: call `flush` when done.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self._asked: dict[str, None] = {}
        self._places: dict[str, _Place] = {}
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._since = 0.0
        self._read_headers()

    def _read_headers(self) -> None:
        for path in sorted(_shards(self.folder)):
            try:
                for name, total in _sums(path).items():
                    key, _, tensor = name.partition("/")
                    self._places.setdefault(key, _Place(path, {})).sums[tensor] = total
            except _Foreign as other:
                log.warning("Graft: the cache shard %s is left aside: %s", path, other)
            except (RunError, ValueError) as error:
                log.warning("Graft: the cache shard %s is damaged; what it held will be made again. %s", path, error)
                _remove(path)

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have no sound entry; what lies on disk is read and compared with its checksums.

        A damaged shard is removed after its sound entries were put elsewhere. The shards that were used are marked so.
        """
        wanted = dict.fromkeys(keys)
        self._asked.update(wanted)
        by_path: dict[str, list[str]] = {}
        for key in wanted:
            if key not in self._pending and key in self._places:
                by_path.setdefault(self._places[key].path, []).append(key)
        for path, held in by_path.items():
            damaged = [key for key in held if self._sound(key) is None]
            if damaged:
                self._drop_shard(path, len(damaged))
            else:
                _touch(path)
        return {key for key in wanted if key not in self._places and key not in self._pending}

    def _drop_shard(self, path: str, damaged: int) -> None:
        log.warning("Graft: %d entries of the cache shard %s are damaged and will be made again.", damaged, path)
        for key in [key for key, place in self._places.items() if place.path == path]:
            tensors = self._sound(key)
            del self._places[key]
            if tensors is not None:
                self.put(key, tensors)
        self.flush()
        _remove(path)

    def _sound(self, key: str) -> dict[str, torch.Tensor] | None:
        place = self._places[key]
        try:
            stored = {f"{key}/{name}": name for name in place.sums}
            tensors, _ = files.read_tensors(place.path, stored)
        except RunError:
            return None
        named = {name: tensors[full] for full, name in stored.items()}
        return named if all(_checksum(value) == place.sums[name] for name, value in named.items()) else None

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a key, None when absent or damaged."""
        if key in self._pending:
            return self._pending[key]
        return self._sound(key) if key in self._places else None

    def copy_asked(self, folder: str) -> None:
        """Puts all entries that were asked for, and could be made, into another folder.

        Raises:
            RunError: one of them is gone, or the folder cannot be written.
        """
        other = Cache(folder)
        for key in self._asked:
            if key not in self._pending and key not in self._places:
                continue
            tensors = self.get(key)
            if tensors is None:
                raise RunError(f"The cached entry {key} is gone.", "Queue again; it will be made anew.")
            other.put(key, tensors)
        other.flush()

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keeps tensors under a key."""
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        size = sum(value.nbytes for entry in self._pending.values() for value in entry.values())
        if len(self._pending) >= _ENTRIES or size >= _BYTES or time.monotonic() - self._since >= _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as a shard."""
        if not self._pending:
            return
        flat = {f"{key}/{name}": value for key, entry in self._pending.items() for name, value in entry.items()}
        sums = {name: _checksum(value) for name, value in flat.items()}
        path = os.path.join(self.folder, f"{secrets.token_hex(12)}{_SUFFIX}")
        files.write_tensors(path, flat, {"format": _FORMAT, "sums": json.dumps(sums)})
        for key, entry in self._pending.items():
            self._places[key] = _Place(path, {name: sums[f"{key}/{name}"] for name in entry})
        self._pending = {}


class _Foreign(Exception):
    """A shard that another version of the pack has written, or that is none."""


def _sums(path: str) -> dict[str, int]:
    """The checksums in a shard, by `<key>/<tensor>`.

    Raises:
        _Foreign: it is of another format.
        RunError, ValueError: it is damaged.
    """
    header = files.read_header(path)
    metadata = header.pop("__metadata__", {})
    if metadata.get("format", _FORMAT) != _FORMAT:
        raise _Foreign(f"it is of the format {metadata['format'][:40]!r}.")
    sums = files.parse_json(metadata.get("sums", ""))
    if not isinstance(sums, dict) or sums.keys() != header.keys():
        raise ValueError("its checksums are not those of its tensors")
    if not all(type(total) is int for total in sums.values()):
        raise ValueError("its checksums are no numbers")
    return sums


def _shards(folder: str) -> list[str]:
    if not os.path.isdir(folder):
        return []
    # Younger ones may be another process's that is writing now.
    files.sweep(folder, older_than=3600.0)
    return [entry.path for entry in os.scandir(folder) if entry.name.endswith(_SUFFIX) and entry.is_file()]


def _checksum(tensor: torch.Tensor) -> int:
    import torch

    head = zlib.crc32(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), head)


def _touch(path: str) -> None:
    """Marks a shard as used now; a file system that does not allow it only prunes it earlier."""
    try:
        os.utime(path)
    except OSError as error:
        log.debug("Graft: %s", error)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except OSError as error:
        log.warning("Graft: the cache file %s cannot be removed: %s", path, error)


def cache_size(folder: str) -> int:
    """Bytes of all cache files in a folder and below it."""
    return sum(size for _, size, _ in _cache_files(folder))


def prune(folder: str, limit: int, since: float) -> int:
    """Removes the files of a cache that were not used for longest until at most `limit` bytes are left.

    Args:
        since: a time (seconds of the epoch); what was used after it stays, whatever the limit.

    Returns:
        Bytes removed.
    """
    rows = sorted(_cache_files(folder))
    left = sum(size for _, size, _ in rows)
    removed = 0
    for used, size, path in rows:
        if left - removed <= limit or used >= since:
            break
        _remove(path)
        removed += size
    return removed


def _cache_files(folder: str) -> list[tuple[float, int, str]]:
    """(last use, bytes, path) of each file."""
    found = []
    for directory, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(directory, name)
            try:
                status = os.stat(path)
            except OSError:
                # Another process pruned it meanwhile.
                continue
            if name.endswith(_SUFFIX):
                found.append((status.st_mtime, status.st_size, path))
    return found


def key_of(*parts) -> str:
    """Hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode("utf-8", "surrogatepass")).hexdigest()


class LatentCache:
    """The posterior of each example's cut, as the codec gives it: mean and log-variance, or the mean alone.

    Attributes:
        means_only: keys of which there is no log-variance, so that every showing has the same latent.
    """

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()
        self.means_only: set[str] = set()

    def key(self, example: Example, crop: Crop) -> str:
        """What decides an example's latent: content, cut, codec with its dtype."""
        return key_of("latent 2", self._base, example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip)

    def fill(self, rows: Iterable[tuple[Example, list[Crop]]], tick: Callable[[str], None]) -> list[LeftOut | None]:
        """Encodes what is missing; for each example None, or why it cannot be trained on.

        Args:
            rows: each example with its cuts.
            tick: called with an example's name before it is encoded; may raise to interrupt, what was encoded is kept.

        Raises:
            DatasetError: naming the picture, when its latent is not finite.
        """
        rows = list(rows)
        missing = self._cache.missing(self.key(example, crop) for example, crops in rows for crop in crops)
        outcome = []
        try:
            for example, crops in rows:
                wanted = [crop for crop in crops if self.key(example, crop) in missing]
                try:
                    if wanted:
                        tick(example.source.name)
                        self._encode(example, wanted, missing)
                    outcome.append(None)
                except Unreadable as error:
                    outcome.append(error.row)
        finally:
            self._cache.flush()
        return outcome

    def _encode(self, example: Example, crops: list[Crop], missing: set[str]) -> None:
        picture = opened(example.source)
        if picture.size != example.size:
            raise Unreadable(LeftOut(example.source.name, f"it is {picture.size} when decoded, not {example.size}"))
        for crop in crops:
            key = self.key(example, crop)
            self._cache.put(key, self._posterior(example, cut(picture, crop)))
            missing.discard(key)

    def _posterior(self, example: Example, picture) -> dict[str, torch.Tensor]:
        import torch

        mean, spread = self._codec.encode(torch.from_numpy(to_array(picture))[None])
        found = {"mean": mean.float().cpu()}
        if spread is not None:
            found["logvar"] = spread.float().cpu()
        if not all(torch.isfinite(value).all() for value in found.values()):
            raise DatasetError(
                f"The VAE gives no finite latent for the picture '{example.source.name}'.",
                "Use a VAE that runs in float32 (start ComfyUI with --fp32-vae), or take the picture out.",
                "vae",
            )
        return found

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """`mean` [1, C, ...] and, where there is a posterior, `logvar` of a key that was filled."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached latent {key} is gone.", "Queue again; it will be made anew.")
        return tensors


class TextCache:
    """The conditioning tensors of each caption."""

    def __init__(self, cache: Cache, encoder: TextEncoder):
        self._cache = cache
        self._encoder = encoder
        self._base = encoder.fingerprint()

    def fill(self, captions: Iterable[str], tick: Callable[[str], None]) -> None:
        """Encodes the captions that are missing.

        Raises:
            DatasetError: naming the caption, when its conditioning is not finite.
        """
        wanted = {self._key(caption): caption for caption in captions}
        missing = self._cache.missing(wanted)
        try:
            for key, caption in wanted.items():
                if key in missing:
                    tick(caption)
                    self._cache.put(key, self._encode(caption))
        finally:
            self._cache.flush()

    def _encode(self, caption: str) -> dict[str, torch.Tensor]:
        import torch

        tensors = self._encoder.encode(caption)
        if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise DatasetError(
                f"The text encoder gives no finite conditioning for the caption '{caption}'.",
                "Load the text encoder in float32.",
                "clip",
            )
        return tensors

    def get(self, caption: str) -> dict[str, torch.Tensor]:
        """The tensors of a caption that was filled."""
        tensors = self._cache.get(self._key(caption))
        if tensors is None:
            raise RunError(f"The cached conditioning of '{caption}' is gone.", "Queue again; it will be made anew.")
        return tensors

    def _key(self, caption: str) -> str:
        return key_of("text 1", self._base, caption)


class Unreadable(Exception):
    """A picture that cannot be trained on, while the others can."""

    def __init__(self, row: LeftOut):
        super().__init__(str(row))
        self.row = row


def opened(source: Source) -> Image.Image:
    """The picture. Raises Unreadable."""
    try:
        return source.open()
    except DatasetError as error:
        raise Unreadable(LeftOut(source.name, reason_of(error, source.name))) from error
