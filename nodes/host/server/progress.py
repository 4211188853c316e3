"""Training progress in the browser and the terminal, and the user's interruption."""

import logging
import statistics
import time
from collections import deque

import comfy.model_management
import comfy.utils

from ....trainers.runs.run import Run
from .. import paths
from .control import REGISTRY, Training, check_interrupt

log = logging.getLogger(__name__)

_PAUSE = 0.1
_PREVIEW_SIDE = 512
_ACCURACIES = 50  # steps whose implicit accuracies are averaged

# Events sent at most once in _PAUSE seconds, with the payload keys whose equality marks the last one.
_OFTEN = {"step": ("step", "steps"), "cache": ("done", "total")}


class Progress:
    """A callable that sends a run's events to the page and raises ComfyUI's interruption on cancel or pause."""

    def __init__(self, training: Training, steps: int):
        self._training = training
        self._bar = comfy.utils.ProgressBar(steps, node_id=training.node)
        self._sent = 0.0
        self._losses: list[float] = []
        self._accuracies: deque[float] = deque(maxlen=_ACCURACIES)

    def __call__(self, event: str, payload: dict) -> None:
        """Send one event; pictures also go to the node's preview, and frequent events at most ten times a second."""
        if event == "run":
            self._training.opened(Run.named(paths.folders(), payload["name"]), payload["step"], payload["steps"])
            REGISTRY.remember(payload["name"], self._training.prompt)
        if event == "phase" and payload["name"] == "training":
            self._training.note_start()
        if event == "cache":
            self._training.note_work()
        if event == "step":
            self._training.note_step(payload["step"], payload["seconds"])
            self._losses.append(payload["loss"])
            payload = self._with_mean_accuracy(payload)
        if event == "memory":
            self._training.has_fallback = True
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
        self._training.send(event, self._page_payload(event, payload))

    def _with_mean_accuracy(self, payload: dict) -> dict:
        """Replace a step's implicit accuracy, if it has one, by the mean over the last steps."""
        if "accuracy" not in payload:
            return payload
        self._accuracies.append(payload["accuracy"])
        return {**payload, "accuracy": statistics.fmean(self._accuracies)}

    def _page_payload(self, event: str, payload: dict) -> dict:
        """Return an event as the pages get it: paths in place of pictures, and the losses of all unsent steps."""
        if event == "sample":
            return {"step": payload["step"], "samples": [paths.ui_image(path) for path in payload["paths"]]}
        if event == "step":
            losses, self._losses = self._losses, []
            return {**payload, "losses": losses, "memory": _memory()}
        return payload


def _memory() -> tuple[int, int]:
    """Return (bytes in use by any program, total bytes) of the training device."""
    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device)
    return total - comfy.model_management.get_free_memory(device), total


def log_step(payload: dict) -> None:
    """Log about twenty steps of a run."""
    every = max(1, payload["steps"] // 20)
    if payload["step"] % every == 0 or payload["step"] == payload["steps"]:
        log.info(
            "Graft: step %d of %d, loss %.4f, lr %.2e, %.2f s a step%s",
            payload["step"],
            payload["steps"],
            payload["loss"],
            payload["lr"],
            payload["seconds"],
            f", {payload['accuracy']:.0%} of pairs preferred" if "accuracy" in payload else "",
        )


def counter(node: str):
    """Return a function of (done, total) that moves a node's progress bar and raises ComfyUI's interruption."""
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
    """Return a function of (done, picture) that moves a node's bar, shows the picture and raises the interruption."""
    bar = comfy.utils.ProgressBar(total, node_id=node)

    def tick(done: int, picture=None) -> None:
        if REGISTRY.current is not None and picture is not None:
            REGISTRY.current.note_work()
        check_interrupt()
        if REGISTRY.current is not None:
            REGISTRY.current.send("drawing", {"done": done, "total": total})
        bar.update_absolute(done, total, ("JPEG", picture, _PREVIEW_SIDE) if picture is not None else None)

    return tick
