"""Lock of a run, so that two processes, or two computers with one output folder, never train or delete it at once.

The lock is a file next to the run's folder. Its holder keeps an operating system lock on the file, writes a record of
itself into it and touches it every few seconds. The operating system releases its lock when a process dies, so a killed
training does not block the run. If the file system has no such locks, or does not share them between computers, the
record decides.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, fields

from ..errors import RunError, RunHeldError
from ..formats.json_files import parse_json

log = logging.getLogger(__name__)

# Seconds between two heartbeats, and seconds without a heartbeat after which another computer's lock is stale.
HEARTBEAT = 5.0
LIMIT = 60.0

_RECORD_LIMIT = 4096
_TRIES = 20
_SUFFIX = ".lock"
# Other processes cannot read a locked byte on Windows, so lock one beyond the record.
_LOCKED_BYTE = 1 << 30


@dataclass(frozen=True)
class Holder:
    """Process that holds a lock.

    Attributes:
        system: changes with every boot of the computer; processes with the same value share a kernel.
        space: namespace of its process id; ids of different containers cannot be compared.
        started: start time of the process in the kernel's units; empty if unknown.
        since: time when it took the lock, seconds since the epoch.
        token: unique for each time that a lock is taken.
    """

    host: str
    system: str
    space: str
    process: int
    started: str
    since: float
    token: str

    @classmethod
    def here(cls) -> Holder:
        """Return a record of this process with a new token."""
        process = os.getpid()
        return cls(
            platform.node(), _system(), _process_space(), process, _started(process), time.time(), secrets.token_hex(8)
        )

    def is_alive(self) -> bool | None:
        """Report whether the process still runs; None if this computer cannot tell."""
        if not self.started or (self.system, self.space) != (_system(), _process_space()):
            return None
        return _started(self.process) == self.started

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"process {self.process} on the computer '{self.host}', since {since}"


class RunLock:
    """Lock that this process holds. Call `acquire` to create one."""

    def __init__(self, path: str, name: str, descriptor: int, holder: Holder):
        self.holder = holder
        self._path = path
        self._name = name
        self._descriptor = descriptor
        self._lost = False
        self._beaten = time.time()
        self._mutex = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_end, name="graft run lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that this process still holds the lock. Call it before each write to the run.

        Raises:
            RunHeldError: another computer took the lock over, because this one sent no heartbeat for too long.
        """
        # Use the wall clock: a monotonic clock may stop while the computer sleeps.
        if abs(time.time() - self._beaten) > 2 * HEARTBEAT:
            self._beat()
        if self._lost:
            raise RunHeldError(
                f"Another ComfyUI took over the run '{self._name}', because this one did not respond for {LIMIT:g} s.",
                "Let the other one finish. Graft has kept the earlier saves.",
            )

    def release(self) -> None:
        """Free the run."""
        self._ended.set()
        self._thread.join()
        if os.name == "nt":
            # Windows cannot remove an open file. If another process has opened it meanwhile, that process keeps it.
            os.close(self._descriptor)
            self._remove_own()
        else:
            self._remove_own()
            os.close(self._descriptor)

    def _remove_own(self) -> None:
        with suppress(OSError):
            holder = read_holder(self._path)
            if holder is not None and holder.token == self.holder.token:
                _remove(self._path)

    def _beat_until_end(self) -> None:
        while not self._ended.wait(HEARTBEAT):
            self._beat()

    def _beat(self) -> None:
        with self._mutex:
            if self._ended.is_set() or self._lost:
                return
            try:
                holder = read_holder(self._path)
                if holder is not None and holder.token != self.holder.token:
                    self._lost = True
                    return
                # If the file was removed, by hand or with its folder, nobody else holds the lock.
                if holder is not None:
                    os.utime(self._path)
            except OSError as error:
                # A network share may be unavailable for a moment. `check` tries again later.
                log.debug("Graft: cannot update the lock %s: %s", self._path, error)
                return
            self._beaten = time.time()


def lock_path(folder: str) -> str:
    """Return the path of the lock file for a run's folder."""
    parent, name = os.path.split(os.path.abspath(folder))
    return os.path.join(parent, f".{name}{_SUFFIX}")


def acquire(folder: str) -> RunLock:
    """Take the lock of a run's folder. The folder need not exist.

    Raises:
        RunHeldError: another process holds it.
        RunError: the lock cannot be written.
    """
    path, name = lock_path(folder), os.path.basename(folder)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for _ in range(_TRIES):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | _BINARY, 0o666)
            try:
                lock = _take(path, name, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            if lock is not None:
                return lock
            # Another process removed or replaced the file meanwhile.
            os.close(descriptor)
        raise OSError("other processes keep changing it, or nobody can remove it")
    except OSError as error:
        raise RunError(
            f"The file '{path}' cannot be written ({error}).",
            "Make the folder writable; if the file is a link, remove it.",
        ) from error


def _take(path: str, name: str, descriptor: int) -> RunLock | None:
    """Take the lock through its open file. Return None if the path no longer leads to this file.

    Raises:
        RunHeldError: another process holds it.
    """
    locked = _lock_file(descriptor)
    if not _is_same_file(path, descriptor):
        return None
    holder = _parse(os.pread(descriptor, _RECORD_LIMIT, 0) if hasattr(os, "pread") else _read_all(descriptor))
    if not _is_left_behind(path, holder, locked):
        raise RunHeldError(
            f"Another training uses the run '{name}': {holder or 'an unknown process'}.",
            "Wait until it ends, or stop it there. To train at the same time, give this run another name in Graft Run "
            f"Options. If that computer was switched off, the run is free {LIMIT:g} s after its last heartbeat.",
        )
    if locked is False:
        # The holder is gone, but its child process or a network share's server still keeps the old file locked.
        _remove(path)
        return None
    own = Holder.here()
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps(asdict(own)).encode())
    os.fsync(descriptor)
    return RunLock(path, name, descriptor, own)


def _is_left_behind(path: str, holder: Holder | None, locked: bool | None) -> bool:
    """Report whether a lock is stale, so that nobody holds it.

    Args:
        holder: the record in it, None if it has none.
        locked: whether this process could lock the file; None if the file system has no locks.
    """
    if holder is None:
        # The file is new, or its holder has not written a record yet.
        return locked is not False
    if holder.system == _system():
        if locked:
            return True
        alive = holder.is_alive()
        if alive is not None:
            return not alive
        if locked is False:
            return False
    return _age(path) > LIMIT


def read_holder(path: str) -> Holder | None:
    """Return the record in a lock file, None if there is no file or no valid record."""
    try:
        with open(path, "rb") as file:
            return _parse(file.read(_RECORD_LIMIT))
    except FileNotFoundError:
        return None


def find_holder(folder: str) -> Holder | None:
    """Return the live holder of a run's lock, None if there is none, without taking the lock."""
    path = lock_path(folder)
    with suppress(OSError):
        holder = read_holder(path)
        alive = None if holder is None else holder.is_alive()
        if alive is None and holder is not None:
            alive = _age(path) <= LIMIT
        return holder if alive else None
    return None


def earliest_start(parent: str) -> float:
    """Return the earliest time at which a present holder locked a run in a folder, seconds since the epoch.

    Returns the present time if no run is locked.
    """
    names = os.listdir(parent) if os.path.isdir(parent) else []
    runs = [name[1 : -len(_SUFFIX)] for name in names if name.startswith(".") and name.endswith(_SUFFIX)]
    holders = [find_holder(os.path.join(parent, run)) for run in runs]
    return min([time.time(), *(holder.since for holder in holders if holder is not None)])


def _parse(data: bytes) -> Holder | None:
    try:
        value = parse_json(data)
        holder = Holder(**value)
    except (ValueError, TypeError):
        return None
    kinds = {"process": (int,), "since": (int, float)}
    sound = all(type(getattr(holder, field.name)) in kinds.get(field.name, (str,)) for field in fields(Holder))
    return holder if sound else None


def _age(path: str) -> float:
    """Return the seconds since the last heartbeat, by the file system's clock, because computers' clocks may differ."""
    probe = os.path.join(os.path.dirname(path), f".graft.{secrets.token_hex(4)}.tmp")
    with open(probe, "wb"):
        pass
    try:
        return os.stat(probe).st_mtime - os.stat(path).st_mtime
    finally:
        os.remove(probe)


def _is_same_file(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove(path: str) -> None:
    with suppress(FileNotFoundError, PermissionError):
        os.remove(path)


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, _RECORD_LIMIT)


_BINARY = getattr(os, "O_BINARY", 0)


def _lock_file(descriptor: int) -> bool | None:
    """Take the system's lock. Return False if another process has it, None if the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        log.debug("Graft: the file system has no locks: %s", error)
        return None
    return True


def _system() -> str:
    """Return an id that differs between computers and, if the system provides one, between boots of a computer."""
    address = uuid.getnode()
    if address >> 40 & 1:
        # Without a network card, Python draws a random number in each process.
        address = 0
    return _read_text("/proc/sys/kernel/random/boot_id") or f"{platform.system()} {platform.node()} {address:x}"


def _process_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str:
    """Return a process's start time in Linux's units, empty if it does not run or the system does not report it."""
    # The command name may contain spaces and parentheses, so split after its last one.
    row = _read_text(f"/proc/{process}/stat").rpartition(")")[2].split()
    # A zombie has ended.
    return row[19] if len(row) > 19 and row[0] not in "ZX" else ""


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
