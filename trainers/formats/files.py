"""Safetensors files, written atomically, with checksums."""

from __future__ import annotations

import json
import logging
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import RunError
from .atomic import replacing
from .json_files import parse_json, unique_keys

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# Key of the checksums in a file's metadata.
CHECKSUMS = "graft_checksums"

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# Bytes per element, by safetensors' name. Its other dtypes have sub-byte elements or no use in an adapter.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
# Bytes of a file to map at a time while reading it.
_MAPPED_LIMIT = 64 * 1024 * 1024
_HEADER_LIMIT = 64 * 1024 * 1024
_MOST_DIMENSIONS = 32


def write_tensors(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], checksums: bool = True
) -> None:
    """Write a safetensors file atomically. Tensors may be on any device and in any memory layout.

    Writes one tensor after the other, so that a mapping can compute each on access. The safetensors library instead
    copies all tensors at once, and memory may not hold them in addition to the model's weights.
    Source of the format: github.com/huggingface/safetensors, "Format".

    Args:
        tensors: tensors by name; each is accessed several times.
        metadata: texts by name.
        checksums: whether to add checksums to the metadata, for `read_tensors` to compare.
    """
    rows: dict[str, dict] = {}
    sizes = {name: tensors[name].element_size() for name in tensors}
    # Sort by element size, largest first, as the library does: every tensor is then aligned to its element size.
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        rows[name] = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    sums = dict.fromkeys(sorted(order) if checksums else (), 0)
    # The checksums are known only after writing, but this header with zeros has the same length.
    header, entry = _header(rows, metadata, end, sums)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(header)))
            file.write(header)
            for name in order:
                data = bytes_of(tensors[name])
                file.write(data)
                if checksums:
                    sums[name] = _checksum(name, rows[name], data)
            if checksums:
                file.seek(8)
                file.write(_header(rows, metadata, end, sums, zlib.crc32(_blanked(header, entry)))[0])


def _header(
    rows: dict[str, dict], metadata: dict[str, str], size: int, sums: dict[str, int], own: int = 0
) -> tuple[bytes, str]:
    """Return the header of a file, and the metadata entry with the checksums; `own` is the checksum of the header."""
    entry = f"1:{len(sums)}:{size}:{own:08x}:" + "".join(f"{total:08x}" for total in sums.values())
    plain = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    marked = {**plain, CHECKSUMS: entry} if sums else plain
    header = json.dumps({"__metadata__": marked, **rows} if marked else rows, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), entry


def _blanked(header: bytes, entry: str) -> bytes:
    return header.replace(entry.encode(), b"0" * len(entry), 1)


def _checksum(name: str, row: dict, data: memoryview) -> int:
    return zlib.crc32(data, zlib.crc32(f"{name}|{row['dtype']}|{row['shape']}".encode("utf-8", "surrogatepass")))


def is_finite(tensor: torch.Tensor) -> bool:
    """Report whether all elements of a tensor are finite."""
    # Some one-byte dtypes do not support isfinite, so convert them to float32.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def _dtype_name(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _DTYPES:
        raise RunError(f"Graft cannot write the dtype {kind} into a safetensors file.", "Please report this.")
    return _DTYPES[kind]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor's elements in row-major order, from any device and memory layout."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def read_tensors(
    path: str, names: Iterable[str] | None = None, strict: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read tensors (on the CPU) and metadata from a safetensors file.

    Compares the tensors with the checksums that `write_tensors` wrote. Other programs' files have none.

    Args:
        names: names of the tensors to read, None for all.
        strict: whether to refuse a changed header too. Otherwise it is only logged, because users edit metadata.

    Raises:
        RunError: the file is missing, invalid or damaged, or lacks one of the names.
    """
    from safetensors import SafetensorError, safe_open

    raw, header = _read_header(path)
    metadata = dict(header.pop("__metadata__", {}))
    sums = _sums(path, raw, header, metadata.pop(CHECKSUMS, ""), strict)
    left = list(header if names is None else names)[::-1]
    try:
        tensors = {}
        while left:
            # Reopen the file now and then: mapped pages count as this process's memory until it is closed.
            with safe_open(path, framework="pt", device="cpu") as file:
                mapped = 0
                while left and mapped < _MAPPED_LIMIT:
                    name = left.pop()
                    # Copy the tensor: on Windows, a mapped file cannot be replaced or removed.
                    tensors[name] = file.get_tensor(name).clone()
                    mapped += tensors[name].nbytes
                    if name in sums and sums[name] != f"{_checksum(name, header[name], bytes_of(tensors[name])):08x}":
                        raise _changed(path, f"the tensor {name:.200}")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return tensors, metadata


def read_metadata(path: str) -> dict[str, str]:
    """Return the metadata of a safetensors file without its checksums, empty if it has none. Do not read tensors.

    Raises:
        RunError: the file is missing or invalid.
    """
    metadata = read_header(path).get("__metadata__", {})
    return {name: text for name, text in metadata.items() if name != CHECKSUMS}


def _sums(path: str, raw: bytes, header: dict[str, dict], entry: str, strict: bool) -> dict[str, str]:
    """Return the checksums of a file's tensors by name, empty if it has none or they belong to other tensors.

    Files of other programs and of earlier versions have no entry. Raise RunError for a changed header if `strict`.
    """
    if not entry:
        return {}
    present = sum(row["data_offsets"][1] - row["data_offsets"][0] for row in header.values())
    start = f"1:{len(header)}:{present}:"
    own, digits = entry[len(start) : len(start) + 9], entry[len(start) + 9 :]
    same = entry.startswith(start) and len(digits) == 8 * len(header)
    if not same or own != f"{zlib.crc32(_blanked(raw, entry)):08x}:":
        if strict:
            raise _changed(path, "its header")
        log.warning("Graft: the header of %s does not match its checksum: it was edited, or is damaged.", path)
    return {name: digits[8 * place :][:8] for place, name in enumerate(sorted(header))} if same else {}


def _changed(path: str, what: str) -> RunError:
    return RunError(
        f"The file '{path}' is damaged: {what} does not match its checksum.",
        "Restore it from a copy or choose another file. If a program changed it on purpose, remove the entry "
        f"{CHECKSUMS} from its metadata.",
    )


def read_header(path: str) -> dict[str, dict]:
    """Return the header of a safetensors file: an entry per tensor, and `__metadata__` if the file has metadata.

    Raises:
        RunError: the file is missing or not safetensors, or its header does not match its size.
    """
    return _read_header(path)[1]


def _read_header(path: str) -> tuple[bytes, dict[str, dict]]:
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", _exactly(file, 8))[0]
            if size > _HEADER_LIMIT:
                raise ValueError(f"its header has {size} bytes")
            raw = _exactly(file, size)
            header = parse_json(raw.decode("utf-8"), unique_keys)
            present = os.fstat(file.fileno()).st_size - 8 - size
        _check_header(header, present)
        return raw, header
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> RunError:
    return RunError(
        f"The file '{path}' cannot be read as safetensors ({error}).",
        "It is missing, damaged, or in another format. Restore it, or choose another.",
    )


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"it ends after {len(data)} of {size} bytes of its header")
    return data


def _check_header(header: Any, present: int) -> None:
    """Raise ValueError, before any memory is allocated, unless the header is valid and describes `present` bytes."""
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata does not map names to texts")
    spans = sorted(_span(name, row) for name, row in header.items() if name != "__metadata__")
    end = 0
    for start, stop in spans:
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != present:
        raise ValueError(f"it has {present} bytes of data, but its header says {end}")


def _span(name: str, row: Any) -> tuple[int, int]:
    label = name[:80]
    try:
        dtype, shape, (start, stop) = row["dtype"], row["shape"], row["data_offsets"]
        complete = len(shape) <= _MOST_DIMENSIONS and isinstance(shape, list)
        complete = complete and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header entry for {label} is incomplete") from error
    if not complete or not isinstance(dtype, str):
        raise ValueError(f"its header entry for {label} is incomplete")
    if dtype not in _BYTES:
        raise ValueError(f"{label} has the unknown dtype {dtype[:20]}")
    needed = _BYTES[dtype] * math.prod(shape)
    if needed != stop - start:
        raise ValueError(f"{label} has {stop - start} bytes, but its shape and dtype need {needed}")
    return start, stop
