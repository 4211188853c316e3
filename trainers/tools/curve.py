"""The loss of one run or two as a picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

_WIDTH, _HEIGHT = 9.0, 5.0
_RAW = 0.3  # opacity


def plot(losses: Mapping[str, Sequence[float]], smoothing: float, logarithmic: bool) -> np.ndarray:
    """[H, W, 3] float32 in 0..1: each step's loss thin, smoothed thick.

    Args:
        losses: of each step, by the run's label; at most two.
        smoothing: as `smoothed` takes it; 0 draws the losses alone.
    """
    made = figure.blank(_WIDTH, _HEIGHT)
    axes = made.add_axes((0.08, 0.1, 0.89, 0.86), facecolor=figure.BACK)
    for colour, (label, values) in zip((figure.FIRST, figure.SECOND), losses.items(), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=_RAW if smoothing else 1.0)
        if smoothing:
            axes.plot(steps, smoothed(values, smoothing), color=colour, linewidth=2.0)
        # The label of its own: a line of no points.
        axes.plot([], [], color=colour, linewidth=2.0, label=label)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step", color=figure.FAINT, fontsize=figure.LETTERS)
    axes.set_ylabel("loss", color=figure.FAINT, fontsize=figure.LETTERS)
    axes.tick_params(which="both", colors=figure.FAINT, labelsize=figure.LETTERS)
    axes.grid(color=figure.FAINT, alpha=0.2, linewidth=0.5)
    for side in axes.spines.values():
        side.set_color(figure.FAINT)
    if len(losses) > 1:
        axes.legend(facecolor=figure.BACK, edgecolor=figure.FAINT, labelcolor=figure.INK, fontsize=figure.LETTERS)
    return figure.as_array(made)


def smoothed(values: Sequence[float], smoothing: float) -> list[float]:
    """A moving average that forgets: each value counts `smoothing` times as much as the one after it.

    It begins at the first value, not at 0; what is no number is passed over.
    """
    total = weight = 0.0
    found = []
    for value in values:
        if math.isfinite(value):
            total = smoothing * total + value
            weight = smoothing * weight + 1.0
        found.append(total / weight if weight else math.nan)
    return found
