"""Opening pictures as a viewer shows them, and cutting them to a bucket."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from .examples import Source

if TYPE_CHECKING:
    from PIL import Image

    from .buckets import Crop

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".avif", ".tif", ".tiff")

# Pictures all the same, but nothing here opens them; they are named in the report instead of passed over.
UNREAD = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".tga", ".exr", ".hdr", ".raw", ".dng", ".cr2", ".nef")

# Decoding takes three bytes a pixel and as much again while it is turned; beyond this a file is taken for a bomb.
PIXEL_LIMIT = 178_956_970
BYTE_LIMIT = 2 * 1024**3

_TURNED = (5, 6, 7, 8)
_ORIENTATION = 0x0112


class FileSource(Source):
    """A picture file, opened when needed.

    Args:
        path: of the file.
        name: for reports and errors.
        root: the folder it must lie in, links followed, whenever it is opened.
        digest: hash of the content that is expected; empty to take what is there.
    """

    __slots__ = ("digest", "name", "path", "root")

    def __init__(self, path: str, name: str, root: str, digest: str):
        self.path = path
        self.name = name
        self.root = root
        self.digest = digest

    def open(self) -> Image.Image:
        """Raises DatasetError naming the file when it is no picture, or not the one that was there before."""
        with reading(self.name):
            return upright_rgb(self._decoded())

    def alpha(self) -> Image.Image:
        """The picture's opacity, upright, one channel; white where it has none. Raises as `open`."""
        with reading(self.name):
            return _alpha(self._decoded())

    def _decoded(self) -> Image.Image:
        from PIL import Image

        if not is_below(self.path, self.root):
            raise OSError("it is a link that leads out of the folder")
        data = read_bytes(self.path)
        if self.digest and hashlib.sha256(data).hexdigest() != self.digest:
            raise OSError("it was changed after the dataset was read; queue again")
        image = Image.open(io.BytesIO(data))
        _check_size(image)
        image.load()
        return image


class AlphaSource(Source):
    """The opacity of another source's picture, as a mask."""

    __slots__ = ("_of", "digest", "name")

    def __init__(self, of: FileSource):
        self._of = of
        self.name = f"{of.name} (alpha)"
        self.digest = f"alpha {of.digest}"

    def open(self) -> Image.Image:
        """The opacity, white where the picture is opaque."""
        return self._of.alpha()


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


def is_below(path: str, root: str) -> bool:
    """Whether a path, links followed, lies in a folder, links followed."""
    real = os.path.realpath(path)
    base = os.path.realpath(root)
    try:
        return os.path.commonpath([real, base]) == base
    except ValueError:
        # Another drive.
        return False


def read_bytes(path: str) -> bytes:
    """A file's content. Raises OSError, also when it is too large for a picture."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > BYTE_LIMIT:
            raise OSError(f"it has {size} bytes, too many for a picture")
        return file.read()


def measure_file(path: str, name: str) -> tuple[tuple[int, int], str, bool]:
    """Upright (width, height) in pixels, content hash and whether there is transparency; from the file's head alone.

    Raises:
        DatasetError: naming the file, when it cannot be a picture; that its pixels can be decoded is not said yet.
    """
    from PIL import Image

    with reading(name):
        data = read_bytes(path)
        if not data:
            raise OSError("it is empty")
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image)
            size = image.size
            # Pillow decodes a whole PNG to look for an orientation, which hardly any has.
            marked = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"Raw profile", b"rientation"))
            if marked and image.getexif().get(_ORIENTATION, 1) in _TURNED:
                size = (size[1], size[0])
            transparent = _has_alpha(image)
    return size, hashlib.sha256(data).hexdigest(), transparent


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > PIXEL_LIMIT:
        raise OSError(f"{image.width}x{image.height} is more than {PIXEL_LIMIT} pixels; scale it down")


class reading:
    """Turns whatever Pillow or the file system raises into an error that names the file."""

    def __init__(self, name: str):
        self.name = name
        self._quiet = warnings.catch_warnings()

    def __enter__(self):
        self._quiet.__enter__()
        # Large pictures are measured by ourselves; warnings for odd but readable files would only alarm.
        warnings.simplefilter("ignore")
        return self

    def __exit__(self, kind, error, trace):
        from PIL import Image, UnidentifiedImageError

        self._quiet.__exit__(kind, error, trace)
        # Decoders raise many kinds for a damaged file; only interruption and programming errors are let through.
        if error is None or isinstance(error, DatasetError) or not isinstance(error, Exception):
            return False
        if isinstance(error, UnidentifiedImageError):
            reason = "it is in no known picture format"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {PIXEL_LIMIT} pixels; scale it down"
        elif isinstance(error, MemoryError):
            reason = "there is not enough memory to decode it"
        else:
            reason = error
        raise DatasetError(
            f"The picture '{self.name}' cannot be read ({reason}).",
            "Save it again as PNG or JPEG, or take it out of the folder.",
            "folder",
        ) from error


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: EXIF rotation applied, 16 bit scaled, transparency on white, RGB."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode == "CMYK":
        return _from_cmyk(image)
    if _has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if not _has_alpha(image):
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """By the profile the file carries, without which its inks mean little; by Pillow's plain rule otherwise."""
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return image.convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    # By mode, since a dark picture's values say nothing of its range; float pictures come in 0..1 or 0..255.
    top = 65535.0 if image.mode.startswith("I") else (1.0 if values.max() <= 1.0 else 255.0)
    scaled = np.nan_to_num(values / top * 255.0, posinf=255.0, neginf=0.0)
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))


def cut(image: Image.Image, crop: Crop) -> Image.Image:
    """The picture mirrored, scaled and cropped as `crop` says; Lanczos, as the field does."""
    from PIL import Image

    if crop.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = crop.offset
    width, height = crop.bucket
    if image.size == crop.scaled:
        return image.crop((left, top, left + width, top + height))
    # Scaled from the part that stays: the whole of a very long picture, enlarged, would fill the memory.
    x = image.width / crop.scaled[0]
    y = image.height / crop.scaled[1]
    right, bottom = min(image.width, (left + width) * x), min(image.height, (top + height) * y)
    return image.resize(crop.bucket, Image.LANCZOS, box=(left * x, top * y, right, bottom))


def to_array(image: Image.Image) -> np.ndarray:
    """[H, W, 3] float32 in 0..1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0


def is_picture(path: str) -> bool:
    """Whether a file's name says it is a picture."""
    return os.path.splitext(path)[1].lower() in SUFFIXES
