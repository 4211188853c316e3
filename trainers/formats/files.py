"""Safetensors and JSON files, written so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import RunError

if TYPE_CHECKING:
    import torch

_HEADER_LIMIT = 64 * 1024 * 1024


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary path in the same folder that takes the place of `path` when the block ends well.

    Raises:
        RunError: the folder cannot be written or the disk is full; `path` is then as it was.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as error:
        raise RunError(
            f"The file '{path}' cannot be written ({error}).",
            "Free space on that disk, or make the folder writable.",
        ) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """A temporary folder beside `path` that becomes it when the block ends well, and is gone otherwise.

    Raises:
        RunError: it cannot be made, or there is something at `path`.
    """
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    try:
        os.makedirs(temporary)
        yield temporary
        os.rename(temporary, path)
        _sync_folder(os.path.dirname(path))
    except OSError as error:
        raise RunError(
            f"The folder '{path}' cannot be written ({error}).",
            "Free space on that disk, make the folder above it writable, or choose another name.",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync_folder(folder: str) -> None:
    """Makes the renaming itself durable, where the system lets a folder be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def write_tensors(path: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically; tensors may be on any device and in any layout."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        # The library writes for the owner alone; a LoRA is for whoever may read any other new file there.
        with open(temporary, "wb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        try:
            save_file(ready, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        os.chmod(temporary, mode)


def read_tensors(path: str, names: Iterable[str] | None = None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors on the CPU, all or those of some names, and metadata of a safetensors file.

    Raises:
        RunError: naming the file, when it is missing, no sound safetensors file, or without one of the names.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            wanted = file.keys() if names is None else names
            # Copied: what is mapped keeps the file from being replaced or removed on Windows.
            tensors = {name: file.get_tensor(name).clone() for name in wanted}
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"The file '{path}' cannot be read as safetensors ({error}).",
            "It is missing, damaged, or of another format; restore it or choose another.",
        ) from error
    return tensors, metadata


def read_metadata(path: str) -> dict[str, str]:
    """Metadata of a safetensors file without reading its tensors; empty when it has none.

    Raises:
        RunError: naming the file, when it is missing or no sound safetensors file.
    """
    return dict(read_header(path).get("__metadata__", {}))


def read_header(path: str) -> dict[str, dict]:
    """The header of a safetensors file: what is known of each tensor by its name, and `__metadata__`.

    Raises:
        RunError: naming the file, when it is missing, no safetensors file, or shorter than its header says.
    """
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            if size > _HEADER_LIMIT:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            ends = [row["data_offsets"][1] for name, row in header.items() if name != "__metadata__"]
            present = os.fstat(file.fileno()).st_size - 8 - size
        if present < max(ends, default=0):
            raise ValueError(f"{present} bytes of data where its header says {max(ends)}")
        dict(header.get("__metadata__", {}))
        return header
    except (OSError, struct.error, ValueError, AttributeError, TypeError, KeyError) as error:
        raise RunError(
            f"The file '{path}' cannot be read as safetensors ({error}).",
            "It is missing, damaged, or of another format; restore it or choose another.",
        ) from error


def write_json(path: str, value) -> None:
    """Writes readable JSON atomically."""
    with replacing(path) as temporary:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.write("\n")


def read_json(path: str):
    """The value in a JSON file.

    Raises:
        RunError: naming the file, when it is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise RunError(f"The file '{path}' cannot be read as JSON ({error}).", "Remove or restore it.") from error


def sweep(folder: str, older_than: float = 0.0) -> None:
    """Removes what a killed process left half-written in a folder, if it is older than so many seconds."""
    if not os.path.isdir(folder):
        return
    for name in os.listdir(folder):
        if not name.startswith(".") or not (name.endswith(".tmp") or name.startswith(".tmp")):
            continue
        path = os.path.join(folder, name)
        if not older_than or time.time() - os.stat(path).st_mtime > older_than:
            os.remove(path)
