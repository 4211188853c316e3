"""Safetensors and JSON files, written so that a reader never sees half of one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import RunError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# The entry of a file's metadata, or of a JSON object, that holds its checksums.
CHECKSUMS = "graft_checksums"
_CHECKSUM = "checksum"

# The format's names of torch's dtypes.
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
# Bytes of a number, by the format's name; what it has besides is of parts of bytes or of no use in an adapter.
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
# Bytes of a file that are mapped at a time while it is read.
_MAPPED_LIMIT = 64 * 1024 * 1024
_HEADER_LIMIT = 64 * 1024 * 1024
_MOST_DIMENSIONS = 32
# Seconds after which a half-written file is no one's any more: whoever writes one touches it all the time.
OLD = 3600.0
_CHUNK = 1 << 20
# Names of temporary files: see `replacing`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{1,8}\.tmp", re.DOTALL)


def is_link(path: str) -> bool:
    """Tell whether a path is a symbolic link or a junction."""
    # Python before 3.12 knows no junctions.
    is_junction = getattr(os.path, "isjunction", None)
    return os.path.islink(path) or (is_junction is not None and is_junction(path))


def refuse_links(root: str, path: str) -> None:
    """Refuse a path that goes through a link below a folder; the folder itself may be a link.

    Args:
        root: the folder; `path` starts with it.

    Raises:
        RunError: naming the link.
    """
    part = root
    for name in os.path.relpath(path, root).split(os.sep):
        part = os.path.join(part, name)
        if is_link(part):
            raise RunError(
                f"'{part}' is a link. Graft reads and writes through no link inside '{root}'.",
                "Remove the link, or put the folder in its place. To use another disk, move the whole output folder "
                "(--output-directory).",
            )


def find_link(folder: str) -> str | None:
    """Return the path of a link anywhere in a folder, None if it holds none."""
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(directory, name)
            if is_link(path):
                return path
    return None


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


def check_room(folder: str, needed: int) -> None:
    """Finds out before anything is worked on that a folder, there or to be made, cannot take what will be written.

    Raises:
        RunError: nothing can be written there, or less than so many bytes.
    """
    present = os.path.abspath(folder)
    while not os.path.isdir(present) and os.path.dirname(present) != present:
        present = os.path.dirname(present)
    probe = os.path.join(present, f".graft.{secrets.token_hex(4)}.tmp")
    try:
        with open(probe, "wb"):
            pass
        os.remove(probe)
        free = shutil.disk_usage(present).free
    except OSError as error:
        raise RunError(f"The folder '{present}' cannot be written ({error}).", "Make it writable.") from error
    if free < needed:
        raise RunError(
            f"The disk of '{folder}' has {free / 1e6:.0f} MB left, of which a save takes {needed / 1e6:.0f} MB.",
            "Free space on that disk.",
        )


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


def write_tensors(
    path: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], checksums: bool = True
) -> None:
    """Writes a safetensors file atomically; tensors may be on any device and in any layout.

    One tensor after the other, each asked for twice, so that a mapping may make them as they are needed: the library
    takes a copy of all of them at once, for which there is no room beside all weights.
    Source of the layout: github.com/huggingface/safetensors, "Format".

    Args:
        checksums: whether to add them to the metadata, for `read_tensors` to compare.
    """
    rows: dict[str, dict] = {}
    sizes = {name: tensors[name].element_size() for name in tensors}
    # Large numbers first, as the library has them: each then begins at a multiple of its size.
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        rows[name] = {"dtype": _dtype_name(tensor), "shape": list(tensor.shape), "data_offsets": [start, end]}
    sums = dict.fromkeys(sorted(order) if checksums else (), 0)
    # Of the same length with the sums, which are known when all is written.
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
    """The header of a file with its checksums, and the entry of its metadata that holds them.

    Args:
        size: bytes of all tensors.
        sums: of the tensors by name, in the order of their names.
        own: of the header itself, whose entry counts as zeros.
    """
    entry = f"1:{len(sums)}:{size}:{own:08x}:" + "".join(f"{total:08x}" for total in sums.values())
    plain = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    marked = {**plain, CHECKSUMS: entry} if sums else plain
    header = json.dumps({"__metadata__": marked, **rows} if marked else rows, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), entry


def _blanked(header: bytes, entry: str) -> bytes:
    """A header with zeros in place of the entry of its checksums."""
    return header.replace(entry.encode(), b"0" * len(entry), 1)


def _checksum(name: str, row: dict, data: memoryview) -> int:
    """CRC-32 over a tensor's name, dtype, shape and bytes."""
    return zlib.crc32(data, zlib.crc32(f"{name}|{row['dtype']}|{row['shape']}".encode("utf-8", "surrogatepass")))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are."""
    # Through float: not all of the small floats can be asked.
    return bool((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite().all())


def _dtype_name(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _DTYPES:
        raise RunError(f"Numbers of the kind {kind} have no place in a safetensors file.", "Please report this.")
    return _DTYPES[kind]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The numbers of a tensor on any device and in any layout, in the order of its places."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def read_tensors(
    path: str, names: Iterable[str] | None = None, strict: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors on the CPU, all or those of some names, and metadata of a safetensors file.

    Tensors are compared with the checksums that `write_tensors` has put into the file; other files have none.

    Args:
        strict: whether to refuse a changed header too, which otherwise is only logged: users edit metadata.

    Raises:
        RunError: naming the file, when it is missing, no sound safetensors file, not as it was written, or without
            one of the names.
    """
    from safetensors import SafetensorError, safe_open

    raw, header = _read_header(path)
    metadata = dict(header.pop("__metadata__", {}))
    sums = _sums(path, raw, header, metadata.pop(CHECKSUMS, ""), strict)
    left = list(header if names is None else names)[::-1]
    try:
        tensors = {}
        while left:
            # Opened anew every so often: what is mapped counts as this process's memory until it is closed.
            with safe_open(path, framework="pt", device="cpu") as file:
                mapped = 0
                while left and mapped < _MAPPED_LIMIT:
                    name = left.pop()
                    # Copied: what is mapped keeps the file from being replaced or removed on Windows.
                    tensors[name] = file.get_tensor(name).clone()
                    mapped += tensors[name].nbytes
                    if name in sums and sums[name] != f"{_checksum(name, header[name], bytes_of(tensors[name])):08x}":
                        raise _changed(path, f"the tensor {name:.200}")
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    return tensors, metadata


def read_metadata(path: str) -> dict[str, str]:
    """Metadata of a safetensors file without reading its tensors or checksums; empty when it has none.

    Raises:
        RunError: naming the file, when it is missing or no sound safetensors file.
    """
    metadata = read_header(path).get("__metadata__", {})
    return {name: text for name, text in metadata.items() if name != CHECKSUMS}


def _sums(path: str, raw: bytes, header: dict[str, dict], entry: str, strict: bool) -> dict[str, str]:
    """The checksums of a file's tensors by name; empty where it has none, or another program put other tensors in.

    Args:
        raw: the header as it stands in the file.
        entry: of its metadata, empty in files of others and of earlier versions.

    Raises:
        RunError: the header was changed, and `strict`.
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
        log.warning("Graft: the header of %s is not as it was written: it was edited, or is damaged.", path)
    return {name: digits[8 * place :][:8] for place, name in enumerate(sorted(header))} if same else {}


def _changed(path: str, what: str) -> RunError:
    return RunError(
        f"The file '{path}' is damaged: {what} is not as it was written, by its checksum.",
        "Restore it from a copy or choose another file. If a program changed it on purpose, remove the entry "
        f"{CHECKSUMS} from its metadata.",
    )


def read_header(path: str) -> dict[str, dict]:
    """The header of a safetensors file: what is known of each tensor by its name, and `__metadata__`.

    Raises:
        RunError: naming the file, when it is missing, no safetensors file, or its header and its bytes do not agree.
    """
    return _read_header(path)[1]


def _read_header(path: str) -> tuple[bytes, dict[str, dict]]:
    """The header of a file as it stands there, and what it says. Raises as `read_header` does."""
    try:
        with open(path, "rb") as file:
            size = struct.unpack("<Q", _exactly(file, 8))[0]
            if size > _HEADER_LIMIT:
                raise ValueError(f"a header of {size} bytes")
            raw = _exactly(file, size)
            header = parse_json(raw.decode("utf-8"), _unique)
            present = os.fstat(file.fileno()).st_size - 8 - size
        _check_header(header, present)
        return raw, header
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> RunError:
    return RunError(
        f"The file '{path}' cannot be read as safetensors ({error}).",
        "It is missing, damaged, or of another format; restore it or choose another.",
    )


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"it ends after {len(data)} of {size} bytes of its head")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different: of two of a name each reader might take another."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


def _check_header(header: Any, present: int) -> None:
    """Refuses a header that lies, before anything is reserved for what it says.

    Args:
        present: bytes behind it.

    Raises:
        ValueError: it is none, or not of so many bytes.
    """
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no texts by name")
    spans = sorted(_span(name, row) for name, row in header.items() if name != "__metadata__")
    end = 0
    for start, stop in spans:
        if start != end:
            raise ValueError(f"tensors overlap or leave a gap at byte {min(start, end)}")
        end = stop
    if end != present:
        raise ValueError(f"{present} bytes of data where its header says {end}")


def _span(name: str, row: Any) -> tuple[int, int]:
    """Where a tensor's bytes lie. Raises ValueError when they are not as many as its shape and dtype need."""
    shown = name[:80]
    try:
        dtype, shape, (start, stop) = row["dtype"], row["shape"], row["data_offsets"]
        whole = len(shape) <= _MOST_DIMENSIONS and isinstance(shape, list)
        whole = whole and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"what its header says of {shown} is not whole") from error
    if not whole or not isinstance(dtype, str):
        raise ValueError(f"what its header says of {shown} is not whole")
    if dtype not in _BYTES:
        raise ValueError(f"{shown} is of the unknown dtype {dtype[:20]}")
    needed = _BYTES[dtype] * math.prod(shape)
    if needed != stop - start:
        raise ValueError(f"{shown} has {stop - start} bytes where its shape and dtype need {needed}")
    return start, stop


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None):
    """The value of a JSON text from anywhere.

    Args:
        pairs: makes a value of an object's pairs; may raise ValueError.

    Raises:
        ValueError: it is none, or nested too deeply to be read.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
            return parse_json(file.read())
    except (OSError, ValueError) as error:
        raise RunError(f"The file '{path}' cannot be read as JSON ({error}).", "Remove or restore it.") from error


def write_own_json(path: str, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a checksum that `read_own_json` compares."""
    write_json(path, {**value, _CHECKSUM: _json_sum(value)})


def read_own_json(path: str) -> Any:
    """Return the value in a JSON file, without its checksum; files of earlier versions have none.

    Raises:
        RunError: naming the file, when it is not JSON, or not as it was written.
    """
    value = read_json(path)
    if not isinstance(value, dict) or _CHECKSUM not in value:
        return value
    given = value.pop(_CHECKSUM)
    if given != _json_sum(value):
        raise RunError(
            f"The file '{path}' is not as it was written: it is damaged, or was edited.",
            f"Restore it or remove it. If you edited it on purpose, remove its entry {_CHECKSUM}.",
        )
    return value


def _json_sum(value: dict[str, Any]) -> str:
    # Read back first: names that are numbers become texts, and sort otherwise.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"


def file_hash(path: str) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def sweep(folder: str, older_than: float = OLD) -> None:
    """Remove temporary files of `replacing` that a killed process left in a folder, once they are old.

    Args:
        older_than: seconds; younger files stay. 0 only where no other process can write there, as in the folder of a
            run that is held.
    """
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if not _TEMPORARY.fullmatch(entry.name) or is_link(entry.path):
            continue
        # Another process may finish or sweep it meanwhile.
        with suppress(FileNotFoundError):
            aged = not older_than or time.time() - entry.stat(follow_symlinks=False).st_mtime > older_than
            if aged and entry.is_file(follow_symlinks=False):
                os.remove(entry.path)
