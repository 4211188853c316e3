"""Video files, read by PyAV one frame after another, and the pieces of clips that are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from .rng import stream_seed

if TYPE_CHECKING:
    import av
    from PIL import Image

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".mpg", ".mpeg", ".flv", ".3gp")
# FFmpeg's demuxers for these. Others, such as of playlists, would open files that the file names.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,mpeg,mpegts,flv"

_TURNS = {90: 2, 180: 3, 270: 4}  # degrees counterclockwise -> PIL.Image.Transpose
_SIDE_LIMIT = 16_384

FIRST, UNIFORM, RANDOM, WHOLE = PIECES = ("first", "uniform", "random", "whole")

# Number of pieces of a clip for "uniform", and of positions for "random". Each is encoded once.
SAMPLES = 4

# Seconds. Matroska and WebM round timestamps to milliseconds, that of the first frame too.
_ROUNDING = 1e-3

Piece = tuple[int, int]


class VideoFile:
    """Picture track of a video file. Its frames are decoded one by one, and none is kept.

    Attributes:
        times: of the frames in the order of display, seconds after the first one, [frames] float64.

    Raises:
        OSError: the file has no picture track or is damaged, or PyAV is missing.
    """

    def __init__(self, path: str):
        self._path = path
        with _opened(path) as container:
            stream = _video_stream(container)
            stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            base, rate = float(stream.time_base or 0), float(stream.average_rate or 0)
        if not stamps:
            raise OSError("it has no frames")
        self._stamps = None
        if None in stamps:
            # Files such as old AVIs have no timestamps: they cannot be searched.
            self.times = np.arange(len(stamps)) / (rate or 24.0)
        else:
            self._stamps = np.unique(np.array(stamps, dtype=np.int64))
            self.times = (self._stamps - self._stamps[0]) * base

    def frames(self, first: int) -> Iterator[tuple[int, Image.Image]]:
        """Yield (index, frame) of the decodable frames from index `first` on, upright, RGB."""
        if self._stamps is None or not first:
            yield from self._decoded(first, 0)
            return
        frames = self._decoded(first, int(self._stamps[first]))
        index, image = next(frames, (None, None))
        if index is None or index > first:
            # The search landed behind the frame. Decode from the start.
            frames.close()
            yield from self._decoded(first, 0)
            return
        yield index, image
        yield from frames

    def _decoded(self, first: int, stamp: int) -> Iterator[tuple[int, Image.Image]]:
        with _opened(self._path) as container:
            stream = _video_stream(container)
            if stamp:
                container.seek(stamp, stream=stream)
            for number, frame in enumerate(_decode(container, stream)):
                known = self._stamps is not None and frame.pts is not None
                index = int(np.searchsorted(self._stamps, frame.pts)) if known else number
                if index >= first:
                    yield index, _upright(frame)


@contextmanager
def _opened(path: str) -> Iterator[av.container.InputContainer]:
    """Open a file for reading; turn PyAV's errors, which repeat the path, into an OSError."""
    try:
        import av
    except ImportError as error:
        raise OSError("reading videos needs PyAV; install av into ComfyUI's Python") from error
    options = {"protocol_whitelist": "file", "format_whitelist": _DEMUXERS}
    try:
        with av.open(path, options=options, metadata_errors="ignore") as container:
            yield container
    except av.FFmpegError as error:
        raise OSError(f"it is damaged, or no video: {error.strerror}") from error


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
    import av

    cover = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not streams:
        raise OSError("it has no pictures, only sound" if container.streams.audio else "it has no pictures")
    return streams[0]


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    return container.decode(stream)


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Return a frame as ComfyUI's Load Video converts it, 8 bits, RGB, rotated as the file says."""
    from PIL import Image

    if max(frame.width, frame.height) > _SIDE_LIMIT:
        raise OSError(f"{frame.width}x{frame.height} has a side of more than {_SIDE_LIMIT} pixels; scale it down")
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURNS.get(round(frame.rotation) % 360)
    return image if turn is None else image.transpose(Image.Transpose(turn))


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
    return np.maximum(following - is_late, 0)
