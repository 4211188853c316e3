"""The caches on disk for the training of one dataset: latents, conditionings, loss masks and inpaint masks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..data.buckets import Crop
from ..formats.atomic import refuse_links
from ..protocols import HOLE
from ..recipe.options import TEXT_ALONE
from .cache import Cache
from .crops import source_crop
from .encode import LatentCache, TextCache
from .inpaint_masks import InpaintMaskCache, MaskCache
from .source_prompts import Prompt, ReferenceCache, SourcePrompt, Sources, SourceTextCache

if TYPE_CHECKING:
    from ..data.examples import EncodedPrompt, Example
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample

_NAMES = ("latents", "text", "masks", "holes")


class DatasetCaches:
    """The caches on disk for the training of one dataset.

    Attributes:
        texts: conditionings of prompts, see `with_sources`; None if the text encoder runs at every step.
        references: latents of source pictures by the recipe's `prompt_node`; None if that is ComfyUI's plain one.
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
        self.references = None
        if recipe.prompt_node != TEXT_ALONE:
            self.texts = SourceTextCache(self._caches["text"], recipe.prompt_node, host.text)
            self.references = ReferenceCache(self._caches["latents"], recipe.prompt_node, host.codec)
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

    def sources_of(self, cropped: CroppedExample, crop: Crop) -> Sources:
        """Return an example's source pictures with the crops that belong to a crop of the example."""
        size = cropped.example.size
        return tuple((source, source_crop(source, size, crop, self._bucket_step)) for source in cropped.example.sources)

    def named_source(self, source: Example, size: tuple[int, int]) -> tuple[Example, Crop]:
        """Return a source picture that a prompt names, with its crop for a sample picture of a size."""
        return source, source_crop(source, size, Crop(size, (0, 0), size), self._bucket_step)

    def with_sources(self, prompt: str | EncodedPrompt, cropped: CroppedExample, crop: Crop) -> Prompt:
        """Return a prompt as `texts` takes it: a text together with the source pictures that the text encoder sees."""
        if self.references is None or not isinstance(prompt, str):
            return prompt
        return SourcePrompt(prompt, self.sources_of(cropped, crop))
