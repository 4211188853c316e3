"""A job in its own process: ComfyUI's model code without its server, alone or in a process group."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import comfy.model_management
import folder_paths
import torch
import utils.extra_config
from comfy.cli_args import args

from ....trainers.engine.job import Job, read_job
from ....trainers.engine.session import Result, run_recipe, task_of
from ....trainers.errors import GraftError, ModelError, PeerLostError
from ....trainers.protocols import Host
from .. import paths
from ..model.checks import check_sockets
from ..model.denoiser import ComfyDenoiser
from ..model.preview_model import ComfyPreviewModel, PreviewChoice
from ..model.text_encoder import ComfyText
from ..model.vae import ComfyCodec
from ..server.control import REGISTRY, Training, UserCommand, check_interrupt
from ..server.progress import log_step
from . import provenance

if TYPE_CHECKING:
    from ....trainers.distributed.accelerate_group import AccelerateGroup

log = logging.getLogger(__name__)

DONE, FAILED, INTERRUPTED = 0, 1, 130

Report = Callable[[str, dict[str, Any]], None]


def main(folder: str, group: AccelerateGroup, given: dict[str, Any] | None) -> int:
    """Run the job in a folder to its end, and return the exit status.

    Args:
        given: data from the graph for a process that it started, None outside a graph.
    """
    # ComfyUI's own logging setup takes other arguments in each version and writes a file. `force` removes the handlers
    # of libraries, which would print every line twice.
    logging.basicConfig(level=logging.INFO if group.is_main else logging.WARNING, format="%(message)s", force=True)
    pipe = None if given is None else given["pipe"]
    with REGISTRY.register("") as training, _interruptible(pipe, training):
        output = _Terminal(group) if pipe is None else _Relay(group, pipe, training)
        try:
            result = _run(folder, group, output, training, pipe is not None)
        except comfy.model_management.InterruptProcessingException:
            return output.interrupted()
        except Exception as error:
            return output.failed(error)
    output.done(result)
    group.close()
    return DONE


def _run(folder: str, group: AccelerateGroup, report: Report, training: Training, is_local: bool) -> Result:
    try:
        set_paths()
        job = read_job(folder, is_local)
        with torch.inference_mode(False), torch.enable_grad():
            if group.local_rank <= 0:
                provenance.check_files(job.base)
            host = job.host(_host(job, group, report, training))
            folders = job.folders(paths.folders())
            _check_embeddings(job, task_of(job.recipe, job.dataset, host, folders).embedded)
            return run_recipe(job.recipe, job.dataset, host, folders)
    except PeerLostError:
        raise
    except BaseException:
        # Other processes on the way to an all-reduce would wait for this one.
        group.abort()
        raise


def _host(job: Job, group: AccelerateGroup, report: Report, training: Training) -> Host:
    # The main process draws the pictures.
    sockets = (*provenance.SOCKETS, provenance.PREVIEW) if group.is_main else provenance.SOCKETS
    base = provenance.load(job.base, sockets)
    model, clip, vae = (base.get(socket) for socket in provenance.SOCKETS)
    check_sockets(model, clip, vae)
    text = ComfyText(clip)
    denoiser = ComfyDenoiser(model, text, vae)
    preview_model = None
    if provenance.PREVIEW in base:
        choice = PreviewChoice(base[provenance.PREVIEW], "")
        preview_model = ComfyPreviewModel(choice, denoiser, clip, vae, job.recipe.preview_strength)
    host = Host(denoiser, text, ComfyCodec(vae), report, training.next_command, check_interrupt, group, preview_model)
    # Jobs of earlier versions have fingerprints of another kind.
    before = provenance.earlier_fingerprints(host)
    for socket, fingerprint in provenance.fingerprints(host).items():
        if job.base["fingerprints"].get(socket) not in (fingerprint, before[socket]):
            raise ModelError(
                f"The loaded {socket} differs from the one that the job was made with.",
                "Use the same options of ComfyUI as then (such as --fp32-vae) and the same version, or export the job "
                "again.",
                socket,
            )
    return host


def _check_embeddings(job: Job, embedded: str) -> None:
    """Raise ModelError if the embedding files that the job's texts call are not those that it was made with."""
    if job.embedded is not None and job.embedded != embedded:
        raise ModelError(
            "The job's captions use an embedding (embedding:NAME) whose file is missing here, or differs.",
            "Copy the file from the machine that exported the job into ComfyUI's models/embeddings, or export the job "
            "again.",
            "clip",
        )


def set_paths() -> None:
    """Set ComfyUI's paths from its options and files, as its main.py does before it starts the server."""
    root = os.path.dirname(os.path.abspath(folder_paths.__file__))
    usual = os.path.join(root, "extra_model_paths.yaml")
    for path in ([usual] if os.path.isfile(usual) else []) + list(
        itertools.chain(*(args.extra_model_paths_config or []))
    ):
        utils.extra_config.load_extra_path_config(path)
    for given, use in (
        (args.output_directory, folder_paths.set_output_directory),
        (args.input_directory, folder_paths.set_input_directory),
        (args.user_directory, folder_paths.set_user_directory),
    ):
        if given:
            use(os.path.abspath(given))
    output = folder_paths.get_output_directory()
    for kind in ("checkpoints", "clip", "vae", "diffusion_models", "loras"):
        folder_paths.add_model_folder_path(kind, os.path.join(output, kind))
    paths.register()


@contextmanager
def _interruptible(pipe, training: Training):
    """Let signals, or messages of the graph, interrupt where ComfyUI's own Cancel does."""
    if pipe is not None:
        threading.Thread(target=_listen, args=(pipe, training), daemon=True).start()

    def interrupt(number, frame) -> None:
        comfy.model_management.interrupt_current_processing()

    before = {signum: signal.signal(signum, interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _listen(pipe, training: Training) -> None:
    """Execute the graph's messages; if the graph is gone, end this process at once."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(FAILED)
        if message == "leave":
            comfy.model_management.interrupt_current_processing()
        else:
            training.submit(UserCommand(message))


def _check_interrupt_after(event: str) -> None:
    """Raise ComfyUI's interruption, but not after a save: behind an error, the save would seem to have failed."""
    if event != "saved":
        check_interrupt()


class _Terminal:
    """The output of a job that was started by hand, printed by the main process."""

    def __init__(self, group: AccelerateGroup):
        self._group = group
        self._step = 0

    def __call__(self, event: str, payload: dict) -> None:
        if event == "step":
            self._step = payload["step"]
        _check_interrupt_after(event)
        if not self._group.is_main:
            return
        if event == "step":
            log_step(payload)
        elif event == "run":
            log.info("Graft: %d processes; the run is in %s", self._group.world_size, payload["folder"])
        elif event == "saved":
            log.info("Graft: saved step %d: %s", payload["step"], payload["path"])

    def interrupted(self) -> int:
        if self._group.is_main:
            log.info("Graft: interrupted after step %d, which is saved. Start the job again to continue.", self._step)
        return INTERRUPTED

    def failed(self, error: Exception) -> int:
        if isinstance(error, GraftError):
            log.error("Graft: %s", error)
        else:
            log.error("Graft: the job failed.", exc_info=error)
        return FAILED

    def done(self, result: Result) -> None:
        if self._group.is_main:
            log.info("Graft: done after step %d. Adapters are in %s", result.step, result.run.adapters)


class _Relay:
    """The output of a job that a graph started, sent to the graph and from there to its pages."""

    def __init__(self, group: AccelerateGroup, pipe, training: Training):
        self._group = group
        self._pipe = pipe
        self._training = training

    def __call__(self, event: str, payload: dict) -> None:
        """Send one event without its pictures, which are on disk."""
        if event == "step":
            self._training.step = payload["step"]
        if self._group.is_main:
            self._pipe.send(("event", event, {name: payload[name] for name in payload if name != "pictures"}))
        _check_interrupt_after(event)

    def interrupted(self) -> int:
        self._pipe.send(("interrupted",))
        return INTERRUPTED

    def failed(self, error: Exception) -> int:
        if isinstance(error, PeerLostError):
            self._pipe.send(("peer_lost",))
        elif isinstance(error, GraftError):
            self._pipe.send(("failed", type(error).__name__, error.message, error.cure, error.input))
        else:
            log.error("Graft: a process of the training failed.", exc_info=error)
            self._pipe.send(("failed", "", f"{type(error).__name__}: {error}", "", ""))
        return FAILED

    def done(self, result: Result) -> None:
        self._pipe.send(("done",))
