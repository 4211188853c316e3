"""TensorBoard event files of a run, through torch's writer, which is imported only if the recipe asks for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import RunError, needing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .run import Run

log = logging.getLogger(__name__)

_FLUSH = 10  # seconds

# Per kind of event: {tag in TensorBoard: key in the event}.
_SCALARS = {
    "step": {
        "loss/training": "loss",
        "training/learning rate": "lr",
        "training/gradient norm": "grad_norm",
        "training/seconds a step": "seconds",
        "accuracy/training": "accuracy",
    },
    "validation": {"loss/validation": "loss", "accuracy/validation": "accuracy"},
}


def load() -> type[SummaryWriter]:
    """Import torch's SummaryWriter.

    Raises:
        SettingsError: the package tensorboard is not installed; the error names what to install.
    """
    cure = "or set tensorboard in Graft Run Options to off"
    with needing("tensorboard", "Writing TensorBoard's event files", cure, "tensorboard"):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter


@contextmanager
def writing(run: Run, step: int) -> Iterator[None]:
    """Write the events that the run logs inside the context to its folder `tensorboard`.

    After an interruption, TensorBoard discards the old events of the steps that are repeated.

    Args:
        run: the run, which gets a follower inside the context.
        step: the step that the run resumes from, 0 for a new run.

    Raises:
        SettingsError: the package tensorboard is not installed.
        RunError: the files cannot be written.
    """
    folder = os.path.join(run.folder, "tensorboard")
    with _telling(folder):
        writer = load()(folder, purge_step=step + 1 if step else None, flush_secs=_FLUSH)

    def follow(event: dict[str, Any]) -> None:
        with _telling(folder):
            _write(writer, run, event)

    run.followers.append(follow)
    try:
        yield
    finally:
        run.followers.remove(follow)
        try:
            writer.close()
        except OSError as error:
            # Only log this error, so that it does not hide the one that ended the training.
            log.warning("Graft: cannot write the last TensorBoard events to '%s': %s", folder, error)


def _write(writer: SummaryWriter, run: Run, event: dict[str, Any]) -> None:
    step = event.get("step", 0)
    for tag, name in _SCALARS.get(event["event"], {}).items():
        if name in event:
            writer.add_scalar(tag, event[name], step)
    if event["event"] == "sample":
        import numpy as np
        from PIL import Image

        for number, name in enumerate(event["files"], 1):
            with Image.open(os.path.join(run.folder, "samples", name)) as picture:
                writer.add_image(f"samples/{number}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")


@contextmanager
def _telling(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"TensorBoard's event files cannot be written to '{folder}' ({error}).",
            "Free space on that disk, make the folder writable, or set tensorboard in Graft Run Options to off.",
        ) from error
