"""Atomic writes: a reader never sees half of a file or folder, and nothing is written through a link."""

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import RunError

# Seconds after which a temporary file counts as abandoned: a live writer modifies its file more often.
OLD = 3600.0


_CHUNK = 1 << 20


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{1,8}\.tmp", re.DOTALL)


def is_link(path: str) -> bool:
    """Report whether a path is a symbolic link or a junction."""
    # Python before 3.12 cannot detect junctions.
    is_junction = getattr(os.path, "isjunction", None)
    return os.path.islink(path) or (is_junction is not None and is_junction(path))


_LINK_CURE = (
    "Remove the link, or replace it with the folder. To use another disk, move the whole output folder "
    "(--output-directory)."
)


def refuse_links(root: str, path: str, cure: str = _LINK_CURE) -> None:
    """Check that no part of a path below a folder is a link. The folder itself may be a link.

    Args:
        root: the folder; `path` starts with it.

    Raises:
        RunError: a part is a link.
    """
    part = root
    for name in os.path.relpath(path, root).split(os.sep):
        part = os.path.join(part, name)
        if is_link(part):
            raise RunError(f"'{part}' is a link. Graft follows no links inside '{root}'.", cure)


def find_link(folder: str) -> str | None:
    """Return the path of the first link found anywhere in a folder, None if there is none."""
    for directory, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(directory, name)
            if is_link(path):
                return path
    return None


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Yield a temporary path in the same folder. Move that file to `path` if the block succeeds.

    Raises:
        RunError: the folder cannot be written or the disk is full. `path` is then unchanged.
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


def write_bytes(path: str, data: bytes) -> bool:
    """Write a file atomically. Return False if it holds these bytes already. Raise RunError as `replacing` does."""
    with suppress(OSError):
        if os.path.isfile(path) and os.path.getsize(path) == len(data):
            with open(path, "rb") as file:
                if file.read() == data:
                    return False
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
    return True


def check_room(folder: str, needed: int) -> None:
    """Check in advance that a folder, which need not exist yet, is writable and has enough free space.

    Raises:
        RunError: the folder is not writable or has less free space.
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
            f"The disk of '{folder}' has {free / 1e6:.0f} MB left, but a save takes {needed / 1e6:.0f} MB.",
            "Free space on that disk.",
        )


@contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Yield a temporary folder next to `path`. Rename it to `path` if the block succeeds, else remove it.

    Raises:
        RunError: the folder cannot be created, or `path` exists already.
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
    """Sync a folder to disk, so that a rename in it survives a crash. Do nothing if the system cannot."""
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


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest()


def sweep(folder: str, older_than: float = OLD) -> None:
    """Remove old temporary files of `replacing` that a killed process left in a folder.

    Args:
        folder: the folder to search; its subfolders stay as they are.
        older_than: seconds; younger files stay. Use 0 only if no other process can write to the folder, for example
            while this process holds the run.
    """
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if not _TEMPORARY.fullmatch(entry.name) or is_link(entry.path):
            continue
        # Another process may rename or remove the file meanwhile.
        with suppress(FileNotFoundError):
            aged = not older_than or time.time() - entry.stat(follow_symlinks=False).st_mtime > older_than
            if aged and entry.is_file(follow_symlinks=False):
                os.remove(entry.path)
