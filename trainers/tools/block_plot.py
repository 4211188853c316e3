"""A bar plot of how much an adapter changes each block of the model."""

from __future__ import annotations

import itertools
import math
import re
from typing import TYPE_CHECKING

from . import figure
from .inspect import Findings, block_norms, headline

if TYPE_CHECKING:
    import numpy as np

_WIDTH = 4.8
_ROW = 0.17
_HEAD = 0.75
_MOST = 36


def picture(findings: Findings) -> np.ndarray:
    """Draw one bar per block with its norm, text encoders in another color, as [H, W, 3] float32 in 0..1."""
    rows = joined(block_norms(findings), _MOST)
    canvas = figure.blank(_WIDTH, _HEAD + _ROW * max(4, len(rows)))
    height = canvas.get_figheight()
    axes = canvas.add_axes((0.34, 0.12 / height, 0.53, 1 - (_HEAD + 0.05) / height), facecolor=figure.BACK)
    canvas.text(0.03, 1 - 0.24 / height, headline(findings), color=figure.INK, fontsize=figure.LETTERS + 2)
    canvas.text(
        0.03, 1 - 0.47 / height, "norm of the change of each block", color=figure.FAINT, fontsize=figure.LETTERS
    )
    finite = [value if math.isfinite(value) else 0.0 for _, value in rows]
    colors = [figure.SECOND if _is_text(block) else figure.FIRST for block, _ in rows]
    axes.barh(range(len(rows)), finite, color=colors, height=0.72)
    axes.set_yticks(range(len(rows)), [block for block, _ in rows], fontsize=figure.LETTERS, color=figure.INK)
    axes.set_ylim(max(4, len(rows)) - 0.4, -0.6)
    top = max(finite, default=0.0) or 1.0
    axes.set_xlim(0, top)
    for place, (_, value) in enumerate(rows):
        length = value if math.isfinite(value) else 0.0
        axes.text(length + top * 0.02, place, _number(value), va="center", fontsize=figure.LETTERS, color=figure.FAINT)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if not rows:
        axes.text(0, 1, "no norms to show", fontsize=figure.LETTERS, color=figure.FAINT)
    return figure.as_array(canvas)


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
