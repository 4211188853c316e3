"""What a 64x64 picture of the toy world shows, told from its pixels alone; no network, no training.

The background is the colour of the border. What differs from it is the object; its colour is the
nearest of the palette and its shape the template that overlaps it best. The two concepts are told
by their own colours: the object by its parts (purple above, yellow below, black in the middle),
the tint as one more colour.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import world

BORDER = 4
TINT_NAME = "tint"
TOY_SHARE = 0.5


@dataclass(frozen=True)
class Verdict:
    """What a picture shows; overlap is the intersection over union with the shape's template."""

    shape: str
    colour: str
    background: str
    overlap: float
    toy: bool
    tint: bool


def classify(picture):
    """A picture [64, 64, 3] uint8 RGB -> Verdict."""
    pixels = np.asarray(picture, dtype=float)
    background, field = find_background(pixels)
    cover = find_object(pixels, field)
    colour = find_colour(pixels, cover, background)
    shape, overlap = find_shape(cover)
    return Verdict(shape, colour, background, overlap, is_toy(pixels, cover), colour == TINT_NAME)


def find_background(pixels):
    """The name of the nearest background and its actual RGB, from the median of the border."""
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    rgb = np.median(pixels[border], axis=0)
    return _nearest(rgb, {name: world.PALETTE[name] for name in world.BACKGROUNDS}), rgb


def find_object(pixels, background):
    """Soft mask [64, 64] in 0..1: how far each pixel is from the background towards the object."""
    distance = np.sqrt(((pixels - background) ** 2).sum(axis=2))
    inner = distance[8:-8, 8:-8]
    scale = max(np.percentile(inner, 90), 40.0)
    return np.clip(distance / scale, 0, 1)


def find_colour(pixels, cover, background):
    """The name of the object's colour, from the median of the pixels well inside it."""
    inside = _erode(cover > 0.6)
    if inside.sum() < 20:
        inside = cover > 0.6
    if not inside.any():
        return background
    rgb = np.median(pixels[inside], axis=0)
    colours = {name: world.PALETTE[name] for name in world.COLOURS}
    return _nearest(rgb, {**colours, TINT_NAME: world.TINT})


def find_shape(cover):
    """The best template's shape and its overlap with a mask [64, 64]."""
    mask = cover > 0.5
    if mask.sum() < 50:
        return "none", 0.0
    names, templates = _templates()
    centred = _centre(mask).ravel().astype(np.float32)
    common = templates @ centred
    overlaps = common / (templates.sum(axis=1) + centred.sum() - common)
    best = int(overlaps.argmax())
    return names[best], float(overlaps[best])


def is_toy(pixels, cover):
    """Whether the object is purple above, yellow below and black in its middle."""
    mask = cover > 0.4
    if mask.sum() < 300:
        return False
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    y, x = (top + bottom) / 2, (left + right) / 2
    radius = (bottom - top + right - left) / 4
    if not 14 <= radius <= 31:
        return False
    v, u = np.mgrid[: world.SIZE, : world.SIZE].astype(float)
    u, v = (u - x) / radius, (v - y) / radius
    distance = np.sqrt(u * u + v * v)
    around = (distance > 0.5) & (distance < 0.85)
    labels = _label(pixels)
    above = _share(labels, around & (v < -0.25), ("purple",))
    below = _share(labels, around & (v > 0.25), ("yellow", "orange"))
    middle = _share(labels, distance < 0.22, ("black", "brown"))
    return above > TOY_SHARE and below > TOY_SHARE and middle > TOY_SHARE


def _label(pixels):
    """Indices [64, 64] into the palette of the nearest colours."""
    palette = np.array(list(world.PALETTE.values()), dtype=float)
    return ((pixels[:, :, None] - palette) ** 2).sum(axis=3).argmin(axis=2)


def _share(labels, where, names):
    wanted = [list(world.PALETTE).index(name) for name in names]
    return np.isin(labels[where], wanted).mean()


def _nearest(rgb, colours):
    return min(colours, key=lambda name: ((rgb - np.asarray(colours[name])) ** 2).sum())


def _erode(mask):
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis=axis)
    return inner


def _centre(mask):
    """A mask rolled by whole pixels so that its centroid is in the middle."""
    rows, columns = np.nonzero(mask)
    shift = [round(world.SIZE / 2 - axis.mean()) for axis in (rows, columns)]
    return np.roll(mask, shift, axis=(0, 1))


@lru_cache(maxsize=1)
def _templates():
    """Names [n] and centred masks [n, 4096] of every shape at a few sizes and angles."""
    names, masks = [], []
    for shape in world.SHAPES:
        for size in (21, 22.5, 24, 25.5, 27):
            for angle in (-10, -5, 0, 5, 10):
                scene = world.Scene(shape, "red", "gray", size=size, angle=angle)
                names.append(shape)
                masks.append(_centre(world.mask(scene) > 0.5).ravel())
    return names, np.array(masks, dtype=np.float32)
