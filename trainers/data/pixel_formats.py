"""Conversions of every pixel format to RGB and to mask weights, strip by strip in bounded memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image


_STRIP = 1 << 18  # pixels converted at once


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def turn_upright(image: Image.Image) -> Image.Image:
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
    if image.mode == "RGB" and not has_alpha(image):
        return image
    return _by_strips(image, "RGB", lambda strip: _on_white(*strip))


def mask_weight(image: Image.Image) -> Image.Image:
    """Return the brightness of an upright picture, black where it is transparent, one channel."""
    from PIL import ImageChops

    def convert(strip) -> Image.Image:
        rgb, alpha = strip
        return rgb.convert("L") if alpha is None else ImageChops.multiply(rgb.convert("L"), alpha)

    return _by_strips(image, "L", convert)


def read_alpha(image: Image.Image) -> Image.Image:
    from PIL import Image

    if not has_alpha(image):
        return Image.new("L", image.size, 255)
    return _by_strips(image, "L", lambda strip: strip[1])


def _by_strips(image: Image.Image, mode: str, convert: Callable[[tuple], Image.Image]) -> Image.Image:
    """Convert a picture strip by strip, because each step of a conversion makes a copy, which is small for a strip.

    Args:
        convert: maps (RGB, opacity or None) of a strip to the strip in `mode`.
    """
    from PIL import Image

    split = _splitter(image)
    converted = Image.new(mode, image.size)
    for box in _strips(image):
        converted.paste(convert(split(image.crop(box))), box)
    return converted


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
    if not has_alpha(image):
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
        gray = Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return gray.convert("RGB"), alpha

    return split


def _values(strip: Image.Image) -> np.ndarray:
    return np.asarray(strip).astype(np.float64)


def as_weight(mask: Image.Image) -> Image.Image:
    """Return a mask in one channel; do not copy a mask that already has one."""
    return mask if mask.mode == "L" else mask.convert("L")
