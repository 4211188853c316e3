"""Pictures as a viewer shows them, upright and in RGB; masks and transparency."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from ..text import is_below
from .examples import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image


# File name suffixes of the formats that Pillow reads. Pillow itself recognizes a format by the file's content.
SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp"),
    *(".bmp", ".dib", ".gif", ".avif", ".avifs", ".tif", ".tiff", ".heic", ".heif", ".hif"),
)

# Picture formats that nothing here opens. The report names these files.
_UNREAD = (
    *(".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".ai", ".pdf", ".tga"),
    *(".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".orf"),
    *(".rw2", ".pef", ".srw", ".x3f", ".3fr", ".erf", ".kdc", ".dcr", ".mef", ".mos", ".mrw", ".iiq", ".rwl", ".gpr"),
    *(".ico", ".icns", ".cur", ".pcx", ".ppm", ".pgm", ".pbm", ".pnm", ".dds", ".qoi", ".wmf", ".emf", ".ktx", ".wdp"),
)
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".mpg", ".mpeg", ".flv", ".3gp", ".gifv")
# Files that systems and other programs leave beside pictures. The report does not name them.
_QUIET = (
    *(".npz", ".npy", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".db", ".ini", ".log", ".tmp", ".lnk", ".url"),
    *(".md", ".py", ".sh", ".bat", ".yaml", ".yml", ".toml", ".html"),
)

# Decoding takes at most BYTES_PER_PIXEL, beside the file's own bytes. A file above PIXEL_LIMIT counts as a bomb.
# WebP needs 16: its library keeps two frames of 4 bytes a pixel and returns a third, which Pillow copies.
# AVIF, progressive JPEG and libtiff need up to 12, all others 8: the decoded picture and a rotated or RGB copy.
PIXEL_LIMIT = 178_956_970
BYTES_PER_PIXEL = 16
BYTE_LIMIT = 2 * 1024**3

_STRIP = 1 << 18  # pixels converted at once
_TURNED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257  # TIFF tags of the stored size


class FileSource(Source):
    """Picture file, opened on demand.

    Args:
        path: of the file.
        name: for reports and errors.
        root: the folder that must contain the file, links resolved, at every opening.
        digest: expected hash of the content; empty to accept any content.
    """

    __slots__ = ("digest", "name", "path", "root")

    def __init__(self, path: str, name: str, root: str, digest: str):
        self.path = path
        self.name = name
        self.root = root
        self.digest = digest

    def open(self) -> Image.Image:
        """Decode the file. Raise DatasetError with its name if it is not a picture or has changed since the scan."""
        with reading(self.name):
            return upright_rgb(self._decoded())

    def alpha(self) -> Image.Image:
        """Return the picture's opacity, upright, one channel; white if it has no transparency. Raise as `open`."""
        with reading(self.name):
            return _alpha(self._decoded())

    def weight(self) -> Image.Image:
        """Return the picture as a mask, upright, one channel: black where black or transparent. Raise as `open`."""
        with reading(self.name):
            return _weight(self._decoded())

    def _decoded(self) -> Image.Image:
        """Decode the picture, upright, in the file's own mode."""
        if not is_below(self.path, self.root):
            raise OSError("it is a link that leads out of the folder")
        data = read_bytes(self.path)
        if self.digest and hashlib.sha256(data).hexdigest() != self.digest:
            raise OSError("it was changed after the dataset was read; queue again")
        image = _opened(data)
        _check_size(image)
        return _upright(image)


class MaskSource(Source):
    """Mask file: white counts in the loss, black and transparent do not.

    Args:
        of: the file.
        is_clear: whether part of it is transparent. The digest then says so: earlier versions read transparent as
            white, and the weights that they cached for such a mask must not be found again.
    """

    __slots__ = ("_of", "digest", "name")

    def __init__(self, of: FileSource, is_clear: bool):
        self._of = of
        self.name = of.name
        self.digest = f"clear {of.digest}" if is_clear else of.digest

    def open(self) -> Image.Image:
        """Return the weight of each pixel, one channel, upright. Raise as `FileSource.open`."""
        return self._of.weight()


class AlphaSource(Source):
    """Opacity of another source's picture, used as a mask."""

    __slots__ = ("_of", "digest", "name")

    def __init__(self, of: FileSource):
        self._of = of
        self.name = f"{of.name} (alpha)"
        self.digest = f"alpha {of.digest}"

    def open(self) -> Image.Image:
        """Return the opacity, white where the picture is opaque."""
        return self._of.alpha()


class ArraySource(Source):
    """Picture from a node's input, compressed in memory, since a batch may be large."""

    def __init__(self, array: np.ndarray, name: str):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG", compress_level=1)
        self._png = buffer.getvalue()
        self.name = name
        # Hash the pixels, not the compressed bytes, which change with the library that compresses.
        self.digest = hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()

    def open(self) -> Image.Image:
        """Return the picture in RGB."""
        from PIL import Image

        with Image.open(io.BytesIO(self._png)) as image:
            return upright_rgb(_upright(image))


def read_bytes(path: str) -> bytes:
    """Read a file's content. Raise OSError, also if the file is too large for a picture."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > BYTE_LIMIT:
            raise OSError(f"it has {size} bytes, too many for a picture")
        return file.read()


def measure_file(path: str, name: str) -> tuple[tuple[int, int], str, bool]:
    """Return a file's upright (width, height) in pixels, content hash and transparency, without decoding its pixels.

    Raises:
        DatasetError: the file cannot be a picture. The error names the file. Success does not prove that its pixels
            can be decoded.
    """
    with reading(name):
        data = read_bytes(path)
        if not data:
            raise OSError("it is empty")
        with _opened(data) as image:
            _check_size(image)
            size = _stored_size(image)
            # For a PNG, Pillow decodes the whole file to look for an orientation, which hardly any PNG has.
            marked = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"Raw profile", b"rientation"))
            if marked and image.getexif().get(_ORIENTATION, 1) in _TURNED:
                size = (size[1], size[0])
            transparent = _has_alpha(image)
    return size, hashlib.sha256(data).hexdigest(), transparent


def is_clear(source: FileSource) -> bool:
    """Decode a picture and return True if part of it is not opaque. Raise DatasetError as `open`."""
    return source.alpha().getextrema()[0] < 255


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) before rotation; since version 11, Pillow swaps them when it opens a rotated TIFF."""
    tags = getattr(image, "tag_v2", None)
    if image.format == "TIFF" and tags is not None:
        return int(tags[_WIDTH]), int(tags[_HEIGHT])
    return image.size


_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


def _opened(data: bytes) -> Image.Image:
    """Open the picture in a file's bytes without decoding it. Raise OSError or Pillow's errors."""
    from PIL import Image

    if data[4:8] == b"ftyp" and data[8:12] in _HEIF and b"avif" not in data[8:64]:
        try:
            from pillow_heif import HeifImageFile
        except ImportError as error:
            raise OSError(
                "Pillow does not read HEIC by itself; install pillow-heif into ComfyUI's Python, or save it as JPEG"
            ) from error
        return HeifImageFile(io.BytesIO(data), "")
    return Image.open(io.BytesIO(data))


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > PIXEL_LIMIT:
        raise OSError(f"{image.width}x{image.height} is more than {PIXEL_LIMIT} pixels; scale it down")


class reading:
    """Context that turns any error of Pillow or the file system into an error that names the file."""

    def __init__(self, name: str):
        self.name = name
        self._quiet = warnings.catch_warnings()

    def __enter__(self):
        self._quiet.__enter__()
        # `_check_size` refuses large pictures; warnings about odd but readable files would only alarm.
        warnings.simplefilter("ignore")
        return self

    def __exit__(self, kind, error, trace):
        from PIL import Image, UnidentifiedImageError

        self._quiet.__exit__(kind, error, trace)
        # Decoders raise many kinds of errors for a damaged file, so convert all but interruptions and DatasetError.
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


def _upright(image: Image.Image) -> Image.Image:
    """Decode the picture and rotate it by its EXIF orientation, in its own mode."""
    from PIL import ImageOps

    _scale_transparent_value(image)
    image.load()
    # Pillow rotates a TIFF while decoding, and version 10.0 leaves the tag, which would rotate it once more.
    if image.format != "TIFF":
        # Without in_place, Pillow copies even a picture that needs no rotation.
        ImageOps.exif_transpose(image, in_place=True)
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an upright picture to what a viewer shows: 16 bits scaled, transparency on white, RGB."""
    if image.mode == "RGB" and not _has_alpha(image):
        return image
    return _by_strips(image, "RGB", lambda strip: _on_white(*strip))


def _weight(image: Image.Image) -> Image.Image:
    """Return the brightness of an upright picture, black where it is transparent, one channel."""
    from PIL import ImageChops

    def convert(strip) -> Image.Image:
        rgb, alpha = strip
        return rgb.convert("L") if alpha is None else ImageChops.multiply(rgb.convert("L"), alpha)

    return _by_strips(image, "L", convert)


def _alpha(image: Image.Image) -> Image.Image:
    from PIL import Image

    if not _has_alpha(image):
        return Image.new("L", image.size, 255)
    return _by_strips(image, "L", lambda strip: strip[1])


def _by_strips(image: Image.Image, mode: str, convert: Callable[[tuple], Image.Image]) -> Image.Image:
    """Convert a picture strip by strip, because each step of a conversion makes a copy, which is small for a strip.

    Args:
        convert: maps (RGB, opacity or None) of a strip to the strip in `mode`.
    """
    from PIL import Image

    split = _splitter(image)
    made = Image.new(mode, image.size)
    for box in _strips(image):
        made.paste(convert(split(image.crop(box))), box)
    return made


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _on_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    from PIL import Image

    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, (255, 255, 255, 255)), rgb).convert("RGB")


def _splitter(image: Image.Image) -> Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]:
    """Return a function that splits a strip of a picture into RGB and opacity, None if the picture is opaque."""
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_splitter(image)
    if image.mode == "CMYK":
        to_rgb = _from_cmyk(image)
        return lambda strip: (to_rgb(strip), None)
    if not _has_alpha(image):
        return lambda strip: (strip.convert("RGB"), None)

    def split(strip: Image.Image) -> tuple[Image.Image, Image.Image]:
        rgba = strip.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")

    return split


def _scale_transparent_value(image: Image.Image) -> None:
    """Scale the value that a PNG declares transparent to the range of the decoded samples.

    Pillow widens samples of 2 and 4 bits and narrows color samples of 16 bits, but leaves this value unchanged.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or value is None or not image.tile:
        return
    stored = image.tile[0][3]
    stored = stored if isinstance(stored, str) else stored[0]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(part >> 8 for part in value)


def _from_cmyk(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return a function that converts a CMYK strip to RGB: by the file's color profile, else by Pillow's plain rule.

    Without a profile the values of the inks mean little.
    """
    from PIL import ImageCms

    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "CMYK", "RGB")
            return lambda strip: ImageCms.applyTransform(strip, transform)
        except (ImageCms.PyCMSError, OSError, ValueError):
            return lambda strip: strip.convert("RGB")
    return lambda strip: strip.convert("RGB")


def _deep_splitter(image: Image.Image) -> Callable[[Image.Image], tuple[Image.Image, Image.Image | None]]:
    """Return a splitter for pictures of more than 8 bits per sample, which scales them to 8."""
    from PIL import Image

    top = 65535.0
    if image.mode == "F":
        # Float pictures are in 0..1 or 0..255. For integers the mode decides, since a dark picture's maximum is low.
        top = 1.0 if np.max([_values(image.crop(box)).max() for box in _strips(image)]) <= 1.0 else 255.0
    key = image.info.get("transparency")

    def split(strip: Image.Image) -> tuple[Image.Image, Image.Image | None]:
        values = _values(strip)
        scaled = np.nan_to_num(values / top * 255.0, posinf=255.0, neginf=0.0)
        grey = Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return grey.convert("RGB"), alpha

    return split


def _values(strip: Image.Image) -> np.ndarray:
    return np.asarray(strip).astype(np.float64)


def as_weight(mask: Image.Image) -> Image.Image:
    """Return a mask in one channel; do not copy a mask that already has one."""
    return mask if mask.mode == "L" else mask.convert("L")


def why_unread(name: str) -> str:
    """Return the reason why a file is not read as a picture; empty for a picture or a file to pass over."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES or suffix in _QUIET:
        return ""
    if suffix in _UNREAD:
        return "this format is not read; save it as PNG or JPEG"
    if suffix in _VIDEOS:
        return "a video; save frames of it as PNG or JPEG"
    return "neither a picture nor a caption"


def is_picture(path: str) -> bool:
    """Return True if a file's name has a picture's suffix."""
    return os.path.splitext(path)[1].lower() in SUFFIXES
