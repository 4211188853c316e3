"""A training in the graph by several processes on this machine, each with a GPU of its own.

Each of them runs the pack's job.py as a machine elsewhere would. The graph waits, shows what the one that leads tells,
and hands on what is asked.
"""

from __future__ import annotations

import logging
import math
import os
import runpy
import secrets
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import comfy.model_management
import folder_paths
import torch
from PIL import Image

from ....trainers import errors
from ....trainers.engine.job import write_local_job
from ....trainers.errors import PeerLostError, RunError, SettingsError
from ....trainers.protocols import Command
from .. import paths
from . import provenance

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from ....trainers.data.examples import Dataset
    from ....trainers.protocols import Host
    from ....trainers.recipe.recipe import Recipe

log = logging.getLogger(__name__)

_JOB = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))), "job.py")
_SEATED = "graft_job"

# How long the graph waits at a time; how long it lets processes save and leave before it ends them, when the user
# cancelled, and when one of them failed.
_PAUSE = 0.05
_GRACE = 4.5
_LONG_GRACE = 60.0


def check_count(count: int) -> None:
    """Refuses more processes than there are GPUs, and GPUs that have no way to tell each other anything.

    Raises:
        SettingsError: naming the option.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return
    # Of the kind's own module: torch.accelerator is not in every version that the host takes.
    kind = getattr(torch, device.type, None)
    there = 1 if kind is None else kind.device_count()
    if count > there:
        raise SettingsError(
            f"processes is {count}, but PyTorch sees {there} GPUs here.",
            "Set processes in Graft Run Options to at most that, or run the job elsewhere (Graft Export Job).",
            "options",
        )
    by_nccl = comfy.model_management.is_nvidia() or comfy.model_management.is_amd()
    if by_nccl and not torch.distributed.is_nccl_available():
        raise SettingsError(
            "PyTorch is built without NCCL here, by which GPUs train together; on Windows it always is.",
            "Set processes in Graft Run Options to 1, or run the job under Linux (Graft Export Job).",
            "options",
        )


def train(recipe: Recipe, dataset: Dataset, host: Host, node: str) -> tuple[str, int]:
    """Trains a recipe by its number of processes to the end of its run; the run's name and the step it went on from.

    Raises:
        GraftError: of any of the processes, or that one was lost; what was reached is saved.
        The host's interruption, after what was reached was saved and the processes have ended.
    """
    check_count(recipe.processes)
    # The files are this machine's own.
    base = provenance.describe(node, host, files=False)
    # Where the host clears up after a server that was killed.
    folder = os.path.join(folder_paths.get_temp_directory(), f"graft-{secrets.token_hex(6)}")
    try:
        write_local_job(folder, recipe, dataset, host, paths.folders(), base)
        # The processes put their own copies on the devices.
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        crew = WorkerGroup(folder, recipe.processes)
        try:
            return crew.attend(host)
        finally:
            crew.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Worker:
    """One process.

    Attributes:
        last: what it said before it ended, None while it has not.
    """

    process: BaseProcess
    pipe: Connection
    last: tuple | None = None

    def messages(self) -> Iterator[tuple]:
        """What it has said since."""
        try:
            while self.pipe.poll():
                word = self.pipe.recv()
                if word[0] != "event":
                    self.last = word
                yield word
        except (EOFError, OSError):
            return

    def say(self, word: str) -> None:
        """Tells it something; one that has ended does not hear it."""
        try:
            self.pipe.send(word)
        except (BrokenPipeError, OSError) as error:
            log.debug("Graft: %s", error)

    @property
    def failed(self) -> bool:
        """Whether it ended otherwise than by being done."""
        said = self.last is not None and self.last[0] != "done"
        return said or self.process.exitcode not in (None, 0)


class WorkerGroup:
    """The processes of one training, and what the graph knows of them."""

    def __init__(self, folder: str, count: int):
        from torch import multiprocessing
        from torch.distributed import TCPStore

        # Where they find each other; the system chooses a port that is free.
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._members: list[Worker] = []
        self._run = ("", 0)
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(count):
                ours, theirs = context.Pipe()
                seat = {
                    "folder": folder,
                    "comfyui": os.path.dirname(os.path.abspath(folder_paths.__file__)),
                    "environment": _environment(rank, count, self._store.port),
                    "pipe": theirs,
                }
                arguments = (_JOB, {"GRAFT_SEAT": seat}, _SEATED)
                member = context.Process(target=runpy.run_path, args=arguments, daemon=True)
                with _nameless_main():
                    member.start()
                theirs.close()
                self._members.append(Worker(member, ours))
        except BaseException:
            self.end()
            raise

    def attend(self, host: Host) -> tuple[str, int]:
        """Waits until all are done. Raises as `train`."""
        stopping = False
        until = math.inf
        try:
            while self._runs() and time.monotonic() < until:
                self._hear(host.report)
                host.check_interrupt()
                asked = host.next_command()
                if asked is Command.SAVE or (asked is Command.STOP and not stopping):
                    self._members[0].say(asked.value)
                stopping = stopping or asked is Command.STOP
                if until == math.inf and any(member.failed for member in self._members):
                    # The others learn of it, and the one that leads saves.
                    until = time.monotonic() + _LONG_GRACE
            self._hear(host.report)
        except comfy.model_management.InterruptProcessingException:
            self._leave(host)
            raise
        self._raise_cause()
        return self._run

    def _runs(self) -> bool:
        """Whether one has still something to say: what they do after their last word is of no account."""
        return any(member.process.exitcode is None and member.last is None for member in self._members)

    def _hear(self, report: Callable[[str, dict], None]) -> None:
        """Passes on what is said for a moment."""
        from multiprocessing.connection import wait

        live = [member for member in self._members if member.process.exitcode is None]
        wait([member.pipe for member in live] + [member.process.sentinel for member in live], _PAUSE)
        for member in self._members:
            for word in member.messages():
                if word[0] == "event":
                    self._pass_on(*word[1:], report)

    def _pass_on(self, event: str, payload: dict, report: Callable[[str, dict], None]) -> None:
        if event == "run":
            self._run = (payload["name"], payload["step"])
        if event == "sample":
            payload = {**payload, "pictures": [_opened(path) for path in payload["paths"]]}
        report(event, payload)

    def _leave(self, host: Host) -> None:
        """Lets all save and end, within some seconds."""
        for member in self._members:
            member.say("leave")

        def note(event: str, payload: dict) -> None:
            if event == "saved":
                try:
                    host.report(event, payload)
                except comfy.model_management.InterruptProcessingException:
                    # Cancelled twice.
                    return

        until = time.monotonic() + _GRACE
        while self._runs() and time.monotonic() < until:
            self._hear(note)
        self._hear(note)

    def _raise_cause(self) -> None:
        """Raises what the training failed by: what one said of itself, or that one ended without a word."""
        said = [member.last for member in self._members if member.last is not None]
        for word in said:
            if word[0] == "failed":
                raise _error_of(*word[1:])
        for rank, member in enumerate(self._members):
            if member.last is None:
                raise RunError(
                    f"Process {rank} of the training was lost (exit code {member.process.exitcode}).",
                    "What was saved stays: queue the graph again to go on.",
                )
        for kind, error in (
            ("interrupted", comfy.model_management.InterruptProcessingException),
            ("parted", PeerLostError),
        ):
            if any(word[0] == kind for word in said):
                raise error()

    def end(self) -> None:
        """Ends those that still run, and waits until they have."""
        for member in self._members:
            if member.process.is_alive():
                member.process.kill()
        for member in self._members:
            member.process.join()
            member.process.close()
            member.pipe.close()
        self._members = []


def _error_of(kind: str, message: str, cure: str, given: str) -> Exception:
    made = getattr(errors, kind, None)
    return RuntimeError(message) if made is None else made(message, cure, given)


def _opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torch looks for in the processes that a launcher has started."""
    found = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        # The graph keeps the store, and they only connect to it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return found


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Within it a new process does not run ComfyUI's main.py, as it would to find what it is to run there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
