"""Telling the browser and the terminal how training goes, and hearing from them that it should stop."""

from __future__ import annotations

import logging
import time

import comfy.model_management
import comfy.utils

from ....trainers.runs.run import Run
from .. import paths
from .control import REGISTRY, Training, check_interrupt

log = logging.getLogger(__name__)

_PAUSE = 0.1
_PREVIEW_SIDE = 512

# What is told at most every _PAUSE seconds, and how each says that it is the last.
_OFTEN = {"step": ("step", "steps"), "cache": ("done", "total")}


class Progress:
    """Passes events of a run on; raises the host's own interruption when the user cancels or pauses.

    Args:
        training: at the desk.
        steps: of the whole run.
    """

    def __init__(self, training: Training, steps: int):
        self._training = training
        self._bar = comfy.utils.ProgressBar(steps, node_id=training.node)
        self._sent = 0.0
        self._losses: list[float] = []

    def __call__(self, event: str, payload: dict) -> None:
        """One event; pictures go to the node's preview too, what comes often is told at most ten times a second."""
        if event == "run":
            self._training.opened(Run.named(paths.folders(), payload["name"]), payload["step"], payload["steps"])
            REGISTRY.remember(payload["name"], self._training.prompt)
        if event == "step":
            self._training.step = payload["step"]
            self._losses.append(payload["loss"])
        if event == "saved":
            self._training.saved = payload["step"]
        check_interrupt()
        if event == "step":
            self._bar.update_absolute(payload["step"], payload["steps"])
            log_step(payload)
        if event == "sample":
            for picture in payload["pictures"]:
                self._bar.update_absolute(self._bar.current, None, ("JPEG", picture, _PREVIEW_SIDE))
        if event in _OFTEN:
            done, total = (payload[name] for name in _OFTEN[event])
            if time.monotonic() - self._sent < _PAUSE and done < total:
                return
            self._sent = time.monotonic()
        self._training.send(event, self._shown(event, payload))

    def _shown(self, event: str, payload: dict) -> dict:
        """An event as the pages get it: no pictures but where they are, and the losses of steps that were not told."""
        if event == "sample":
            return {"step": payload["step"], "samples": [paths.shown_output(path) for path in payload["paths"]]}
        if event == "step":
            losses, self._losses = self._losses, []
            return {**payload, "losses": losses, "memory": _memory()}
        return payload


def _memory() -> tuple[int, int]:
    """(in use, there is) on the device that trains, bytes, whoever uses it."""
    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device)
    return total - comfy.model_management.get_free_memory(device), total


def log_step(payload: dict) -> None:
    """Tells the terminal of some twenty steps of a run."""
    every = max(1, payload["steps"] // 20)
    if payload["step"] % every == 0 or payload["step"] == payload["steps"]:
        log.info(
            "Graft: step %d of %d, loss %.4f, lr %.2e, %.2f s a step",
            payload["step"],
            payload["steps"],
            payload["loss"],
            payload["lr"],
            payload["seconds"],
        )


def counter(node: str):
    """A function of (done, total) that moves a node's progress bar and raises the host's own interruption."""
    bar = None

    def tick(done: int, total: int) -> None:
        nonlocal bar
        check_interrupt()
        if bar is None:
            bar = comfy.utils.ProgressBar(max(1, total), node_id=node)
        if done % 16 == 0 or done == total:
            bar.update_absolute(done, max(1, total))

    return tick


def gallery(node: str, total: int):
    """A function of (done, picture) that moves a node's bar, shows the picture and raises the host's interruption."""
    bar = comfy.utils.ProgressBar(total, node_id=node)

    def tick(done: int, picture=None) -> None:
        check_interrupt()
        if REGISTRY.current is not None:
            REGISTRY.current.send("drawing", {"done": done, "total": total})
        bar.update_absolute(done, total, ("JPEG", picture, _PREVIEW_SIDE) if picture is not None else None)

    return tick
