"""Cached masks: their loss weights; inpaint masks and latents of the masked pictures for inpainting models."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..data.examples import LeftOut, reason_of
from ..data.pixel_formats import as_weight
from ..errors import DatasetError, RunError
from .cache import Cache, key_of
from .encode import Unreadable, earlier_base, opened
from .pixels import cut, to_array

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..data.buckets import Crop
    from ..data.examples import Example
    from ..protocols import ImageCodec


class MaskCache:
    """Loss weights of each mask's crop, [1, 1, h, w] float32 in 0..1, one for each position of a latent."""

    def __init__(self, cache: Cache):
        self._cache = cache

    def key(self, example: Example, crop: Crop, shape: tuple[int, int]) -> str:
        """Return the key of a mask's weights: content, crop, (h, w) of the latent."""
        return key_of("mask 1", example.mask.digest, crop.scaled, crop.offset, crop.bucket, crop.flip, shape)

    def fill(self, rows: Iterable[tuple[Example, Crop, tuple[int, int]]]) -> list[LeftOut | None]:
        """Compute missing weights; return for each row None, or the reason for not training on the example."""
        rows = list(rows)
        missing = self._cache.missing(self.key(*row) for row in rows)
        outcome = []
        try:
            for example, crop, shape in rows:
                key = self.key(example, crop, shape)
                try:
                    if key in missing:
                        self._cache.put(key, {"weight": _mask_weights(example, crop, shape)})
                    outcome.append(None)
                except Unreadable as error:
                    outcome.append(LeftOut(example.source.name, f"its mask {error.row.name}: {error.row.reason}"))
        finally:
            self._cache.flush()
        return outcome

    def get(self, key: str) -> torch.Tensor:
        """Return the weights of a key that was filled."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached mask {key} is missing.", "Queue the graph again to compute it.")
        return tensors["weight"]


def _mask_weights(example: Example, crop: Crop, shape: tuple[int, int]) -> torch.Tensor:
    import numpy as np
    import torch

    picture = cut(as_weight(opened(example.mask)), crop)
    weights = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None, None]
    return torch.nn.functional.interpolate(weights, size=shape, mode="area")


# Number of drawn masks for a picture without a mask; each needs a latent of its own.
DRAWN_MASKS = 4
_GRAY = 0.5

# Names on disk of what `Conditioning` takes.
_STORED_NAMES = {"inpaint_mask": "hole", "masked_image_latent": "around"}


class InpaintMaskCache:
    """Inpaint masks of each example's crop, and the latents of the crop with the masked part gray.

    ComfyUI's own node prepares them in the same way (nodes.py, InpaintModelConditioning): masks rounded to 0 or 1,
    gray inside.
    """

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()
        self._earlier = earlier_base(cache, codec)

    def key(self, example: Example, crop: Crop, number: int) -> str:
        """Return the key of a mask and its latent: content, crop, codec, and the mask or the number of a drawn one."""
        return _mask_key(self._base, example, crop, number)

    @staticmethod
    def count(example: Example) -> int:
        """Return the number of inpaint masks of an example: one if it has a mask, else the number of drawn masks."""
        return DRAWN_MASKS if example.mask is None else 1

    def fill(self, rows: Iterable[tuple[Example, list[Crop]]], tick: Callable[[str], None]) -> list[LeftOut | None]:
        """Encode missing latents; return for each example None, or the reason for not training on it.

        Args:
            rows: each example with its crops.
            tick: called with an example's name before it is encoded; may raise to interrupt. The cache keeps
                finished entries.
        """
        rows = list(rows)
        places = [(row, crop, number) for row in rows for crop in row[1] for number in range(self.count(row[0]))]
        if self._earlier:
            for row, crop, number in places:
                earlier = _mask_key(self._earlier, row[0], crop, number)
                self._cache.find_as(self.key(row[0], crop, number), earlier)
        missing = self._cache.missing(self.key(row[0], crop, number) for row, crop, number in places)
        outcome: list[LeftOut | None] = []
        try:
            for example, crops in rows:
                wanted = [
                    (crop, number)
                    for crop in crops
                    for number in range(self.count(example))
                    if self.key(example, crop, number) in missing
                ]
                try:
                    if wanted:
                        tick(example.source.name)
                        self._encode(example, wanted)
                    outcome.append(None)
                except DatasetError as error:
                    outcome.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
        finally:
            self._cache.flush()
        return outcome

    def _encode(self, example: Example, wanted: list[tuple[Crop, int]]) -> None:
        import torch

        picture = example.source.open()
        mask = None if example.mask is None else as_weight(example.mask.open())
        for crop, number in wanted:
            if mask is None:
                inpaint_mask = random_inpaint_mask(crop.bucket, f"{example.digest} {crop} {number}", number)
            else:
                inpaint_mask = cut(mask, crop)
            within = torch.from_numpy(to_array(inpaint_mask)[..., 0]).round()[None, None]
            pixels = torch.from_numpy(to_array(cut(picture, crop)))[None]
            around = (pixels - _GRAY) * (1 - within[0, ..., None]) + _GRAY
            mean, _ = self._codec.encode(around)
            if not torch.isfinite(mean).all():
                raise DatasetError("the VAE gives no finite latent for it", "Use a VAE that runs in float32.", "vae")
            tensors = {
                _STORED_NAMES["inpaint_mask"]: within.to(torch.uint8),
                _STORED_NAMES["masked_image_latent"]: mean.float().cpu(),
            }
            self._cache.put(self.key(example, crop, number), tensors)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """Return `inpaint_mask` [1, 1, H, W], uint8 over pixels, 1 where to fill, and
        `masked_image_latent` [1, C, ...]."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached inpaint mask {key} is missing.", "Queue the graph again to compute it.")
        return {name: tensors[stored] for name, stored in _STORED_NAMES.items()}


def random_inpaint_mask(size: tuple[int, int], seed: str, number: int) -> Image.Image:
    """Draw a mask as inpainting models are trained on: strokes, boxes, both, or the whole picture.

    Source: Suvorov et al. 2022.

    Args:
        size: (width, height), pixels.
        number: selects one of the four kinds, in rotation.

    Returns:
        One channel, white where to fill the picture.
    """
    from PIL import Image, ImageDraw

    kind = number % DRAWN_MASKS
    if kind == DRAWN_MASKS - 1:
        return Image.new("L", size, 255)
    source = random.Random(seed)
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    if kind != 1:
        for _ in range(source.randint(1, 3)):
            _draw_stroke(draw, size, source)
    if kind != 0:
        for _ in range(source.randint(1, 3)):
            _draw_box(draw, size, source)
    return mask


def _draw_box(draw, size: tuple[int, int], source: random.Random) -> None:
    sides = [max(1, round(side * source.uniform(0.2, 0.6))) for side in size]
    left, top = (round(source.uniform(0, size[axis] - sides[axis])) for axis in (0, 1))
    draw.rectangle((left, top, left + sides[0] - 1, top + sides[1] - 1), fill=255)


def _draw_stroke(draw, size: tuple[int, int], source: random.Random) -> None:
    width = max(1, round(min(size) * source.uniform(0.08, 0.2)))
    points = [(source.uniform(0, size[0]), source.uniform(0, size[1])) for _ in range(source.randint(3, 6))]
    draw.line(points, fill=255, width=width, joint="curve")
    for x, y in points:
        half = width / 2
        draw.ellipse((x - half, y - half, x + half, y + half), fill=255)


def _mask_key(base: str, example: Example, crop: Crop, number: int) -> str:
    mask = number if example.mask is None else example.mask.digest
    return key_of("hole 1", base, example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip, mask)
