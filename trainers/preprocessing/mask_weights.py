"""Loss weights of masks, cached beside latents and conditionings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..data.examples import LeftOut
from ..data.pixel_formats import as_weight
from ..errors import RunError
from .cache import Cache, key_of
from .encode import Unreadable, opened
from .pixels import cut

if TYPE_CHECKING:
    import torch

    from ..data.buckets import Crop
    from ..data.examples import Example


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
    """Crop a mask like its picture, and give each latent position the mean of its pixels."""
    import numpy as np
    import torch

    picture = cut(as_weight(opened(example.mask)), crop)
    weights = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None, None]
    return torch.nn.functional.interpolate(weights, size=shape, mode="area")
