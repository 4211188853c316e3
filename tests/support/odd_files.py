"""A folder of two hundred files of every valid and every invalid kind that people have.

`make(folder)` writes them and states the expected result for each.
"""

import os
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIZE = (96, 64)


@dataclass(frozen=True)
class Odd:
    """The expected result for a file.

    Attributes:
        picture: [H, W, 3] uint8 as a viewer shows it, None if the file cannot be trained on.
        reason: part of the report's text about it, if it cannot.
        tolerance: largest mean difference of the decoded pixels, in units of 255.
    """

    picture: np.ndarray | None
    reason: str = ""
    tolerance: float = 0.0


def quarters(number):
    """Return [64, 96, 3] uint8 in four colors, so that every rotation and mirror image differs."""
    rng = np.random.RandomState(number)
    picture = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    half = (SIZE[1] // 2, SIZE[0] // 2)
    for y in (0, 1):
        for x in (0, 1):
            picture[y * half[0] : (y + 1) * half[0], x * half[1] : (x + 1) * half[1]] = rng.randint(40, 215, 3)
    return picture


# A viewer's picture of a stored one, by its EXIF orientation; from the EXIF 2.3 standard's table of corners.
SHOWN = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored),
}


def make(folder, outside, seed=0):
    """Write the files into a folder; return {name: Odd}, 200 of them.

    Args:
        outside: a folder that links may lead to.
    """
    made = {}
    kinds = [_plain, _oriented, _modes, _names, _damaged, _sizes, _links]
    number = seed * 1000
    while len(made) < 200:
        for kind in kinds:
            for name, odd in kind(folder, outside, number):
                if len(made) < 200:
                    made[name] = odd
                else:
                    os.remove(os.path.join(folder, name))
                number += 1
    return made


def _save(folder, name, image, **more):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    image.save(path, **more)
    return path


def _plain(folder, outside, number):
    pixels = quarters(number)
    image = Image.fromarray(pixels)
    for suffix, more, tolerance in (
        ("png", {}, 0.0),
        ("bmp", {}, 0.0),
        ("webp", {"lossless": True}, 0.0),
        ("jpg", {"quality": 95}, 4.0),
        ("jpeg", {"quality": 95, "progressive": True}, 4.0),
        ("tiff", {}, 0.0),
        ("avif", {"quality": 95}, 4.0),
    ):
        name = f"plain-{number}.{suffix}"
        _save(folder, name, image, **more)
        yield name, Odd(pixels, tolerance=tolerance)
    name = f"moving-{number}.gif"
    image.save(os.path.join(folder, name), save_all=True, append_images=[Image.new("RGB", SIZE, "black")])
    yield name, Odd(pixels, tolerance=4.0)


def _oriented(folder, outside, number):
    for orientation, shown in SHOWN.items():
        pixels = quarters(number + orientation)
        exif = Image.Exif()
        exif[0x0112] = orientation
        suffix = ("png", "jpg", "webp", "tif")[(number + orientation) % 4]
        name = f"turned-{number}-{orientation}.{suffix}"
        more = {"lossless": True} if suffix == "webp" else {}
        _save(folder, name, Image.fromarray(pixels), exif=exif, **more)
        yield name, Odd(np.ascontiguousarray(shown(pixels)), tolerance=6.0 if suffix == "jpg" else 0.0)


def _modes(folder, outside, number):
    pixels = quarters(number)
    image = Image.fromarray(pixels)
    gray = np.asarray(image.convert("L"))

    name = f"inks-{number}.jpg"
    _save(folder, name, image.convert("CMYK"), quality=95)
    yield name, Odd(pixels, tolerance=6.0)

    name = f"deep-{number}.png"
    _save(folder, name, Image.fromarray(gray.astype(np.uint16) * 257))
    yield name, Odd(np.repeat(gray[..., None], 3, 2), tolerance=1.0)

    name = f"deep-{number}.tif"
    _save(folder, name, Image.fromarray(gray.astype(np.uint16) * 257))
    yield name, Odd(np.repeat(gray[..., None], 3, 2), tolerance=1.0)

    name = f"colors-{number}.png"
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        file.write(deep_rgb(pixels))
    yield name, Odd(pixels, tolerance=1.0)

    name = f"gray-{number}.png"
    _save(folder, name, Image.fromarray(gray))
    yield name, Odd(np.repeat(gray[..., None], 3, 2))

    name = f"two-{number}.png"
    _save(folder, name, Image.fromarray(gray > 128))
    yield name, Odd(np.repeat(((gray > 128) * 255).astype(np.uint8)[..., None], 3, 2))

    name = f"palette-{number}.png"
    indexed = image.quantize(8)
    clear = int(np.asarray(indexed)[0, 0])
    _save(folder, name, indexed, transparency=clear)
    expected = np.asarray(indexed.convert("RGB")).copy()
    expected[np.asarray(indexed) == clear] = 255
    yield name, Odd(expected)

    name = f"clear-{number}.png"
    alpha = np.full((*pixels.shape[:2], 1), 255, np.uint8)
    alpha[:16] = 0
    _save(folder, name, Image.fromarray(np.concatenate([pixels, alpha], 2)))
    expected = pixels.copy()
    expected[:16] = 255
    yield name, Odd(expected)


def _names(folder, outside, number):
    pixels = quarters(number)
    for name in (
        f"with spaces {number} (1).png",
        f"stra\u00dfe-{number}.png",
        f"\u732b-{number}/\u5199\u771f {number}.png",
        f"dots.in.{number}.name.png",
        f"UPPER-{number}.PNG",
        f"emoji-\U0001f431-{number}.png",
        f"quote's & more; {number}.png",
    ):
        _save(folder, name, Image.fromarray(pixels))
        yield name, Odd(pixels)


def _damaged(folder, outside, number):
    noise = np.random.RandomState(number).randint(0, 255, (*SIZE[::-1], 3)).astype(np.uint8)
    for suffix in ("png", "jpg", "webp"):
        name = f"cut-off-{number}.{suffix}"
        path = _save(folder, name, Image.fromarray(noise))
        with open(path, "rb+") as file:
            file.truncate(os.path.getsize(path) // 2)
        yield name, Odd(None, "cannot be read")
    for name, content, reason in (
        (f"nothing-{number}.png", b"", "it is empty"),
        (f"a text-{number}.png", b"dear diary, this is no picture", "picture format is unknown"),
        (f"page-{number}.jpg", b"<!doctype html><html>404</html>", "picture format is unknown"),
        (f"phone-{number}.heic", b"\x00\x00\x00\x18ftypheic", "Pillow does not read HEIC by itself"),
        (f"half a head-{number}.png", b"\x89PNG\r\n\x1a\n\x00\x00", "cannot be read"),
    ):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
        yield name, Odd(None, reason)


def _sizes(folder, outside, number):
    name = f"dot-{number}.png"
    _save(folder, name, Image.new("RGB", (1, 1), "red"))
    yield name, Odd(None, "too small (1x1)")
    name = f"thread-{number}.png"
    _save(folder, name, Image.new("RGB", (20000, 10), "red"))
    yield name, Odd(None, "too small (20000x10)")
    name = f"bomb-{number}.png"
    with open(os.path.join(folder, name), "wb") as file:
        file.write(bomb())
    yield name, Odd(None, "pixels")


def _links(folder, outside, number):
    target = os.path.join(outside, f"secret-{number}.png")
    Image.fromarray(quarters(number)).save(target)
    name = f"way out-{number}.png"
    os.symlink(target, os.path.join(folder, name))
    yield name, Odd(None, "a link that leads out")
    name = f"nowhere-{number}.png"
    os.symlink(os.path.join(folder, "is not there.png"), os.path.join(folder, name))
    yield name, Odd(None, "cannot be read")
    pixels = quarters(number)
    own = _save(folder, f"own-{number}.png", Image.fromarray(pixels))
    yield f"own-{number}.png", Odd(pixels)
    name = f"way in-{number}.png"
    os.symlink(own, os.path.join(folder, name))
    yield name, Odd(pixels)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, depth, color, rows):
    head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def bomb():
    """Return a PNG of a few kilobytes that claims 2.5 billion pixels."""
    return _png(50_000, 50_000, 8, 2, zlib.compress(b"\x00" * 1_000_000))


def deep_rgb(pixels):
    """Return a PNG with 16 bits per color, which Pillow does not write."""
    wide = pixels.astype(">u2") * 257
    rows = b"".join(b"\x00" + row.tobytes() for row in wide)
    return _png(pixels.shape[1], pixels.shape[0], 16, 2, zlib.compress(rows))
