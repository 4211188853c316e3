"""Average of a run's saves, weighted by step with the power-function profile of post-hoc EMA (Karras et al. 2023)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

from ..errors import RunError
from ..formats.adapter import Adapter, load_adapter
from ..formats.metadata import IDENTITY, MADE, VALIDATION_LOSS
from ..runs.folders import Folders
from ..runs.run import Run
from ..runs.saves import list_saves
from ..text import is_below

AVERAGE = "average of saves"
# Standard deviation of the steps of a uniform average, in parts of the last step.
WIDEST = 1 / math.sqrt(12)
WIDTH = 0.1


def exponent_of(width: float) -> float:
    """Return the exponent gamma of the profile t^gamma with a standard deviation of `width` times the last step.

    Args:
        width: above 0 and below WIDEST, where gamma is 0.
    """
    import numpy as np

    # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma.
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def weights_of(steps: Sequence[int], width: float) -> list[float]:
    """Return the weights of two or more saves at steps, rising; their sum is 1. Saves close together share a weight."""
    exponent = exponent_of(width)
    # A save stands for the steps since the save before; saves before the first are not kept.
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    spans = [gaps[0], *gaps]
    powers = [span * (step / steps[-1]) ** exponent for step, span in zip(steps, spans, strict=True)]
    return [power / sum(powers) for power in powers]


def average_saves(folders: Folders, run: Run, last: int, width: float) -> Adapter:
    """Average the tensors of a run's kept adapters up to the step `last`, one file after another.

    Raises:
        RunError: the run has kept fewer than two of them, or a file is damaged or has other tensors than the last.
    """
    files = {
        step: path
        for step, paths in list_saves(folders, run).items()
        for path in paths
        if step <= last and not is_below(path, run.embeddings) and not is_below(path, folders.embeddings)
    }
    if len(files) < 2:
        raise RunError(
            f"The run {run.name} has kept {len(files)} saves up to step {last}: there is nothing to average.",
            "Train with a larger keep_last in Graft Run Options, such as 10.",
            "adapter_a",
        )
    steps = list(files)
    adapter = load_adapter(files[steps[-1]])
    averages = {name: tensor.float() for name, tensor in adapter.items()}
    for step, weight in zip(steps[:-1], weights_of(steps, width), strict=False):
        save = load_adapter(files[step])
        if {name: tensor.shape for name, tensor in save.items()} != {name: t.shape for name, t in averages.items()}:
            raise RunError(
                f"The save of step {step} of the run {run.name} has other layers than that of step {steps[-1]}.",
                "Remove it from the run's folder.",
                "adapter_a",
            )
        for name, tensor in save.items():
            # As a difference, which leaves equal values such as alpha as they are.
            averages[name] = averages[name] + weight * (tensor.float() - adapter[name].float())
    tensors = {name: average.to(adapter[name].dtype) for name, average in averages.items()}
    own = (IDENTITY, VALIDATION_LOSS, "modelspec.thumbnail")
    metadata = {name: value for name, value in adapter.metadata.items() if name not in own}
    metadata[MADE] = json.dumps({"tool": AVERAGE, "steps": steps, "width": width}, sort_keys=True)
    return Adapter(tensors, metadata, None, adapter.bundled)
