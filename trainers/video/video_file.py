"""Video files, read by PyAV one frame after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    from PIL import Image

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".mpg", ".mpeg", ".flv", ".3gp")
# FFmpeg's demuxers for these. Others, such as of playlists, would open files that the file names.
_DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,mpeg,mpegts,flv"

_TURNS = {90: 2, 180: 3, 270: 4}  # degrees counterclockwise -> PIL.Image.Transpose
_SIDE_LIMIT = 16_384


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
        """Yield frames from index `first` on, after a search for a timestamp if it is not 0."""
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
