"""Telling the browser and the terminal how training goes, and hearing from them that it should stop."""

from __future__ import annotations

import logging
import time

import comfy.model_management
import comfy.utils

log = logging.getLogger(__name__)

EVENT = "graft.progress"
_PAUSE = 0.1
_PREVIEW_SIDE = 512


class Progress:
    """Passes events of a run on; raises the host's own interruption when the user cancels.

    Args:
        node: execution id of the node, also inside subgraphs.
        steps: of the whole run.
    """

    def __init__(self, node: str, steps: int):
        self._node = node
        self._bar = comfy.utils.ProgressBar(steps, node_id=node)
        self._sent = 0.0

    def __call__(self, event: str, payload: dict) -> None:
        """One event; pictures go to the node's preview, the rest as JSON at most ten times a second."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if event == "step":
            self._bar.update_absolute(payload["step"], payload["steps"])
            _log_step(payload)
        if event == "sample":
            for picture in payload["pictures"]:
                self._bar.update_absolute(self._bar.current, None, ("JPEG", picture, _PREVIEW_SIDE))
        if event == "step" and time.monotonic() - self._sent < _PAUSE and payload["step"] < payload["steps"]:
            return
        self._sent = time.monotonic()
        _send({"node": self._node, "event": event, **_plain(payload)})


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


def _plain(payload: dict) -> dict:
    """What JSON can carry."""
    return {name: value for name, value in payload.items() if name != "pictures"}


def _send(message: dict) -> None:
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.send_sync(EVENT, message)


def tell(node: str, event: str, payload: dict) -> None:
    """One event outside a run."""
    _send({"node": node, "event": event, **_plain(payload)})


def counter(node: str):
    """A function of (done, total) that moves a node's progress bar and raises the host's own interruption."""
    bar = None

    def tick(done: int, total: int) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if bar is None:
            bar = comfy.utils.ProgressBar(max(1, total), node_id=node)
        if done % 16 == 0 or done == total:
            bar.update_absolute(done, max(1, total))

    return tick


def gallery(node: str, total: int):
    """A function of (done, picture) that moves a node's bar, shows the picture and raises the host's interruption."""
    bar = comfy.utils.ProgressBar(total, node_id=node)

    def tick(done: int, picture=None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total, ("JPEG", picture, _PREVIEW_SIDE) if picture is not None else None)

    return tick
