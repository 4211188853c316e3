"""Pieces of clips: which frames are trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..rng import stream_seed

FIRST, UNIFORM, RANDOM, WHOLE = PIECES = ("first", "uniform", "random", "whole")

# Number of pieces of a clip for "uniform", and of positions for "random". Each is encoded once.
SAMPLES = 4

# Seconds. Matroska and WebM round timestamps to milliseconds, that of the first frame too.
_ROUNDING = 1e-3

Piece = tuple[int, int]


def choose_pieces(count: int, frames: int, pieces: str, snap: Callable[[int], int], seed: str = "") -> list[Piece]:
    """Choose pieces of a clip as (first frame, number of frames).

    "first" takes the first frames, "uniform" SAMPLES pieces at even distances, "random" pieces at SAMPLES random
    positions that take turns, "whole" all pieces behind one another without a shorter rest. A clip that is shorter
    than a piece gives one shorter piece.

    Source: kohya's musubi-tuner, docs/dataset_config.md, frame_extraction: head, uniform, chunk, full.

    Args:
        count: number of frames of the clip.
        frames: requested frames of a piece.
        snap: returns the largest number of frames, up to a number, that the codec takes.
        seed: for "random".
    """
    length = max(1, snap(min(frames, count)))
    last = count - length
    if pieces == FIRST or length < snap(frames):
        starts = [0]
    elif pieces == UNIFORM:
        starts = np.linspace(0, last, SAMPLES, dtype=int).tolist()
    elif pieces == RANDOM:
        starts = [stream_seed("clip", seed, number) % (last + 1) for number in range(SAMPLES)]
    else:
        starts = list(range(0, last + 1, length))
    return [(start, length) for start in dict.fromkeys(starts)]


def count_at_rate(last: float, frames: int, rate: float) -> int:
    """Return the number of frames of a clip at a frame rate.

    Args:
        last: time of the last frame after the first one, seconds.
        frames: number of frames in the file.
        rate: frames per second, 0 for the file's own frames.
    """
    return int((last + _ROUNDING) * rate) + 1 if rate else frames


def frames_at_rate(times: np.ndarray | Sequence[float], rate: float, start: int, count: int) -> np.ndarray:
    """Return the indices of the file's frames that stand for `count` frames from `start` on at a frame rate.

    Frame k is the first one from k / rate seconds on and before the time of frame k + 1, else the one shown until then.

    Args:
        times: of the file's frames after the first one, seconds, ascending.
        rate: frames per second, 0 for the file's own frames.
    """
    wanted = np.arange(start, start + count)
    if not rate:
        return wanted
    times = np.asarray(times)
    following = np.minimum(np.searchsorted(times, wanted / rate - _ROUNDING), len(times) - 1)
    is_late = times[following] >= (wanted + 1) / rate - _ROUNDING
    return following - is_late
