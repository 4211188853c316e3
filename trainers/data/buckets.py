"""Which shape a picture is trained in: aspect-ratio buckets.

Source: NovelAI, "Improvements on Stable Diffusion" (2022); kohya sd-scripts' documented rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import DatasetError
from ..protocols import Geometry


@dataclass(frozen=True)
class Crop:
    """How a picture is cut; all in pixels.

    Attributes:
        scaled: (width, height) the whole picture is scaled to.
        offset: (left, top) of the cut in the scaled picture.
        bucket: (width, height) of the cut.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]
    bucket: tuple[int, int]

    @property
    def kept(self) -> float:
        """Share of the scaled picture's area that is trained on."""
        return self.bucket[0] * self.bucket[1] / (self.scaled[0] * self.scaled[1])


def bucket_sizes(geometry: Geometry) -> list[tuple[int, int]]:
    """All (width, height) in multiples of the step, within the area, with sides from half to twice the resolution."""
    area = geometry.resolution**2
    step = geometry.step
    low = max(step, geometry.resolution // 2 // step * step)
    high = max(low, geometry.resolution * 2 // step * step)
    sizes = set()
    for width in range(low, high + 1, step):
        height = min(area // width // step * step, high)
        if height >= low:
            sizes.add((width, height))
            sizes.add((height, width))
    square = max(step, geometry.resolution // step * step)
    sizes.add((square, square))
    return sorted(sizes)


def choose_crop(size: tuple[int, int], geometry: Geometry, name: str) -> Crop:
    """The cut of a picture: the bucket of the nearest aspect ratio, centred, never enlarged.

    A picture smaller than its bucket gets one of its own size, rounded down to the step.

    Args:
        size: (width, height) of the picture, pixels.
        name: for the error.

    Raises:
        DatasetError: a side is shorter than the step.
    """
    width, height = size
    if min(size) < geometry.step:
        raise DatasetError(
            f"The picture '{name}' is {width}x{height}: too small, this model needs {geometry.step} pixels a side.",
            "Take a larger picture, or take it out of the dataset.",
            "dataset",
        )
    aspect = width / height
    bucket = min(bucket_sizes(geometry), key=lambda b: (abs(_log_ratio(b) - _log(aspect)), -b[0] * b[1]))
    factor = max(bucket[0] / width, bucket[1] / height)
    if factor > 1.0:
        bucket = _own_bucket(size, geometry)
        factor = max(bucket[0] / width, bucket[1] / height)
    scaled = (max(bucket[0], round(width * factor)), max(bucket[1], round(height * factor)))
    offset = ((scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)
    return Crop(scaled, offset, bucket)


def _own_bucket(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Largest bucket within the picture and within the area, in the picture's own shape."""
    step = geometry.step
    shrink = min(1.0, geometry.resolution / (size[0] * size[1]) ** 0.5)
    longest = max(step, geometry.resolution * 2 // step * step)
    return tuple(min(longest, max(step, int(side * shrink) // step * step)) for side in size)


def _log(value: float) -> float:
    import math

    return math.log(value)


def _log_ratio(bucket: tuple[int, int]) -> float:
    return _log(bucket[0] / bucket[1])
