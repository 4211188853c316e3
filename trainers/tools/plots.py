"""Plots: of the loss of one or two runs, by step or by timestep, and of how much an adapter changes each block."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

from ..runs.history import smoothed
from .inspect import Findings, block_norms, headline

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runs.loss_by_timestep import LossByTimestep

_DPI = 100
_LETTERS = 8
_BACK, _INK, _FAINT = "#28282c", "#ebebeb", "#96969b"
_FIRST, _SECOND = "#6096d6", "#f0b040"
_WIDTH, _HEIGHT = 9.0, 5.0
_RAW = 0.3  # opacity of unsmoothed losses
_LOOKS = ({"alpha": 0.55, "linestyle": "--"}, {})
_BLOCKS_WIDTH = 4.8
_BAR = 0.17
_HEAD = 0.75
_MOST_BARS = 36


def plot(losses: Mapping[str, Sequence[float]], smoothing: float, logarithmic: bool) -> np.ndarray:
    """Plot the loss per step, thin, and smoothed, thick, as [H, W, 3] float32 in 0..1.

    Args:
        losses: loss of each step, by the run's label. At most two runs.
        smoothing: as for `smoothed`. 0 draws the unsmoothed losses alone.
    """
    canvas = _blank(_WIDTH, _HEIGHT)
    axes = _axes(canvas, "step", "loss", logarithmic)
    for color, (label, values) in zip((_FIRST, _SECOND), losses.items(), strict=False):
        steps = range(1, len(values) + 1)
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=_RAW if smoothing else 1.0)
        if smoothing:
            axes.plot(steps, smoothed(values, smoothing), color=color, linewidth=2.0)
        # An empty line carries the label.
        axes.plot([], [], color=color, linewidth=2.0, label=label)
    if len(losses) > 1:
        _legend(axes)
    return _as_array(canvas)


def plot_levels(runs: Mapping[str, tuple[LossByTimestep, int]], logarithmic: bool) -> np.ndarray:
    """Plot the mean loss by timestep for the first and the last quarter of the steps, [H, W, 3] float32 in 0..1.

    Args:
        runs: (losses by timestep, number of steps), by the run's label. At most two runs.
    """
    canvas = _blank(_WIDTH, _HEIGHT)
    axes = _axes(canvas, "timestep: 0 picture, 1000 noise", "loss, not weighted", logarithmic)
    for color, (label, (levels, steps)) in zip((_FIRST, _SECOND), runs.items(), strict=False):
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
    return _as_array(canvas)


def _quarters(levels: LossByTimestep) -> list[tuple[int, int]]:
    """Return (first, last) span of the first quarter and of the last quarter. One pair if there is only one span."""
    spans = [place for place, counts in enumerate(levels.counts) if any(counts)]
    most = max(1, len(spans) // 4)
    quarters = [(spans[0], spans[most - 1]), (spans[-most], spans[-1])]
    return quarters if len(spans) > 1 else quarters[:1]


def _axes(canvas: Figure, across: str, up: str, logarithmic: bool) -> Axes:
    axes = canvas.add_axes((0.08, 0.1, 0.89, 0.86), facecolor=_BACK)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel(across, color=_FAINT, fontsize=_LETTERS)
    axes.set_ylabel(up, color=_FAINT, fontsize=_LETTERS)
    axes.tick_params(which="both", colors=_FAINT, labelsize=_LETTERS)
    axes.grid(color=_FAINT, alpha=0.2, linewidth=0.5)
    for side in axes.spines.values():
        side.set_color(_FAINT)
    return axes


def _legend(axes: Axes) -> None:
    axes.legend(facecolor=_BACK, edgecolor=_FAINT, labelcolor=_INK, fontsize=_LETTERS)


def plot_blocks(findings: Findings) -> np.ndarray:
    """Draw one bar per block with its norm, text encoders in another color, as [H, W, 3] float32 in 0..1."""
    rows = joined(block_norms(findings), _MOST_BARS)
    canvas = _blank(_BLOCKS_WIDTH, _HEAD + _BAR * max(4, len(rows)))
    height = canvas.get_figheight()
    axes = canvas.add_axes((0.34, 0.12 / height, 0.53, 1 - (_HEAD + 0.05) / height), facecolor=_BACK)
    canvas.text(0.03, 1 - 0.24 / height, headline(findings), color=_INK, fontsize=_LETTERS + 2)
    canvas.text(0.03, 1 - 0.47 / height, "norm of the change of each block", color=_FAINT, fontsize=_LETTERS)
    finite = [value if math.isfinite(value) else 0.0 for _, value in rows]
    colors = [_SECOND if _is_text(block) else _FIRST for block, _ in rows]
    axes.barh(range(len(rows)), finite, color=colors, height=0.72)
    axes.set_yticks(range(len(rows)), [block for block, _ in rows], fontsize=_LETTERS, color=_INK)
    axes.set_ylim(max(4, len(rows)) - 0.4, -0.6)
    top = max(finite, default=0.0) or 1.0
    axes.set_xlim(0, top)
    for place, (_, value) in enumerate(rows):
        length = value if math.isfinite(value) else 0.0
        axes.text(length + top * 0.02, place, _number(value), va="center", fontsize=_LETTERS, color=_FAINT)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if not rows:
        axes.text(0, 1, "no norms to show", fontsize=_LETTERS, color=_FAINT)
    return _as_array(canvas)


def _number(value: float) -> str:
    return f"{value:.3g}" if not 1000 <= value < 1e6 else f"{value:.0f}"


def joined(rows: list[tuple[str, float]], most: int) -> list[tuple[str, float]]:
    """Reduce rows to at most `most`: join neighbors of one kind, and put surplus kinds into a last row."""
    kinds = [list(part) for _, part in itertools.groupby(rows, key=lambda row: _stem(row[0]))]
    if len(kinds) > most:
        # No known model has blocks of so many kinds.
        rest = [row for part in kinds[most - 1 :] for row in part]
        return [_together(part) for part in kinds[: most - 1]] + [(f"{len(rest)} others", _total(rest))]
    step = 1
    while sum(math.ceil(len(part) / step) for part in kinds) > most:
        step += 1
    return [_together(part[start : start + step]) for part in kinds for start in range(0, len(part), step)]


def _together(part: list[tuple[str, float]]) -> tuple[str, float]:
    (first, _), (last, _) = part[0], part[-1]
    name = first if first == last else f"{first}-{last.rpartition('.')[2]}"
    return name, _total(part)


def _total(part: list[tuple[str, float]]) -> float:
    return math.sqrt(sum(value**2 for _, value in part))


def _stem(block: str) -> str:
    return re.sub(r"\.\d+$", "", block)


def _is_text(block: str) -> bool:
    return re.match(r"te\d ", block) is not None


def _blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, drawn in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_BACK)
    FigureCanvasAgg(figure)
    return figure


def _as_array(figure: Figure) -> np.ndarray:
    """Render a figure as [H, W, 3] float32 in 0..1."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba(), dtype=np.float32)[..., :3] / 255.0
