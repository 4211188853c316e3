"""Pictures as a viewer shows them, upright and in RGB; masks and transparency."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from ..text import is_below
from ..video import SUFFIXES as VIDEOS
from .examples import Source
from .pixel_formats import has_alpha, mask_weight, read_alpha, turn_upright, upright_rgb

if TYPE_CHECKING:
    from PIL import Image

    from .index import Index
    from .listing import File

# Names whose parts are kept: a scan asks for those of each name many times.
NAMES = 65_536
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
# Files that systems and other programs leave beside pictures. The report does not name them.
_QUIET = (
    *(".npz", ".npy", ".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".db", ".ini", ".log", ".tmp", ".lnk", ".url"),
    *(".bak", ".md", ".py", ".sh", ".bat", ".yaml", ".yml", ".toml", ".html"),
)

# Decoding takes at most BYTES_PER_PIXEL, beside the file's own bytes. A file above PIXEL_LIMIT counts as a bomb.
# WebP needs 16: its library keeps two frames of 4 bytes a pixel and returns a third, which Pillow copies.
# AVIF, progressive JPEG and libtiff need up to 12, all others 8: the decoded picture and a rotated or RGB copy.
PIXEL_LIMIT = 178_956_970
# Limit of JPEG. Conversion takes memory for whole rows.
SIDE_LIMIT = 65_535
BYTES_PER_PIXEL = 16
BYTE_LIMIT = 2 * 1024**3
_TURNED = (5, 6, 7, 8)
_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257  # TIFF tags of the stored size


class FileSource(Source):
    """Picture file, opened on demand.

    Args:
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
            return upright_rgb(self.decoded())

    def alpha(self) -> Image.Image:
        """Return the picture's opacity, upright, one channel; white if it has no transparency. Raise as `open`."""
        with reading(self.name):
            return read_alpha(self.decoded())

    def weight(self) -> Image.Image:
        """Return the picture as a mask, upright, one channel: black where black or transparent. Raise as `open`."""
        with reading(self.name):
            return mask_weight(self.decoded())

    def decoded(self) -> Image.Image:
        """Return the picture upright, in the file's own mode. Raise OSError or Pillow's errors."""
        if not is_below(self.path, self.root):
            raise OSError("it is a link that leads out of the folder")
        data = read_bytes(self.path)
        if self.digest and hashlib.sha256(data).hexdigest() != self.digest:
            raise OSError("it changed after Graft read the dataset; queue the graph again")
        image = open_bytes(data)
        _check_size(image)
        return turn_upright(image)


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
        self.digest = pixel_digest(array)

    def open(self) -> Image.Image:
        """Return the picture in RGB."""
        from PIL import Image

        with Image.open(io.BytesIO(self._png)) as image:
            return upright_rgb(turn_upright(image))


def pixel_digest(array: np.ndarray) -> str:
    """Hash a picture's pixels, not its compressed bytes, which change with the library that compresses."""
    return hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest()


def read_bytes(path: str) -> bytes:
    """Read a file's content. Raise OSError, also if the file is too large for a picture."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > BYTE_LIMIT:
            raise OSError(f"it is too large for a picture ({size} bytes)")
        return file.read()


def measure_file(path: str, name: str) -> tuple[tuple[int, int], str, bool]:
    """Return a file's upright (width, height) in pixels, content hash and transparency, without decoding its pixels.

    Raises:
        DatasetError: the file cannot be a picture. Success does not prove that its pixels
            can be decoded.
    """
    with reading(name):
        data = read_bytes(path)
        if not data:
            raise OSError("it is empty")
        with open_bytes(data) as image:
            _check_size(image)
            size = _stored_size(image)
            # For a PNG, Pillow decodes the whole file to look for an orientation, which hardly any PNG has.
            marked = image.format != "PNG" or any(mark in data for mark in (b"eXIf", b"Raw profile", b"rientation"))
            if marked and image.getexif().get(_ORIENTATION, 1) in _TURNED:
                size = (size[1], size[0])
            transparent = has_alpha(image)
    return size, hashlib.sha256(data).hexdigest(), transparent


def measured(file: File, index: Index) -> dict:
    """Return `measure_facts` of a file, from the index if it knows them."""
    return index.get_or_make(file.path, file.stat, lambda: measure_facts(file), are_facts)


def measure_facts(file: File) -> dict:
    """Return the facts about a picture's file that an index keeps. Raise as `measure_file`."""
    size, digest, transparent = measure_file(file.path, file.name)
    return {"size": list(size), "digest": digest, "alpha": transparent}


def are_facts(facts: dict) -> bool:
    """Return True if facts from an index have the form of `measure_facts`."""
    size = facts.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return False
    return isinstance(facts.get("digest"), str) and isinstance(facts.get("alpha"), bool)


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


def open_bytes(data: bytes) -> Image.Image:
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
    if max(image.size) > SIDE_LIMIT:
        raise OSError(f"{image.width}x{image.height} has a side of more than {SIDE_LIMIT} pixels; crop it")


class _ReadingThreads(threading.local):
    """Pattern of a warnings filter: matches every warning of a thread that reads a picture, and none of others.

    `warnings.catch_warnings` is not thread-safe: with two threads it can leave its filter behind.
    """

    depth = 0

    def match(self, text: str) -> bool:
        return self.depth > 0


_reading = _ReadingThreads()
_QUIET_WHILE_READING = ("ignore", _reading, Warning, None, 0)


class reading:
    """Context that turns any error of Pillow or the file system into an error that names the file."""

    def __init__(self, name: str, kind: str = "picture"):
        self.name = name
        self.kind = kind

    def __enter__(self):
        # `_check_size` refuses large pictures; warnings about odd but readable files would only alarm.
        if warnings.filters[:1] != [_QUIET_WHILE_READING]:
            with suppress(ValueError):
                warnings.filters.remove(_QUIET_WHILE_READING)
            warnings.filters.insert(0, _QUIET_WHILE_READING)
        _reading.depth += 1
        return self

    def __exit__(self, kind, error, trace):
        from PIL import Image, UnidentifiedImageError

        _reading.depth -= 1
        # Decoders raise many kinds of errors for a damaged file, so convert all but interruptions and DatasetError.
        if error is None or isinstance(error, DatasetError) or not isinstance(error, Exception):
            return False
        if isinstance(error, UnidentifiedImageError):
            reason = "its picture format is unknown"
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {PIXEL_LIMIT} pixels; scale it down"
        elif isinstance(error, MemoryError):
            reason = "there is not enough memory to decode it"
        else:
            reason = error
        formats = "PNG or JPEG" if self.kind == "picture" else "MP4"
        raise DatasetError(
            f"The {self.kind} '{self.name}' cannot be read ({reason}).",
            f"Save it again as {formats}, or remove it from the folder.",
            "folder",
        ) from error


def why_unread(name: str) -> str:
    """Return the reason why a file is not read as a picture; empty for a picture or a file to pass over."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in SUFFIXES or suffix in _QUIET:
        return ""
    if suffix in _UNREAD:
        return "Graft cannot read this format; save it as PNG or JPEG"
    if suffix in VIDEOS:
        return "a video; set frames to train on it, or save frames of it as PNG or JPEG"
    return "neither a picture nor a caption"


@functools.lru_cache(maxsize=NAMES)
def is_picture(path: str) -> bool:
    """Return True if a file's name has a picture's suffix."""
    return os.path.splitext(path)[1].lower() in SUFFIXES
