"""Plots of the loss of one or two runs, by step or by timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runs.history import smoothed
from . import figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runs.loss_by_timestep import LossByTimestep

_WIDTH, _HEIGHT = 9.0, 5.0
_RAW = 0.3  # opacity of unsmoothed losses
# Line styles of the first quarter of the steps and of the last.
_LOOKS = ({"alpha": 0.55, "linestyle": "--"}, {})


def plot(losses: Mapping[str, Sequence[float]], smoothing: float, logarithmic: bool) -> np.ndarray:
    """Plot the loss per step, thin, and smoothed, thick, as [H, W, 3] float32 in 0..1.

    Args:
        losses: loss of each step, by the run's label. At most two runs.
        smoothing: as for `smoothed`. 0 draws the unsmoothed losses alone.
        logarithmic: whether the loss axis is logarithmic.
    """
    canvas = figure.blank(_WIDTH, _HEIGHT)
    axes = _axes(canvas, "step", "loss", logarithmic)
    for color, (label, values) in zip((figure.FIRST, figure.SECOND), losses.items(), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=_RAW if smoothing else 1.0)
        if smoothing:
            axes.plot(steps, smoothed(values, smoothing), color=color, linewidth=2.0)
        # An empty line carries the label.
        axes.plot([], [], color=color, linewidth=2.0, label=label)
    if len(losses) > 1:
        _legend(axes)
    return figure.as_array(canvas)


def plot_levels(runs: Mapping[str, tuple[LossByTimestep, int]], logarithmic: bool) -> np.ndarray:
    """Plot the mean loss by timestep for the first and the last quarter of the steps, [H, W, 3] float32 in 0..1.

    Args:
        runs: (losses by timestep, number of steps), by the run's label. At most two runs.
        logarithmic: whether the loss axis is logarithmic.
    """
    canvas = figure.blank(_WIDTH, _HEIGHT)
    axes = _axes(canvas, "timestep: 0 picture, 1000 noise", "loss, not weighted", logarithmic)
    for color, (label, (levels, steps)) in zip((figure.FIRST, figure.SECOND), runs.items(), strict=False):
        begin = f"{label}: " if len(runs) > 1 else ""
        quarters = _quarters(levels)
        for (first, last), look in zip(quarters, _LOOKS[-len(quarters) :], strict=True):
            means = levels.means(first, last)
            points = [(1000 * (place + 0.5) / len(means), mean) for place, mean in enumerate(means) if mean == mean]
            name = f"{begin}steps {first * levels.span + 1} to {min(steps, (last + 1) * levels.span)}"
            axes.plot(
                *zip(*points, strict=True), color=color, linewidth=1.6, marker="o", markersize=4, label=name, **look
            )
    axes.set_xlim(0, 1000)
    _legend(axes)
    return figure.as_array(canvas)


def _quarters(levels: LossByTimestep) -> list[tuple[int, int]]:
    """Return (first, last) span of the first quarter and of the last quarter. One pair if there is only one span."""
    spans = [place for place, counts in enumerate(levels.counts) if any(counts)]
    most = max(1, len(spans) // 4)
    quarters = [(spans[0], spans[most - 1]), (spans[-most], spans[-1])]
    return quarters if len(spans) > 1 else quarters[:1]


def _axes(canvas: Figure, across: str, up: str, logarithmic: bool) -> Axes:
    axes = canvas.add_axes((0.08, 0.1, 0.89, 0.86), facecolor=figure.BACK)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel(across, color=figure.FAINT, fontsize=figure.LETTERS)
    axes.set_ylabel(up, color=figure.FAINT, fontsize=figure.LETTERS)
    axes.tick_params(which="both", colors=figure.FAINT, labelsize=figure.LETTERS)
    axes.grid(color=figure.FAINT, alpha=0.2, linewidth=0.5)
    for side in axes.spines.values():
        side.set_color(figure.FAINT)
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(facecolor=figure.BACK, edgecolor=figure.FAINT, labelcolor=figure.INK, fontsize=figure.LETTERS)
