"""Canvas, colors and array conversion, shared by all plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

DPI = 100
LETTERS = 8
BACK, INK, FAINT = "#28282c", "#ebebeb", "#96969b"
# Colors of the first and the second series.
FIRST, SECOND = "#6096d6", "#f0b040"


def blank(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, drawn in memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACK)
    FigureCanvasAgg(figure)
    return figure


def as_array(figure: Figure) -> np.ndarray:
    """Render a figure as [H, W, 3] float32 in 0..1."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba(), dtype=np.float32)[..., :3] / 255.0
