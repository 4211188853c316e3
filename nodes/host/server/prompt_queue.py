"""ComfyUI's queue of prompts: what a training gives way to, the return of its prompt behind that, and its hours."""

from __future__ import annotations

import functools
import heapq
import logging
import math
from dataclasses import dataclass
from typing import Any

import comfy.model_management

from ....trainers.recipe.options import GIVE_WAY_EVERYTHING, GIVE_WAY_SHORT
from . import schedule
from .messages import TRAINERS, prompt_server

log = logging.getLogger(__name__)

_MARK = "graft_returns"

# Least seconds between two looks at prompts that all must wait.
_MINIMUM_WAIT = 0.05

# Limit of the numbers of renumbered prompts. A program may queue a prompt with any number, also infinity.
_LIMIT = 1e300


@dataclass(frozen=True)
class Returning:
    """A training that gave way. Its prompt is queued again by itself.

    Attributes:
        give_way: the value of the option that it had when it gave way.
        name: its run's name, empty if the run was not open yet.
        seconds: usual seconds of a step, None if unknown.
    """

    prompt: str
    node: str
    give_way: str
    name: str
    step: int
    steps: int
    seconds: float | None


class ReturningPrompts:
    """The trainings that gave way, by prompt. The lock of ComfyUI's queue guards every change."""

    def __init__(self):
        # Prompts that have not ended yet, and those that are back in the queue or run again.
        self._leaving: dict[str, Returning] = {}
        self._returned: dict[str, Returning] = {}
        self._schedules: dict[str, schedule.Schedule] = {}

    def leave(self, training: Returning) -> None:
        """Queue the training's running prompt again once it has ended, unless the user cancels it before that."""
        queue = prompt_server().prompt_queue
        with queue.mutex:
            self._attach(queue)
            self._leaving[training.prompt] = training

    def schedule(self, prompt: str, hours: schedule.Schedule) -> bool:
        """Set the hours of a prompt that runs or waits. Report whether it does."""
        queue = prompt_server().prompt_queue
        with queue.mutex:
            known = {item[1] for items in list_prompts() for item in items}
            if prompt not in known:
                return False
            self._attach(queue)
            kept = {name: value for name, value in self._schedules.items() if name in known}
            self._schedules = {**kept, prompt: hours}
            # The thread that executes prompts must look again.
            queue.not_empty.notify_all()
            queue.server.queue_updated()
        return True

    def schedule_of(self, prompt: str) -> schedule.Schedule:
        """Return the hours of a prompt; those of a prompt without any exclude nothing."""
        return self._schedules.get(prompt, schedule.Schedule())

    def is_held(self, prompt: str) -> bool:
        """Report whether a prompt must not run now."""
        return prompt in self._schedules and not self._schedules[prompt].is_due

    def find(self, prompt: str) -> Returning | None:
        """Return the training of a prompt that gave way and is back in the queue or runs again; None for others."""
        return self._returned.get(prompt)

    def of_run(self, name: str) -> Returning | None:
        """Return the training of a run that gave way, and whose prompt waits, or runs and has not reached it yet."""
        queue = getattr(prompt_server(), "prompt_queue", None)
        if queue is None:
            return None
        with queue.mutex:
            prompts = {item[1] for items in list_prompts() for item in items}
            known = [self._leaving.get(prompt) or self._returned.get(prompt) for prompt in prompts]
        return next((training for training in known if training is not None and training.name == name), None)

    def end(self, training: Returning) -> None:
        """Forget a training that returned and has ended, though its prompt may still run."""
        self._returned.pop(training.prompt, None)

    def remove(self, prompt: str) -> bool:
        """Remove a prompt that waits, or keep one that gives way from returning. Report whether it was one."""
        queue = prompt_server().prompt_queue
        with queue.mutex:
            is_leaving = self._leaving.pop(prompt, None) is not None
            return queue.delete_queue_item(lambda item: item[1] == prompt) or is_leaving

    def goes_first(self, item: tuple, give_way: str) -> bool:
        """Report whether a training with this value of the option gives way to a waiting prompt.

        A training that gave way itself does not count: two of them would stop each other by turns.
        """
        if give_way == GIVE_WAY_SHORT:
            return not list_trainers(item[2])
        return give_way == GIVE_WAY_EVERYTHING and self.find(item[1]) is None

    def _attach(self, queue) -> None:
        """Wrap the queue's methods that take a prompt and that end one, once."""
        if not hasattr(queue.task_done, _MARK):
            queue.task_done, queue.get = self._wrap(queue, queue.task_done), self._wrap_get(queue, queue.get)

    def _wrap_get(self, queue, get):
        """Wrap the queue's `get` to pass over prompts that must not run yet. They keep their places in the queue."""

        @functools.wraps(get)
        def wrapped(timeout=None):
            with queue.not_empty:
                held, free = [], []
                for item in queue.queue:
                    (held if self.is_held(item[1]) else free).append(item)
                if not held:
                    return get(timeout)
                if not free:
                    starts = [self.schedule_of(item[1]).next_start() for item in held]
                    rest = max(_MINIMUM_WAIT, min(starts) - schedule.now())
                    # ComfyUI asks again after the time that it gave.
                    queue.not_empty.wait(rest if timeout is None else min(rest, timeout))
                    return None
                queue.queue[:] = free
                heapq.heapify(queue.queue)
                try:
                    return get(timeout)
                finally:
                    queue.queue += held
                    heapq.heapify(queue.queue)
                    queue.server.queue_updated()

        return wrapped

    def _wrap(self, queue, task_done):
        """Wrap the queue's `task_done`, which ends a prompt, to put one back that gave way.

        The queue's lock covers both, so programs see the prompt either running or waiting. The history has no entry of
        it, and the program that queued it is not told of its end, until the training ends.
        """

        @functools.wraps(task_done)
        def wrapped(item_id, *more, **named):
            with queue.mutex:
                item = queue.currently_running[item_id]
                task_done(item_id, *more, **named)
                training = self._leaving.pop(item[1], None)
                self._returned.pop(item[1], None)
                # The user may cancel the prompt while its progress is being saved.
                if training is None or comfy.model_management.processing_interrupted():
                    return
                # It may have ended otherwise meanwhile, such as by an error.
                messages = (queue.history[item[1]]["status"] or {}).get("messages")
                if not messages or messages[-1][0] != "execution_interrupted":
                    return
                del queue.history[item[1]]
                queue.server.client_id = None
                try:
                    item = self._renumber(queue, item, training)
                except Exception:
                    # An error here would end the thread that executes ComfyUI's prompts.
                    log.exception("Graft: prompt %s returns to its old place in the queue.", item[1])
                queue.put(item)

        setattr(wrapped, _MARK, True)
        return wrapped

    def _renumber(self, queue, item: tuple, training: Returning) -> tuple:
        """Return a prompt with a number behind those that it gives way to and before all others, also later ones."""
        waiting = sorted(queue.queue, key=_place)
        first = [other for other in waiting if self.goes_first(other, training.give_way)]
        later = [other for other in waiting if not self.goes_first(other, training.give_way)]
        known = {other[1] for other in waiting}
        self._returned = {prompt: returning for prompt, returning in self._returned.items() if prompt in known}
        self._returned[training.prompt] = training
        # Without a first one, because the user removed them meanwhile, the prompt keeps its number.
        if not first:
            return item
        ordered = _renumbered([*first, item, *later])
        item = ordered.pop(len(first))
        queue.queue[:] = ordered
        return item


# The trainings and the routes of the one server share it.
RETURNING = ReturningPrompts()


def list_prompts() -> tuple[list[tuple], list[tuple]]:
    """Return the running prompts and the waiting ones in order: (number, id, nodes, extra data, outputs, ...)."""
    queue = getattr(prompt_server(), "prompt_queue", None)
    if queue is None:
        return [], []
    with queue.mutex:
        return list(queue.currently_running.values()), sorted(queue.queue, key=_place)


def move_prompt(prompt: str, before: str | None) -> bool:
    """Move a waiting prompt before another one, or behind all. Report whether both wait."""
    queue = prompt_server().prompt_queue
    with queue.mutex:
        waiting = {item[1]: item for item in sorted(queue.queue, key=_place)}
        item = waiting.pop(prompt, None)
        if item is None or (before is not None and before not in waiting):
            return False
        place = len(waiting) if before is None else list(waiting).index(before)
        others = list(waiting.values())
        queue.queue[:] = _renumbered([*others[:place], item, *others[place:]])
        queue.server.queue_updated()
    return True


def must_give_way(give_way: str) -> bool:
    """Report whether a prompt waits that a running training gives way to."""
    queue = getattr(prompt_server(), "prompt_queue", None)
    # This runs after each step.
    if queue is None or not queue.queue:
        return False
    waiting = list_prompts()[1]
    return any(RETURNING.goes_first(item, give_way) and not RETURNING.is_held(item[1]) for item in waiting)


def list_trainers(nodes: dict[str, Any]) -> list[str]:
    """Return the ids of a prompt's training nodes."""
    return [name for name, node in nodes.items() if node.get("class_type") in TRAINERS]


def _renumbered(items: list[tuple]) -> list[tuple]:
    """Return waiting prompts with rising numbers. A sorted list is a heap, as the queue needs it."""
    # A number grows only as far as it must: later prompts have higher whole numbers.
    ordered, number = [], -math.inf
    for item in items:
        number = max(_place(item)[0], math.nextafter(number, math.inf))
        ordered.append((number, *item[1:]))
    return ordered


def _place(item: tuple) -> tuple:
    """Return a waiting prompt's key in the order of the queue. Not a number, and infinity, count as the last."""
    return max(-_LIMIT, min(_LIMIT, item[0])), item[1]
