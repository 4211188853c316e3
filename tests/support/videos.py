"""Small video files for tests, written by PyAV."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def shade(number: int, size: tuple[int, int] = (32, 24)) -> np.ndarray:
    """Return frame `number`, [H, W, 3] uint8: its gray level tells its number, and its left half is brighter."""
    width, height = size
    frame = np.full((height, width, 3), 20 + number * 5 % 180, np.uint8)
    frame[:, : width // 2] += 40
    return frame


def number_of(image) -> int:
    """Return the number of the frame that `shade` drew, from its right half."""
    pixels = np.asarray(image)
    return round((float(pixels[:, pixels.shape[1] * 3 // 4 :].mean()) - 20) / 5)


def write_video(
    path,
    frames: int = 8,
    size: tuple[int, int] = (32, 24),
    rate: int = 8,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times=None,
    rotation: int = 0,
    keyframes: int = 4,
    draw=shade,
    options=None,
) -> str:
    """Write a video.

    Args:
        times: time of each frame in milliseconds; None for a constant rate.
        rotation: degrees of the display matrix, counterclockwise.
        keyframes: distance of key frames.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or ({"crf": "4"} if "264" in codec else {}))
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = keyframes
        if rotation:
            stream.set_display_rotation(rotation)
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(draw(number, size), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def write_sound(path) -> str:
    """Write a file with sound alone."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)
