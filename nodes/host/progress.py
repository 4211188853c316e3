"""Telling the browser and the terminal how training goes, and hearing from them that it should stop."""

from __future__ import annotations

import logging
import time

import comfy.utils

from ...trainers.run import Run
from . import paths
from .browser import tell
from .control import DESK, Training, heed

log = logging.getLogger(__name__)

_PAUSE = 0.1
_PREVIEW_SIDE = 512


class Progress:
    """Passes events of a run on; raises the host's own interruption when the user cancels or pauses.

    Args:
        training: at the desk.
        steps: of the whole run.
    """

    def __init__(self, training: Training, steps: int):
        self._training = training
        self._node = training.node
        self._bar = comfy.utils.ProgressBar(steps, node_id=self._node)
        self._sent = 0.0

    def __call__(self, event: str, payload: dict) -> None:
        """One event; pictures go to the node's preview, the rest as JSON at most ten times a second."""
        if event == "run":
            self._training.opened(Run.named(paths.folders(), payload["name"]), payload["step"], payload["steps"])
            DESK.remember(payload["name"], self._training.prompt)
        if event == "step":
            self._training.step = payload["step"]
        if event == "saved":
            self._training.saved = payload["step"]
        heed()
        if event == "step":
            self._bar.update_absolute(payload["step"], payload["steps"])
            _log_step(payload)
        if event == "sample":
            for picture in payload["pictures"]:
                self._bar.update_absolute(self._bar.current, None, ("JPEG", picture, _PREVIEW_SIDE))
        if event == "step" and time.monotonic() - self._sent < _PAUSE and payload["step"] < payload["steps"]:
            return
        self._sent = time.monotonic()
        tell(self._node, event, payload)


def _log_step(payload: dict) -> None:
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
        heed()
        if bar is None:
            bar = comfy.utils.ProgressBar(max(1, total), node_id=node)
        if done % 16 == 0 or done == total:
            bar.update_absolute(done, max(1, total))

    return tick


def gallery(node: str, total: int):
    """A function of (done, picture) that moves a node's bar, shows the picture and raises the host's interruption."""
    bar = comfy.utils.ProgressBar(total, node_id=node)

    def tick(done: int, picture=None) -> None:
        heed()
        bar.update_absolute(done, total, ("JPEG", picture, _PREVIEW_SIDE) if picture is not None else None)

    return tick
