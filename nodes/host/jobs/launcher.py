"""Launcher of a graph's training in several processes on this machine, each with its own GPU.

Each process runs the pack's job.py as another machine would. The graph waits, shows the events of the main process,
and forwards the user's commands.
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
from pathlib import Path
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
from ..server.control import REGISTRY, UserCommand
from . import provenance

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from ....trainers.data.examples import Dataset
    from ....trainers.protocols import Host
    from ....trainers.recipe.recipe import Recipe

log = logging.getLogger(__name__)

_JOB = str(Path(__file__).resolve().parents[3] / "job.py")
_WORKER = "graft_job"

# Seconds: of one wait, for processes to save and exit after the user cancelled, and after a pause or a failure.
_PAUSE = 0.05
_GRACE = 4.5
_LONG_GRACE = 60.0


def check_count(count: int) -> None:
    """Refuse more processes than there are GPUs, and GPUs that cannot communicate.

    Raises:
        SettingsError: names the option.
    """
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return
    there = count_devices(device)
    if count > there:
        raise SettingsError(
            f"processes is {count}, but PyTorch sees {there} GPUs here.",
            f"Set processes in Graft Run Options to at most {there}, or run the job elsewhere (Graft Export Job).",
            "options",
        )
    by_nccl = comfy.model_management.is_nvidia() or comfy.model_management.is_amd()
    if by_nccl and not torch.distributed.is_nccl_available():
        raise SettingsError(
            "This PyTorch is built without NCCL, which several GPUs need to train together. On Windows it always is.",
            "Set processes in Graft Run Options to 1, or run the job on Linux (Graft Export Job).",
            "options",
        )


def count_devices(device: torch.device) -> int:
    """Return the number of devices of a device's type."""
    # Use the device type's own module: ComfyUI runs with versions of torch that lack torch.accelerator.
    kind = getattr(torch, device.type, None)
    return 1 if device.type == "cpu" or kind is None else kind.device_count()


def train(recipe: Recipe, dataset: Dataset, host: Host, node: str) -> tuple[str, int]:
    """Train a recipe to the end of its run in its number of processes. Return the run's name and its start step.

    Raises:
        GraftError: a process raised it, or a process was lost; progress is saved.
        InterruptProcessingException: ComfyUI's interruption, after progress was saved and the processes have ended.
    """
    check_count(recipe.processes)
    # The model's files are on this machine, so the job need not list them.
    base = provenance.describe(node, host, files=False)
    # ComfyUI empties this folder after a server that was killed.
    folder = os.path.join(folder_paths.get_temp_directory(), f"graft-{secrets.token_hex(6)}")
    try:
        write_local_job(folder, recipe, dataset, host, paths.folders(), base)
        # The processes put their own copies of the model on the devices.
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        workers = WorkerGroup(folder, recipe.processes)
        try:
            return workers.wait(host)
        finally:
            workers.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Worker:
    """A process of the training.

    Attributes:
        last: its final message, None while there is none.
    """

    process: BaseProcess
    pipe: Connection
    last: tuple | None = None

    def messages(self) -> Iterator[tuple]:
        """Yield the messages that arrived since the last call."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if message[0] != "event":
                    self.last = message
                yield message
        except (EOFError, OSError):
            return

    def send(self, message: str) -> None:
        """Send a message; a process that has ended ignores it."""
        try:
            self.pipe.send(message)
        except (BrokenPipeError, OSError) as error:
            log.debug("Graft: %s", error)

    @property
    def failed(self) -> bool:
        """Report whether the process ended in any way but done."""
        is_unfinished = self.last is not None and self.last[0] != "done"
        return is_unfinished or self.process.exitcode not in (None, 0)


class WorkerGroup:
    """The processes of one training."""

    def __init__(self, folder: str, count: int):
        from torch import multiprocessing
        from torch.distributed import TCPStore

        # Rendezvous of the processes; the system chooses a free port.
        self._store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._workers: list[Worker] = []
        self._run = ("", 0)
        context = multiprocessing.get_context("spawn")
        try:
            for rank in range(count):
                ours, theirs = context.Pipe()
                given = {
                    "folder": folder,
                    "comfyui": os.path.dirname(os.path.abspath(folder_paths.__file__)),
                    "environment": _environment(rank, count, self._store.port),
                    "pipe": theirs,
                }
                arguments = (_JOB, {"GRAFT_WORKER": given}, _WORKER)
                process = context.Process(target=runpy.run_path, args=arguments, daemon=True)
                with _nameless_main():
                    process.start()
                theirs.close()
                self._workers.append(Worker(process, ours))
        except BaseException:
            self.end()
            raise

    def wait(self, host: Host) -> tuple[str, int]:
        """Wait until all processes are done. Raises as `train`."""
        stopping = False
        until = math.inf
        try:
            while self._runs() and time.monotonic() < until:
                self._forward_messages(host.report)
                host.check_interrupt()
                command = host.next_command()
                if command is Command.SAVE or (command is Command.STOP and not stopping):
                    self._workers[0].send(command.value)
                stopping = stopping or command is Command.STOP
                if until == math.inf and any(worker.failed for worker in self._workers):
                    # The other processes stop too, and the main process saves.
                    until = time.monotonic() + _LONG_GRACE
            self._forward_messages(host.report)
        except comfy.model_management.InterruptProcessingException:
            self._leave(host)
            raise
        self._raise_cause()
        return self._run

    def _runs(self) -> bool:
        """Report whether a process may still send a message; its work after the final message does not matter."""
        return any(worker.process.exitcode is None and worker.last is None for worker in self._workers)

    def _forward_messages(self, report: Callable[[str, dict], None]) -> None:
        from multiprocessing.connection import wait

        live = [worker for worker in self._workers if worker.process.exitcode is None]
        wait([worker.pipe for worker in live] + [worker.process.sentinel for worker in live], _PAUSE)
        for worker in self._workers:
            for message in worker.messages():
                if message[0] == "event":
                    self._forward(*message[1:], report)

    def _forward(self, event: str, payload: dict, report: Callable[[str, dict], None]) -> None:
        if event == "run":
            self._run = (payload["name"], payload["step"])
        if event == "sample":
            payload = {**payload, "pictures": [_opened(path) for path in payload["paths"]]}
        report(event, payload)

    def _leave(self, host: Host) -> None:
        """Let all processes save and end, after a cancel within a few seconds."""
        for worker in self._workers:
            worker.send("leave")

        def note(event: str, payload: dict) -> None:
            if event == "saved":
                try:
                    host.report(event, payload)
                except comfy.model_management.InterruptProcessingException:
                    # The user cancelled twice.
                    return

        training = REGISTRY.current
        is_paused = training is not None and training.end is UserCommand.PAUSE
        until = time.monotonic() + (_LONG_GRACE if is_paused else _GRACE)
        while self._runs() and time.monotonic() < until:
            self._forward_messages(note)
        self._forward_messages(note)

    def _raise_cause(self) -> None:
        """Raise the training's error: one that a process reported, or the loss of a process."""
        final = [worker.last for worker in self._workers if worker.last is not None]
        for message in final:
            if message[0] == "failed":
                raise _error_of(*message[1:])
        for rank, worker in enumerate(self._workers):
            if worker.last is None:
                raise RunError(
                    f"Process {rank} of the training was lost (exit code {worker.process.exitcode}).",
                    "Saved progress is kept: queue the graph again to continue.",
                )
        for kind, error in (
            ("interrupted", comfy.model_management.InterruptProcessingException),
            ("peer_lost", PeerLostError),
        ):
            if any(message[0] == kind for message in final):
                raise error()

    def end(self) -> None:
        """Kill the processes that still run, and wait until they have ended."""
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._workers = []


def _error_of(kind: str, message: str, cure: str, given: str) -> Exception:
    error_class = getattr(errors, kind, None)
    return RuntimeError(message) if error_class is None else error_class(message, cure, given)


def _opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        # The graph hosts the store; the processes only connect to it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))
    return variables


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Hide ComfyUI's main.py from new processes, which multiprocessing would run in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
