"""Holes: the part of a picture that an inpainting model is to fill, and what is left of the picture around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..data.examples import LeftOut
from ..data.pictures import as_weight
from ..data.scan import reason_of
from ..errors import DatasetError, RunError
from .cache import Cache, key_of
from .encode import earlier_base
from .pixels import cut, to_array

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..data.buckets import Crop
    from ..data.examples import Example
    from ..protocols import ImageCodec

# Of a picture without a mask; each has to be encoded.
HOLES = 4
_GREY = 0.5


class InpaintMaskCache:
    """The holes of each example's cut, and the latents of the cut with the hole grey.

    As the host's own node prepares them (nodes.py, InpaintModelConditioning): grey within, by halves rounded masks.
    """

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()
        self._earlier = earlier_base(cache, codec)

    def key(self, example: Example, crop: Crop, number: int) -> str:
        """What decides a hole and the latent: content, cut, codec, and the mask or the number of the hole drawn."""
        return _hole_key(self._base, example, crop, number)

    @staticmethod
    def count(example: Example) -> int:
        """How many holes an example has: its mask, or those drawn."""
        return HOLES if example.mask is None else 1

    def fill(self, rows: Iterable[tuple[Example, list[Crop]]], tick: Callable[[str], None]) -> list[LeftOut | None]:
        """Makes what is missing; for each example None, or why it cannot be trained on.

        Args:
            rows: each example with its cuts.
            tick: called with an example's name before it is encoded; may raise to interrupt, what was made is kept.
        """
        rows = list(rows)
        places = [(row, crop, number) for row in rows for crop in row[1] for number in range(self.count(row[0]))]
        if self._earlier:
            for row, crop, number in places:
                earlier = _hole_key(self._earlier, row[0], crop, number)
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
                hole = random_hole(crop.bucket, f"{example.digest} {crop} {number}", number)
            else:
                hole = cut(mask, crop)
            within = torch.from_numpy(to_array(hole)[..., 0]).round()[None, None]
            pixels = torch.from_numpy(to_array(cut(picture, crop)))[None]
            around = (pixels - _GREY) * (1 - within[0, ..., None]) + _GREY
            mean, _ = self._codec.encode(around)
            if not torch.isfinite(mean).all():
                raise DatasetError("the VAE gives no finite latent for it", "Use a VAE that runs in float32.", "vae")
            tensors = {"hole": within.to(torch.uint8), "around": mean.float().cpu()}
            self._cache.put(self.key(example, crop, number), tensors)

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """`hole` [1, 1, H, W] uint8 over pixels, 1 where it is to be filled, and `around`, a latent [1, C, ...]."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached hole {key} is gone.", "Queue again; it will be made anew.")
        return tensors


def random_hole(size: tuple[int, int], seed: str, number: int) -> Image.Image:
    """A mask as inpainting models are trained on: strokes, boxes, both, or the whole picture (Suvorov et al. 2022).

    Args:
        size: (width, height), pixels.
        number: which of the four kinds, over and over.

    Returns:
        One channel, white where the picture is to be filled.
    """
    from PIL import Image, ImageDraw

    kind = number % HOLES
    if kind == HOLES - 1:
        return Image.new("L", size, 255)
    source = random.Random(seed)
    hole = Image.new("L", size, 0)
    draw = ImageDraw.Draw(hole)
    if kind != 1:
        for _ in range(source.randint(1, 3)):
            _draw_stroke(draw, size, source)
    if kind != 0:
        for _ in range(source.randint(1, 3)):
            _draw_box(draw, size, source)
    return hole


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


def _hole_key(base: str, example: Example, crop: Crop, number: int) -> str:
    hole = number if example.mask is None else example.mask.digest
    return key_of("hole 1", base, example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip, hole)
