"""Samples of a dataset, read from its caches and varied at every visit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data import captions
from ..data.prior import class_prompts
from ..protocols import Conditioning
from ..rng import generator, stream_seed
from .items import DatasetItem, Sample
from .prefetch import LRUCache
from .preview_sources import PreviewInput

if TYPE_CHECKING:
    import torch

    from ..data.buckets import Crop
    from ..data.examples import EncodedPrompt, Example
    from ..protocols import Denoiser
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample
    from .dataset_caches import DatasetCaches
    from .preview_sources import PreviewSources
    from .source_prompts import Prompt, Sources


class SampleReader:
    """Reader of a dataset's samples. All variation depends on seed, place and visit number alone.

    A visit number is the number of earlier visits in the run. Validation has none: it gets the plain caption, no
    mirroring, the mean of the latent, and the first inpaint mask.

    Args:
        picture_count: number of pictures in the whole dataset, see `captions.variant_count`.
    """

    def __init__(self, caches: DatasetCaches, recipe: Recipe, denoiser: Denoiser, picture_count: int):
        self._caches = caches
        self._recipe = recipe
        self._denoiser = denoiser
        self._picture_count = picture_count
        self._memory = LRUCache()
        # The loop prefetches in a thread, and the caches serve only one thread at a time.
        self._lock = threading.Lock()

    def items(self, examples: list[CroppedExample]) -> list[DatasetItem]:
        """Return every crop of every example as a dataset item."""
        return [self._item(cropped, crop) for cropped in examples for crop in cropped.crops]

    def preview_input(self, preview: PreviewSources) -> Callable[[], PreviewInput]:
        """Return a function that reads what is encoded for a sample picture."""

        def read() -> PreviewInput:
            with self._lock:
                encoded = None if self._caches.references is None else tuple(map(self._text, preview.texts))
                return PreviewInput(self._source_latents(preview.sources, preview.size), encoded)

        return read

    def _item(self, cropped: CroppedExample, crop: Crop) -> DatasetItem:
        def show(visit: int | None) -> Sample:
            with self._lock:
                return self._sample(cropped, crop, visit)

        example = cropped.example
        return DatasetItem(
            name=example.source.name,
            bucket=crop.bucket,
            repeats=example.repeats,
            show=show,
            prior=example.prior,
            has_prior_target=example.anchor is not None,
            frames=crop.frames,
        )

    def _sample(self, cropped: CroppedExample, crop: Crop, visit: int | None) -> Sample:
        example = cropped.example
        caption, drawn, source = self._draw(cropped, crop, visit)
        key = self._caches.latents.key(example, drawn)
        latent = self._denoiser.scale_latents(self._latent(key, source))
        images = self._image_conditioning(cropped, crop, drawn, visit)
        if self._keeps_first_frame(cropped.stream(crop), visit) and latent.ndim == 5 and latent.shape[2] > 1:
            # The mean: ComfyUI's own nodes encode the picture so.
            images = {**images, "first_frame": self._denoiser.scale_latents(self._latent(key, None))[:, :, :1]}
        conditioning = self._conditioning(caption, cropped, drawn, images)
        weight = self._weight(example, drawn, latent)
        prior_target = None
        if visit is not None and example.anchor is not None:
            prompts = class_prompts(example.anchor, caption)
            prompt = prompts[stream_seed("class", self._recipe.seed, cropped.stream(crop), visit) % len(prompts)]
            target_conditioning = self._conditioning(prompt, cropped, drawn, images)
            prior_target = Sample(latent, target_conditioning, weight, self._live(prompt), example.anchor.weight)
        paired = self._paired_latent(cropped, crop, drawn, visit)
        return Sample(latent, conditioning, weight, self._live(caption), example.weight, prior_target, paired)

    def _keeps_first_frame(self, stream: str, visit: int | None) -> bool:
        """Draw whether a clip's first frame gets no noise. In validation, each clip always draws the same."""
        drawn = stream_seed("first frame", self._recipe.seed, stream, visit) / 2**63
        return drawn < self._recipe.first_frame_probability

    def _paired_latent(
        self, cropped: CroppedExample, crop: Crop, drawn: Crop, visit: int | None
    ) -> torch.Tensor | None:
        if cropped.example.paired is None:
            return None
        source = None if visit is None else generator("worse", self._recipe.seed, cropped.stream(crop), visit)
        key = self._caches.latents.key(cropped.example.paired, drawn)
        return self._denoiser.scale_latents(self._latent(key, source))

    def _draw(
        self, cropped: CroppedExample, crop: Crop, visit: int | None
    ) -> tuple[str | EncodedPrompt, Crop, torch.Generator | None]:
        example, seed, stream = cropped.example, self._recipe.seed, cropped.stream(crop)
        if visit is None:
            return cropped.unvaried_prompt(), crop, None
        prompt = example.encoded
        if prompt is None:
            count = captions.variant_count(example, self._picture_count)
            number = cropped.caption_number(crop, count, seed, visit)
            prompt = "" if number is None else captions.make_variant(example, number)
        return prompt, cropped.crop_of_visit(crop, seed, visit), generator("posterior", seed, stream, visit)

    def _latent(self, key: str, source: torch.Generator | None) -> torch.Tensor:
        import torch

        posterior = self._memory.get(f"latent {key}", lambda: self._caches.latents.get(key))
        mean = posterior["mean"]
        if source is None or "logvar" not in posterior:
            return mean
        noise = torch.randn(mean.shape, generator=source)
        return mean + torch.exp(0.5 * posterior["logvar"]) * noise

    def _conditioning(
        self, prompt: str | EncodedPrompt, cropped: CroppedExample, crop: Crop, images: dict[str, torch.Tensor]
    ) -> Conditioning:
        tensors = self._text(self._caches.with_sources(prompt, cropped, crop))
        return replace(Conditioning(tensors, cropped.example.size, crop.offset, crop.bucket), **images)

    def _text(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        texts = self._caches.texts
        return {} if texts is None else self._memory.get(f"text {texts.key(prompt)}", lambda: texts.get(prompt))

    def _image_conditioning(
        self, cropped: CroppedExample, crop: Crop, drawn: Crop, visit: int | None
    ) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """Return the source images' latents or the inpaint mask of a visit, by `Conditioning`'s names.

        Latents are means of the posterior, as ComfyUI's own nodes give them.
        """
        example, masks = cropped.example, self._caches.inpaint_masks
        if example.sources:
            return {"sources": self._source_latents(self._caches.sources_of(cropped, drawn), drawn.bucket)}
        if masks is None:
            return {}
        seed = stream_seed("hole", self._recipe.seed, cropped.stream(crop), visit) if visit is not None else 0
        key = masks.key(example, drawn, seed % masks.count(example))
        return self._memory.get(f"hole {key}", lambda: masks.get(key))

    def _source_latents(self, sources: Sources, size: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        references = self._caches.references
        if references is None or not sources:
            return tuple(self._latent(self._caches.latents.key(*source), None) for source in sources)
        latents = self._memory.get(f"references {references.key(sources, size)}", lambda: references.get(sources, size))
        return tuple(latents[str(place)] for place in range(len(latents)))

    def _weight(self, example: Example, crop: Crop, latent: torch.Tensor) -> torch.Tensor | None:
        """Return the loss weights [1, 1, ...] of a latent's positions; None without a mask."""
        if example.mask is None:
            return None
        shape = tuple(latent.shape[-2:])
        key = self._caches.masks.key(example, crop, shape)
        stored = self._memory.get(f"mask {key}", lambda: {"": self._caches.masks.get(key)})
        weight = stored[""].clamp_min(example.handling.mask_minimum)
        return weight.view(1, 1, *[1] * (latent.ndim - 4), *shape)

    def _live(self, caption: str) -> str | None:
        return caption if self._caches.texts is None else None
