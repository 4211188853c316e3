"""Opening pictures as a viewer shows them, and cutting them to a bucket."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from .examples import Source

if TYPE_CHECKING:
    from PIL import Image

    from .buckets import Crop

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff")


class FileSource(Source):
    """A picture file, opened when needed."""

    def __init__(self, path: str, name: str):
        self.path = path
        self.name = name

    def open(self) -> Image.Image:
        """Raises DatasetError naming the file when it is no picture."""
        with _reading(self.name):
            from PIL import Image

            with Image.open(self.path) as image:
                return upright_rgb(image)


class ArraySource(Source):
    """A picture that came over a graph's wire; compressed in memory, since a batch may be large."""

    def __init__(self, array: np.ndarray, name: str):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
        self._png = buffer.getvalue()
        self.name = name
        # Of the pixels, not of the compressed bytes: those change with the library that compresses.
        self.digest = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()

    def open(self) -> Image.Image:
        """The picture in RGB."""
        from PIL import Image

        with Image.open(io.BytesIO(self._png)) as image:
            return upright_rgb(image)


def measure_file(path: str, name: str) -> tuple[tuple[int, int], str]:
    """Upright (width, height) in pixels and content hash of a picture file.

    Raises:
        DatasetError: naming the file, when it cannot be read as a picture.
    """
    from PIL import Image

    with _reading(name):
        with open(path, "rb") as file:
            data = file.read()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size = image.size
            if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
                size = (size[1], size[0])
    return size, hashlib.sha256(data).hexdigest()


class _reading:
    """Turns whatever Pillow or the file system raises into an error that names the file."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        from PIL import Image, UnidentifiedImageError

        expected = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
        if error is None or isinstance(error, DatasetError) or not isinstance(error, expected):
            return False
        reason = "it is in no known picture format" if isinstance(error, UnidentifiedImageError) else error
        raise DatasetError(
            f"The picture '{self.name}' cannot be read ({reason}).",
            "Save it again as PNG or JPEG, or take it out of the folder.",
            "folder",
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: EXIF rotation applied, 16 bit scaled, transparency on white, RGB."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    # By mode, since a dark picture's values say nothing of its range; float pictures come in 0..1 or 0..255.
    top = 65535.0 if image.mode.startswith("I") else (1.0 if values.max() <= 1.0 else 255.0)
    return Image.fromarray(np.clip(values / top * 255.0 + 0.5, 0, 255).astype(np.uint8))


def cut(image: Image.Image, crop: Crop) -> Image.Image:
    """The picture scaled and cropped as `crop` says; Lanczos, as the field does."""
    from PIL import Image

    if image.size != crop.scaled:
        image = image.resize(crop.scaled, Image.LANCZOS)
    left, top = crop.offset
    width, height = crop.bucket
    return image.crop((left, top, left + width, top + height))


def to_array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] float32 in 0..1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0


def is_picture(path: str) -> bool:
    """Whether a file's name says it is a picture."""
    return os.path.splitext(path)[1].lower() in SUFFIXES
