"""The caches on disk for the training of one dataset: latents, conditionings, loss masks and inpaint masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..formats.atomic import refuse_links
from ..protocols import HOLE
from .cache import Cache
from .crops import source_crop
from .encode import LatentCache, TextCache
from .inpaint_masks import InpaintMaskCache
from .mask_weights import MaskCache

if TYPE_CHECKING:
    from ..data.buckets import Crop
    from ..data.examples import Example
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample

# Names of the folders.
_NAMES = ("latents", "text", "masks", "holes")


class DatasetCaches:
    """The caches on disk for the training of one dataset.

    Attributes:
        latents: latents of pictures and source images.
        texts: conditionings of captions; None if the text encoder runs at every step.
        masks: loss weights of pictures with a mask.
        inpaint_masks: inpaint masks and masked latents; None if the denoiser takes none.
    """

    def __init__(self, folder: str, recipe: Recipe, host: Host):
        for name in _NAMES:
            # The parent of the cache folder may itself be a link: the pack's folder of outputs, or a job's folder.
            refuse_links(os.path.dirname(folder), os.path.join(folder, name))
        self._caches = {name: Cache(os.path.join(folder, name)) for name in ("latents", "text", "masks")}
        self._bucket_step = host.denoiser.geometry(recipe.resolution).step
        self.latents = LatentCache(self._caches["latents"], host.codec)
        # If the text encoder changes during training, its earlier conditionings are of no use.
        self.texts = None if recipe.live_text else TextCache(self._caches["text"], host.text)
        self.masks = MaskCache(self._caches["masks"])
        self.inpaint_masks = None
        if host.denoiser.conditioning_kind == HOLE:
            self._caches["holes"] = Cache(os.path.join(folder, "holes"))
            self.inpaint_masks = InpaintMaskCache(self._caches["holes"], host.codec)

    def copy_used(self, folder: str) -> None:
        """Copy the entries that this training needs into another folder."""
        for name, cache in self._caches.items():
            cache.copy_used(os.path.join(folder, name))

    def latent_shape(self, example: Example, crop: Crop) -> tuple[int, int]:
        """Return the height and width of a cached latent."""
        return tuple(self.latents.get(self.latents.key(example, crop))["mean"].shape[-2:])

    def source_crop(self, cropped: CroppedExample, crop: Crop) -> Crop:
        """Return the crop of an example's source image that belongs to a crop of the example."""
        return source_crop(cropped.example.control, cropped.example.size, crop, self._bucket_step)
