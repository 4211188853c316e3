"""Aspect-ratio buckets: the sizes that pictures are cropped to.

Source: NovelAI, "Improvements on Stable Diffusion" (2022); kohya sd-scripts' documented rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..errors import DatasetError
from ..families import family_of
from ..protocols import Geometry


@dataclass(frozen=True)
class Crop:
    """Crop of a picture; all values in pixels.

    Attributes:
        scaled: (width, height) that the whole picture is scaled to.
        offset: (left, top) of the crop in the scaled picture.
        bucket: (width, height) of the crop.
        flip: whether the picture is mirrored first; the offset then refers to the mirrored picture.
        piece: None for a still, or the (first frame, number of frames) of a clip, at its frame rate.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]
    bucket: tuple[int, int]
    flip: bool = False
    # Hidden: masks are drawn from the text of a still's crop.
    piece: tuple[int, int] | None = field(default=None, repr=False)

    @property
    def frames(self) -> int:
        """Number of frames, 1 for a still."""
        return 1 if self.piece is None else self.piece[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Key of crops that fit into one batch: (width, height) for one frame, else (width, height, frames)."""
        return batch_shape(self.bucket, self.frames)

    @property
    def kept(self) -> float:
        """Fraction of the scaled picture's area that the crop keeps."""
        return self.bucket[0] * self.bucket[1] / (self.scaled[0] * self.scaled[1])

    def mirrored(self) -> Crop:
        """Return the crop that shows the same part of the picture mirrored."""
        left = self.scaled[0] - self.bucket[0] - self.offset[0]
        return replace(self, offset=(left, self.offset[1]), flip=not self.flip)

    def centered_on(self, center: tuple[float, float]) -> Crop:
        """Return the crop of the same size whose middle is nearest to a point, in fractions of width and height."""
        rows = zip(center, self.scaled, self.bucket, strict=True)
        offset = tuple(min(max(0, round(point * whole - part / 2)), whole - part) for point, whole, part in rows)
        return replace(self, offset=offset)


def batch_shape(bucket: tuple[int, int], frames: int) -> tuple[int, ...]:
    """Return the key of crops that fit into one batch, see `Crop.shape`."""
    return bucket if frames == 1 else (*bucket, frames)


@functools.lru_cache(maxsize=64)
def bucket_sizes(geometry: Geometry) -> tuple[tuple[int, int], ...]:
    """List all (width, height) in multiples of the step, within the area, sides from half to twice the resolution."""
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
    return tuple(sorted(sizes))


def geometry_without_model(resolution: int) -> Geometry:
    """Return the picture sizes for a resolution, 0 for SD1's, while the model is unknown."""
    resolution = resolution or family_of("SD1").resolution
    return Geometry(resolution, min(64, max(8, resolution // 8)))


def choose_crops(
    size: tuple[int, int],
    geometries: Sequence[Geometry],
    name: str,
    upscale: bool = False,
    center: tuple[float, float] | None = None,
) -> list[Crop]:
    """Choose the crops of a picture for one or several resolutions, without duplicates.

    Without `upscale`, a picture gets a crop for each resolution that it reaches; one crop if it reaches none.

    Args:
        center: point to center the crops on, in fractions of width and height; None for the picture's middle.

    Raises:
        DatasetError: a side is shorter than the step, and `upscale` is off.
    """
    first = None
    usual = []
    for geometry in sorted(geometries, key=_by_resolution):
        crop = choose_crop(size, geometry, name, upscale)
        if center is not None:
            crop = crop.centered_on(center)
        first = first or crop
        if crop.bucket in bucket_sizes(geometry):
            usual.append(crop)
    return list(dict.fromkeys(usual or [first]))


def _by_resolution(geometry: Geometry) -> int:
    return geometry.resolution


def choose_crop(size: tuple[int, int], geometry: Geometry, name: str, upscale: bool = False) -> Crop:
    """Choose the crop of a picture: the bucket of the nearest aspect ratio, centered, enlarged only with `upscale`.

    A picture smaller than its bucket gets a bucket of its own size, rounded down to the step.

    Args:
        size: (width, height) of the picture, pixels.

    Raises:
        DatasetError: a side is shorter than the step, and `upscale` is off.
    """
    width, height = size
    if min(size) < geometry.step and not upscale:
        raise DatasetError(
            f"The picture '{name}' is too small ({width}x{height}): this model needs {geometry.step} pixels per side.",
            "Use a larger picture, turn on upscale, or remove the picture from the dataset.",
            "dataset",
        )
    bucket = _nearest_bucket(width / height, geometry)
    factor = max(bucket[0] / width, bucket[1] / height)
    if factor > 1.0 and not upscale:
        bucket = _own_bucket(size, geometry)
        factor = max(bucket[0] / width, bucket[1] / height)
    scaled = (max(bucket[0], round(width * factor)), max(bucket[1], round(height * factor)))
    offset = ((scaled[0] - bucket[0]) // 2, (scaled[1] - bucket[1]) // 2)
    return Crop(scaled, offset, bucket)


def usual_bucket(buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the most common bucket, the smallest of equals."""
    return max(sorted(set(buckets)), key=buckets.count)


@functools.lru_cache(maxsize=4096)
def _nearest_bucket(aspect: float, geometry: Geometry) -> tuple[int, int]:
    """Return the bucket nearest in log aspect ratio, the largest of equals.

    The logarithm treats landscape and portrait alike, so the crop keeps most of the picture.
    """
    return min(bucket_sizes(geometry), key=lambda b: (abs(_log_ratio(b) - _log(aspect)), -b[0] * b[1]))


def _own_bucket(size: tuple[int, int], geometry: Geometry) -> tuple[int, int]:
    """Return the largest bucket within the picture and within the area, in the picture's own shape."""
    step = geometry.step
    shrink = min(1.0, geometry.resolution / (size[0] * size[1]) ** 0.5)
    longest = max(step, geometry.resolution * 2 // step * step)
    return tuple(min(longest, max(step, int(side * shrink) // step * step)) for side in size)


def _log(value: float) -> float:
    import math

    return math.log(value)


def _log_ratio(bucket: tuple[int, int]) -> float:
    return _log(bucket[0] / bucket[1])
