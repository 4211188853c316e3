"""Pixels of a picture, cropped to a bucket, as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

    from ..data.buckets import Crop
    from ..data.examples import Example


def cut(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the picture mirrored, scaled and cropped as `crop` says, with Lanczos, as is usual in the field."""
    from PIL import Image

    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = crop.offset
    width, height = crop.bucket
    if image.size == crop.scaled:
        return image.crop((left, top, left + width, top + height))
    # Resize only the part that stays: the whole of a very long picture, enlarged, would fill the memory.
    return image.resize(crop.bucket, Image.LANCZOS, box=_box(image, crop))


def cut_unscaled(image: Image.Image, crop: Crop) -> Image.Image:
    """Return the part of the picture that `crop` keeps, mirrored as it says, but at the picture's own scale."""
    from PIL import Image

    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.crop(tuple(round(side) for side in _box(image, crop)))


def _box(image: Image.Image, crop: Crop) -> tuple[float, float, float, float]:
    left, top = crop.offset
    width, height = crop.bucket
    x = image.width / crop.scaled[0]
    y = image.height / crop.scaled[1]
    return left * x, top * y, min(image.width, (left + width) * x), min(image.height, (top + height) * y)


def clip_array(example: Example, crop: Crop) -> np.ndarray:
    """Return a piece of a clip as [frames, H, W, 3] float32 in 0..1. Hold one whole frame at a time.

    Raises:
        DatasetError: the piece cannot be decoded, or a frame has another size than the first one.
    """
    start, count = crop.piece
    width, height = crop.bucket
    pixels = np.empty((count, height, width, 3), dtype=np.float32)
    for number, frame in enumerate(example.source.frames(start, count, example.clip.rate)):
        if frame.size != example.size:
            raise DatasetError(
                f"The clip '{example.source.name}' has frames of {frame.size} and of {example.size} pixels.",
                "Save it again in one size.",
                "folder",
            )
        pixels[number] = to_array(cut(frame, crop))
    return pixels


def to_array(image: Image.Image) -> np.ndarray:
    """Return a picture as [H, W, 3] float32 in 0..1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
