"""Classify a 64x64 picture of the toy world by its pixels alone, with no network and no training.

The background is the color of the border. Pixels that differ from it are the object. The object's color is the nearest
of the palette, and its shape is the template that overlaps it best. Of the two concepts, the classifier recognizes the
object by its outline and its parts (yellow petals, purple middle), and the tint as one more color.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import world

BORDER = 4
TINT_NAME = "tint"
TOY_SHARE = 0.6
TOY_OVERLAP = 0.7
# Distance of green below red and blue, of 255; the world's own purple has 80.
PURPLE_CAST = 20
TEMPLATE_SIZES = (21, 22.5, 24, 25.5, 27)
TEMPLATE_ANGLES = (-10, -5, 0, 5, 10)


@dataclass(frozen=True)
class Verdict:
    """The content of a picture; overlap is the intersection over union with the shape's template."""

    shape: str
    color: str
    background: str
    overlap: float
    toy: bool
    tint: bool


def classify(picture):
    """Classify a picture [64, 64, 3] uint8 RGB."""
    pixels = np.asarray(picture, dtype=float)
    background, field = find_background(pixels)
    cover = find_object(pixels, field)
    color = find_color(pixels, cover, background)
    shape, overlap = find_shape(cover)
    return Verdict(shape, color, background, overlap, is_toy(pixels, cover), color == TINT_NAME)


def find_background(pixels):
    """Return the name of the nearest background and its actual RGB, from the median of the border."""
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    rgb = np.median(pixels[border], axis=0)
    return _nearest(rgb, {name: world.PALETTE[name] for name in world.BACKGROUNDS}), rgb


def find_object(pixels, background):
    """Return a soft mask [64, 64] in 0..1: each pixel's distance from the background towards the object."""
    distance = np.sqrt(((pixels - background) ** 2).sum(axis=2))
    inner = distance[8:-8, 8:-8]
    scale = max(np.percentile(inner, 90), 40.0)
    return np.clip(distance / scale, 0, 1)


def find_color(pixels, cover, background):
    """Return the name of the object's color, from the median of the pixels well inside it."""
    inside = _erode(cover > 0.6)
    if inside.sum() < 20:
        inside = cover > 0.6
    if not inside.any():
        return background
    rgb = np.median(pixels[inside], axis=0)
    colors = {name: world.PALETTE[name] for name in world.COLORS}
    return _nearest(rgb, {**colors, TINT_NAME: world.TINT})


def find_shape(cover):
    """Return the best template's shape and its overlap with a mask [64, 64]; ("none", 0) for no object."""
    mask = cover > 0.5
    if mask.sum() < 50:
        return "none", 0.0
    overlaps = _overlap(mask, _shape_templates())
    best = overlaps.argmax()
    return world.SHAPES[best * len(world.SHAPES) // len(overlaps)], float(overlaps[best])


def is_toy(pixels, cover):
    """Report whether the object has the outline of a flower, yellow petals and a purple middle."""
    mask = cover > 0.5
    if mask.sum() < 300 or _overlap(mask, _toy_templates()).max() < TOY_OVERLAP:
        return False
    labels = _label(pixels)
    petals, distance = _petals(labels, mask)
    middle = _share(labels, distance < 0.35, ("purple",))
    return petals > TOY_SHARE and middle > TOY_SHARE


def has_toy_parts(picture):
    """Report whether the object in a picture [64, 64, 3] has the flower's yellow rim and purple middle.

    The outline may be any, and the purple of the middle may be pale: a half-learned subject leaves this in its class.
    """
    pixels = np.asarray(picture, dtype=float)
    mask = find_object(pixels, find_background(pixels)[1]) > 0.5
    if mask.sum() < 300:
        return False
    petals, distance = _petals(_label(pixels), mask)
    red, green, blue = np.median(pixels[distance < 0.35], axis=0)
    return bool(petals > TOY_SHARE and min(red, blue) - green > PURPLE_CAST)


def _petals(labels, mask):
    """Return the yellow fraction of an object's rim, and each pixel's distance from its middle in radii."""
    rows, columns = np.nonzero(mask)
    v, u = np.mgrid[: world.SIZE, : world.SIZE]
    distance = np.hypot(u - columns.mean(), v - rows.mean()) / np.sqrt(mask.sum() / np.pi)
    return _share(labels, mask & (distance > 0.7) & (distance < 1.0), ("yellow", "orange")), distance


def _label(pixels):
    """Return indices [64, 64] of the nearest colors in the palette."""
    palette = np.array(list(world.PALETTE.values()), dtype=float)
    return ((pixels[:, :, None] - palette) ** 2).sum(axis=3).argmin(axis=2)


def _share(labels, where, names):
    wanted = [list(world.PALETTE).index(name) for name in names]
    return np.isin(labels[where], wanted).mean()


def _nearest(rgb, colors):
    return min(colors, key=lambda name: ((rgb - np.asarray(colors[name])) ** 2).sum())


def _erode(mask):
    inner = mask.copy()
    for axis in (0, 1):
        for step in (-1, 1):
            inner &= np.roll(mask, step, axis=axis)
    return inner


def _center(mask):
    """Roll a mask by whole pixels so that its centroid is in the middle: [4096] float32."""
    shift = [round(world.SIZE / 2 - axis.mean()) for axis in np.nonzero(mask)]
    return np.roll(mask, shift, axis=(0, 1)).ravel().astype(np.float32)


def _overlap(mask, templates):
    """Return the intersection over union of a mask [64, 64] with each template [n, 4096], centroids aligned."""
    centered = _center(mask)
    common = templates @ centered
    return common / (templates.sum(axis=1) + centered.sum() - common)


def _templates(draw, shape):
    """Return centered masks of draw(scene) at a few sizes and angles: [25, 4096]."""
    scenes = [world.Scene(shape, "red", "gray", size=s, angle=a) for s in TEMPLATE_SIZES for a in TEMPLATE_ANGLES]
    return np.array([_center(draw(scene) > 0.5) for scene in scenes])


@lru_cache(maxsize=1)
def _shape_templates():
    """Return templates of all shapes, in the order of world.SHAPES: [8 * 25, 4096]."""
    return np.concatenate([_templates(world.mask, shape) for shape in world.SHAPES])


@lru_cache(maxsize=1)
def _toy_templates():
    return _templates(world.toy_mask, "circle")
