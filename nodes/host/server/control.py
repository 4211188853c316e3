"""User commands to running trainings: stop and keep, save now, pause."""

import gc
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from typing import Any, TypeVar

import comfy.model_management
from comfy_execution.utils import get_executing_context

from ....trainers.errors import GraftError, RunError
from ....trainers.protocols import Command
from ....trainers.recipe.options import GIVE_WAY_OFF
from ....trainers.runs.run import PAUSED, STOPPED, Run
from .. import settings
from .messages import BEGIN, digest_of, send, sources_of, workflow_of
from .prompt_queue import RETURNING, Returning, must_give_way

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

_MOST_PROMPTS = 256

# Number of recent steps whose median duration is the usual one.
_PACES = 15

_MESSAGE_LIMIT = 2000


class UserCommand(Enum):
    """A command of the user to a training."""

    SAVE = "save"
    STOP = "stop"
    PAUSE = "pause"


class Training:
    """A running training. The execution thread advances it; any thread may send it a command.

    Attributes:
        node: the node's execution id, also inside subgraphs.
        prompt: id of its prompt, empty outside one.
        workflow: id of the workflow that the prompt was queued from, empty if no page queued it.
        sources: the inputs that decide its result, as `sources_of` collects them; None if unknown.
        inputs: digest of the sources, which distinguishes it from others of the same node.
        run: the run, None until it is open.
        saved: last step with a saved state.
        give_way: the waiting prompts that it gives way to, one of GIVE_WAY.
        gives_way: whether it pauses for them now, and not for the user.
        is_leaving: whether it saves its progress to end; commands come too late.
        has_fallback: whether memory ran out, so that it trains with less of it.
        stays_prepared: whether its tree is kept for its return.
    """

    def __init__(
        self,
        node: str,
        prompt: str,
        workflow: str = "",
        give_way: str = GIVE_WAY_OFF,
        returning: Returning | None = None,
    ):
        self.node = node
        self.prompt = prompt
        self.workflow = workflow
        self.sources = sources_of(prompt, node)
        self.inputs = digest_of(self.sources)
        self.run: Run | None = None
        self.step = 0
        self.steps = 0
        self.saved = 0
        self.give_way = give_way
        self.gives_way = False
        self.is_leaving = False
        self.has_fallback = False
        self.stays_prepared = False
        self._returning = returning
        self._least = settings.give_way_after()
        self._since: float | None = None
        self._paces: deque[float] = deque(maxlen=_PACES)
        self._lock = threading.Lock()
        self._save = False
        self._end: UserCommand | None = None

    @property
    def name(self) -> str:
        """The run's name, empty until it is open."""
        return "" if self.run is None else self.run.name

    @property
    def end(self) -> UserCommand | None:
        """The command that ends it, STOP or PAUSE; None without one."""
        return self._end

    def send(self, event: str, payload: dict[str, Any]) -> None:
        """Send an event of the training to the pages."""
        where = {"node": self.node, "prompt_id": self.prompt, "workflow": self.workflow, "inputs": self.inputs}
        send({**where, "event": event, **payload})

    def opened(self, run: Run, step: int, steps: int) -> None:
        """Record the run that the training works on from now on, and the saved step that it starts from.

        Raises:
            RunError: it gave way in another run.
        """
        gave_way = self._returning.name if self._returning is not None else ""
        if gave_way not in ("", run.name):
            raise RunError(
                f"The training gave way in run {gave_way}, but its data or settings changed: it is now {run.name}.",
                "Queue the graph again to train with the changed data. Undo the change first to continue the old run.",
            )
        self.run = run
        self.step = self.saved = step
        self.steps = steps

    def submit(self, command: UserCommand) -> bool:
        """Record a command; of STOP and PAUSE, the later one wins. Report whether it did not come too late."""
        with self._lock:
            if self.is_leaving and command is not self._end:
                return False
            if command is UserCommand.SAVE:
                self._save = True
            else:
                self._end = command
                self.gives_way = False
            return True

    @property
    def seconds(self) -> float | None:
        """The usual seconds of a step, None before the first."""
        return statistics.median(self._paces) if self._paces else None

    def note_start(self) -> None:
        """Record that the steps begin: the time before the first does not count for the least training time."""
        if not self._paces:
            self._since = time.monotonic()

    def note_step(self, step: int, seconds: float) -> None:
        """Record a step that was done."""
        self.step = step
        self._paces.append(seconds)

    def note_work(self) -> None:
        """Record that work was done that a pause keeps. Pause outside the hours, or for a prompt that goes first.

        For a prompt, it trains at least the time of the settings before. The pause takes effect at the next
        `check_interrupt`.
        """
        if self._since is None:
            self._since = time.monotonic()
        if self._end is None and self._must_pause():
            with self._lock:
                if self._end is None:
                    self._end, self.gives_way = UserCommand.PAUSE, True

    @property
    def is_held(self) -> bool:
        """Report whether it must not train now, by its hours."""
        return RETURNING.is_held(self.prompt)

    def _must_pause(self) -> bool:
        if self.is_held:
            return True
        return time.monotonic() - self._since >= self._least and must_give_way(self.give_way)

    def cancel(self) -> None:
        """Record that the user cancelled the prompt: it must not return by itself."""
        self.gives_way = False

    def next_command(self) -> Command | None:
        """Return the loop's command after a step and its sample pictures; a save is returned once.

        Raises ComfyUI's interruption as `check_interrupt`, if the training gives way now.
        """
        if self._paces and self.step < self.steps:
            self.note_work()
        if self.gives_way:
            self.check_interrupt()
        with self._lock:
            if self._end is UserCommand.STOP:
                return Command.STOP
            save, self._save = self._save, False
            return Command.SAVE if save else None

    def check_interrupt(self) -> None:
        """Raise ComfyUI's interruption once, for a pause, or for a stop before the first step."""
        with self._lock:
            ends = self._end is UserCommand.PAUSE or (self._end is UserCommand.STOP and not self.step)
            if not ends or self.is_leaving:
                return
            # The loop saves its progress on the way out and reports that save, which must not raise again.
            self.is_leaving = True
        raise comfy.model_management.InterruptProcessingException()


class TrainingRegistry:
    """The running trainings, for the routes and nodes that look them up."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: list[Training] = []
        self._prompts: dict[str, str] = {}
        self._cache_version = 0
        self._current: ContextVar[Training | None] = ContextVar("graft_training", default=None)

    @property
    def current(self) -> Training | None:
        """The training that the calling code is part of."""
        return self._current.get()

    @property
    def cache_version(self) -> int:
        """The number of resumed or deleted runs. When it changes, ComfyUI must not answer from its cache."""
        return self._cache_version

    @contextmanager
    def register(self, node: str, give_way: str = GIVE_WAY_OFF) -> Iterator[Training]:
        """Register a training within the context."""
        context = get_executing_context()
        prompt = context.prompt_id if context is not None else ""
        returning = RETURNING.find(prompt)
        if returning is not None and returning.node != node:
            returning = None
        if returning is not None:
            # The user may have changed it in the panel.
            give_way = returning.give_way
        training = Training(node, prompt, workflow_of(prompt), give_way, returning)
        token = self._current.set(training)
        with self._lock:
            self._running.append(training)
        try:
            yield training
        finally:
            self._current.reset(token)
            if returning is not None:
                RETURNING.end(returning)
            with self._lock:
                self._running.remove(training)

    def all(self) -> list[Training]:
        """Return the running trainings."""
        with self._lock:
            return list(self._running)

    def of_run(self, name: str) -> Training | None:
        """Return the training that works on a run."""
        return next(
            (training for training in self.all() if training.run is not None and training.run.name == name), None
        )

    def of_node(self, node: str) -> Training | None:
        """Return the training of a node, also before its run is open."""
        return next((training for training in self.all() if training.node == node), None)

    def of_prompt(self, prompt: str, node: str) -> Training | None:
        """Return the training of a running prompt's node."""
        return next((training for training in self.all() if (training.prompt, training.node) == (prompt, node)), None)

    def remember(self, run: str, prompt: str) -> None:
        """Remember the last prompt of a run."""
        with self._lock:
            self._prompts.pop(run, None)
            self._prompts[run] = prompt
            while len(self._prompts) > _MOST_PROMPTS:
                del self._prompts[next(iter(self._prompts))]

    def prompt_of(self, run: str) -> str:
        """Return the id of a run's last prompt, empty if this server does not know it."""
        with self._lock:
            return self._prompts.get(run, "")

    def forget(self, run: str) -> None:
        """Forget a deleted run. Its graph, queued again, must train and not be answered from ComfyUI's cache."""
        with self._lock:
            self._prompts.pop(run, None)
            self._cache_version += 1

    def resume(self, run: Run) -> None:
        """Let a stopped run continue when its graph is queued again.

        Raises RunError as `Run.forget_halt` does, and RunHeldError if another process trains it.
        """
        with run.held():
            run.forget_halt()
        with self._lock:
            self._cache_version += 1


# The routes of the one server and the nodes that it executes share this registry.
REGISTRY = TrainingRegistry()


def check_interrupt() -> None:
    """Raise ComfyUI's interruption if the user cancelled, or if a command ends the current training now."""
    try:
        comfy.model_management.throw_exception_if_processing_interrupted()
    except comfy.model_management.InterruptProcessingException:
        if REGISTRY.current is not None:
            REGISTRY.current.cancel()
        raise
    if REGISTRY.current is not None:
        REGISTRY.current.check_interrupt()


def should_skip_optional_work() -> bool:
    """Report whether optional work should be skipped because the current training was told to stop."""
    return REGISTRY.current is not None and REGISTRY.current.end is UserCommand.STOP


def run_controlled(node: str, give_way: str, work: Callable[[Training], Outcome]) -> Outcome:
    """Run the work of a training node, which can then be stopped, saved and paused, and can give way.

    Args:
        give_way: value of the option, "auto" for that of the user's settings.
        work: called with the training. A nested `run_controlled` uses the outer one's training.

    Raises:
        InterruptProcessingException: ComfyUI's interruption, also for a pause: it ends the prompt, and the next runs.
    """
    outer = REGISTRY.current
    if outer is not None:
        return work(outer)
    with REGISTRY.register(node, settings.give_way() if give_way == "auto" else give_way) as training:
        training.send(BEGIN, {"sources": training.sources, "give_way": training.give_way})
        try:
            return work(training)
        except comfy.model_management.InterruptProcessingException:
            if training.end is not UserCommand.PAUSE:
                _report_cancelled(training)
                raise
        except Exception as error:
            _report_failed(training, error)
            raise
        # Not inside `except`: an exception being handled keeps all that the training had on the device.
        # The training stays registered, so that its run can be neither deleted nor resumed until it has left.
        _note_pause(training)
        if training.gives_way and training.saved < training.step:
            error = RunError(
                f"The training must give way at step {training.step}, but that step cannot be saved. The log says why.",
                f"Free space on the disk, then queue the graph again: it continues from step {training.saved}.",
            )
            _report_failed(training, error)
            raise error
        _free_device(keep=training.gives_way and training.stays_prepared)
        if training.gives_way:
            _give_way(training)
        else:
            log.info("Graft: paused at step %d. Queue the same graph again to continue.", training.saved)
            training.send("paused", {"run": training.name, "step": training.saved, "steps": training.steps})
    raise comfy.model_management.InterruptProcessingException()


def _report_cancelled(training: Training) -> None:
    nothing = training.end is UserCommand.STOP and not training.step
    if nothing:
        log.info("Graft: stopped before the first step. There is no result to keep.")
    training.send("cancelled", {"step": training.step, "saved": training.saved, "nothing": nothing})


def _report_failed(training: Training, error: Exception) -> None:
    if isinstance(error, GraftError):
        report = {"message": error.message, "cure": error.cure, "input": error.input}
    else:
        report = {"message": f"{type(error).__name__}: {error}"[:_MESSAGE_LIMIT], "cure": "", "input": ""}
    training.send("failed", {**report, "step": training.step, "saved": training.saved})


def _give_way(training: Training) -> None:
    log.info("Graft: paused at step %d for other prompts. It continues behind them by itself.", training.saved)
    RETURNING.leave(
        Returning(
            training.prompt,
            training.node,
            training.give_way,
            training.name,
            training.saved,
            training.steps,
            training.seconds,
        )
    )
    place = {"run": training.name, "step": training.saved, "steps": training.steps}
    training.send("waiting", {**place, "starts": RETURNING.schedule_of(training.prompt).shown_start})


def _note_pause(training: Training) -> None:
    # Without a saved state there is nothing to resume, and the folder's files may be of an earlier run.
    if training.saved:
        try:
            with training.run.held():
                # An early stop may have been due at the step of the pause.
                if not training.run.halted_as(STOPPED, training.steps):
                    training.run.note_halt(PAUSED, training.saved, training.steps)
        except RunError:
            # The run still resumes without the note, unless it is set to start over or to be new each time.
            log.exception("Graft: cannot record that run %s is paused.", training.name)


def _free_device(keep: bool) -> None:
    """Free the device of all models, or of what the training leaves besides them."""
    gc.collect()
    if not keep:
        comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()
