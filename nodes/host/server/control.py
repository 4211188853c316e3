"""What is asked of the trainings that run, from outside them: stop and keep, save now, pause."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, TypeVar

import comfy.model_management
from comfy_execution.utils import get_executing_context

from ....trainers.errors import GraftError, RunError
from ....trainers.protocols import Command
from ....trainers.runs.run import PAUSED, Run
from .messages import BEGIN, digest_of, send, sources_of, workflow_of

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

# So many runs are remembered with the prompt they were last in.
_MOST_PROMPTS = 256

# Letters of an error that is not one of ours.
_MOST_SAID = 2000


class UserCommand(Enum):
    """What can be asked of a training."""

    SAVE = "save"
    STOP = "stop"
    PAUSE = "pause"


class Training:
    """One that runs. The execution thread moves it on; any thread may ask something of it.

    Attributes:
        node: its execution id, also inside subgraphs.
        prompt: id of the prompt it is in, empty outside one.
        workflow: id of the workflow that prompt was queued from, empty where it came from no page.
        sources: what decides its result, as `sources_of` collects it; None where that is not known.
        inputs: digest of the sources, which tells it from others of the same node.
        run: the run, None until it is open.
        step, steps: done, and of the whole run.
        saved: the last step of which there is a state.
    """

    def __init__(self, node: str, prompt: str, workflow: str = ""):
        self.node = node
        self.prompt = prompt
        self.workflow = workflow
        self.sources = sources_of(prompt, node)
        self.inputs = digest_of(self.sources)
        self.run: Run | None = None
        self.step = 0
        self.steps = 0
        self.saved = 0
        self._lock = threading.Lock()
        self._save = False
        self._end: UserCommand | None = None
        self._leaving = False

    @property
    def end(self) -> UserCommand | None:
        """How it was asked to end, STOP or PAUSE; None while it was not."""
        return self._end

    def send(self, event: str, payload: dict[str, Any]) -> None:
        """Tells the pages something of it."""
        where = {"node": self.node, "prompt_id": self.prompt, "workflow": self.workflow, "inputs": self.inputs}
        send({**where, "event": event, **payload})

    def opened(self, run: Run, step: int, steps: int) -> None:
        """It works on a run from now on, from a step that is saved."""
        self.run = run
        self.step = self.saved = step
        self.steps = steps

    def ask(self, wish: UserCommand) -> None:
        """Asks for something; of STOP and PAUSE the later one holds."""
        with self._lock:
            if wish is UserCommand.SAVE:
                self._save = True
            else:
                self._end = wish

    def next_command(self) -> Command | None:
        """What the loop is to do after a step; a save is asked for once."""
        with self._lock:
            if self._end is UserCommand.STOP:
                return Command.STOP
            save, self._save = self._save, False
            return Command.SAVE if save else None

    def check_interrupt(self) -> None:
        """Raises the host's interruption, once, for a pause, and for a stop with nothing trained that could be kept."""
        ends = self._end is UserCommand.PAUSE or (self._end is UserCommand.STOP and not self.step)
        if ends and not self._leaving:
            # What is reached is saved on the way out, which is reported like any other save.
            self._leaving = True
            raise comfy.model_management.InterruptProcessingException()


class TrainingRegistry:
    """Where those who ask find the trainings that run."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: list[Training] = []
        self._prompts: dict[str, str] = {}
        self._lifted = 0
        self._current: ContextVar[Training | None] = ContextVar("graft_training", default=None)

    @property
    def current(self) -> Training | None:
        """The training that the calling code is part of."""
        return self._current.get()

    @property
    def lifted(self) -> int:
        """How often a stopped run was told to go on, or one deleted: the host must not answer from its cache then."""
        return self._lifted

    @contextmanager
    def register(self, node: str) -> Iterator[Training]:
        """A training that can be found as long as the block lasts."""
        context = get_executing_context()
        prompt = context.prompt_id if context is not None else ""
        training = Training(node, prompt, workflow_of(prompt))
        token = self._current.set(training)
        with self._lock:
            self._running.append(training)
        try:
            yield training
        finally:
            self._current.reset(token)
            with self._lock:
                self._running.remove(training)

    def all(self) -> list[Training]:
        """Those that run."""
        with self._lock:
            return list(self._running)

    def of_run(self, name: str) -> Training | None:
        """The one that works on a run."""
        return next((one for one in self.all() if one.run is not None and one.run.name == name), None)

    def of_node(self, node: str) -> Training | None:
        """The one of a node, also before its run is open."""
        return next((one for one in self.all() if one.node == node), None)

    def remember(self, run: str, prompt: str) -> None:
        """Keeps which prompt a run was last in."""
        with self._lock:
            self._prompts.pop(run, None)
            self._prompts[run] = prompt
            while len(self._prompts) > _MOST_PROMPTS:
                del self._prompts[next(iter(self._prompts))]

    def prompt_of(self, run: str) -> str:
        """Id of the prompt that a run was last in, empty when this server does not know."""
        with self._lock:
            return self._prompts.get(run, "")

    def forget(self, run: str) -> None:
        """A run was deleted: its graph, queued again, is to train, and not to be answered from the host's cache."""
        with self._lock:
            self._prompts.pop(run, None)
            self._lifted += 1

    def resume(self, run: Run) -> None:
        """Lets a stopped run go on when its graph is queued again.

        Raises RunError as `Run.forget_halt` does, RunHeldError where another process trains it.
        """
        with run.held():
            run.forget_halt()
        with self._lock:
            self._lifted += 1


# The routes of the one server and the nodes that it executes have to meet somewhere.
REGISTRY = TrainingRegistry()


def check_interrupt() -> None:
    """Raises the host's interruption when the user cancelled, or asked of the training here what ends it now."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    if REGISTRY.current is not None:
        REGISTRY.current.check_interrupt()


def is_hurried() -> bool:
    """Whether what can be left out should be: the training here was asked to stop."""
    return REGISTRY.current is not None and REGISTRY.current.end is UserCommand.STOP


def run_controlled(node: str, work: Callable[[Training], Outcome]) -> Outcome:
    """Does the work of a training node, which can then be asked to stop, save and pause.

    Args:
        work: called with the training; within another `attended` of the same node with that one's.

    Raises:
        The host's interruption, also for a pause: the prompt ends with it, and the next one runs.
    """
    outer = REGISTRY.current
    if outer is not None:
        return work(outer)
    with REGISTRY.register(node) as training:
        training.send(BEGIN, {"sources": training.sources})
        try:
            return work(training)
        except comfy.model_management.InterruptProcessingException:
            if training.end is not UserCommand.PAUSE:
                _tell_cancelled(training)
                raise
        except Exception as error:
            _tell_failed(training, error)
            raise
    # Here and not above: an exception that is being handled holds on to all that the training had on the device.
    _note_pause(training)
    _free_device()
    raise comfy.model_management.InterruptProcessingException()


def _tell_cancelled(training: Training) -> None:
    nothing = training.end is UserCommand.STOP and not training.step
    if nothing:
        log.info("Graft: stopped before the first step: nothing was trained that could be kept.")
    training.send("cancelled", {"step": training.step, "saved": training.saved, "nothing": nothing})


def _tell_failed(training: Training, error: Exception) -> None:
    if isinstance(error, GraftError):
        told = {"message": error.message, "cure": error.cure, "input": error.input}
    else:
        told = {"message": f"{type(error).__name__}: {error}"[:_MOST_SAID], "cure": "", "input": ""}
    training.send("failed", {**told, "step": training.step, "saved": training.saved})


def _note_pause(training: Training) -> None:
    log.info("Graft: paused at step %d. Queue the same graph again to go on.", training.saved)
    name = "" if training.run is None else training.run.name
    # Where nothing is saved there is nothing to go on with, and what lies in the folder may be an earlier run's.
    if training.saved:
        try:
            with training.run.held():
                training.run.note_halt(PAUSED, training.saved, training.steps)
        except RunError:
            # It goes on without; only a run that starts over or is new each time would not know that it should.
            log.exception("Graft: that run %s is paused could not be kept.", name)
    training.send("paused", {"run": name, "step": training.saved, "steps": training.steps})


def _free_device() -> None:
    gc.collect()
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
