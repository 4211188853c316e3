"""The caches on disk for the training of one dataset, and their filling before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..data import captions
from ..data.buckets import Crop
from ..data.examples import LeftOut
from ..data.prior import class_prompts
from ..errors import SettingsError
from ..formats.atomic import refuse_links
from ..protocols import HOLE
from ..recipe.options import TEXT_ALONE
from .cache import Cache
from .crops import source_crop
from .encode import LatentCache, TextCache
from .inpaint_masks import InpaintMaskCache, MaskCache
from .sampler import visits_within
from .source_prompts import Prompt, ReferenceCache, SourcePrompt, Sources, SourceTextCache

if TYPE_CHECKING:
    from ..data.examples import EncodedPrompt, Example
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample
    from .preview_sources import PreviewSources

_NAMES = ("latents", "text", "masks", "holes")


class DatasetCaches:
    """Latents, conditionings, loss masks and inpaint masks of one dataset.

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


class CacheFiller:
    """Encodes all that a training needs into the dataset's caches, and reports each entry to the host."""

    def __init__(self, caches: DatasetCaches, recipe: Recipe, host: Host):
        self._caches = caches
        self._recipe = recipe
        self._host = host
        self._done = 0
        self._some_prompt: Prompt = ""

    def fill_pictures(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        """Encode the pictures, and what belongs to them. Return the usable ones; add the others to `left_out`."""
        # The captions are not counted yet.
        tick = self._reporting(2 * len(examples))
        problems = self._caches.latents.fill([(cropped.example, cropped.all_crops()) for cropped in examples], tick)
        examples = _without_problems(examples, problems, left_out)
        for fill in (self._fill_pairs, self._fill_masks, self._fill_sources, self._fill_inpaint_masks):
            examples = fill(examples, left_out)
        return examples

    def _fill_pairs(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        rows = [cropped for cropped in examples if cropped.example.paired is not None]
        pictures = [(cropped.example.paired, cropped.all_crops()) for cropped in rows]
        problems = self._caches.latents.fill(pictures, self._reporting(len(rows) + len(examples)))
        unusable = {cropped.place: row for cropped, row in zip(rows, problems, strict=True) if row is not None}
        left_out.extend(unusable.values())
        return [cropped for cropped in examples if cropped.place not in unusable]

    def _fill_masks(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        masks = self._caches.masks
        rows = [
            (cropped, (cropped.example, crop, self._caches.latent_shape(cropped.example, crop)))
            for cropped in examples
            if cropped.example.mask is not None
            for crop in cropped.all_crops()
        ]
        problems: dict[int, LeftOut] = {}
        for (cropped, row), problem in zip(rows, masks.fill([row for _, row in rows]), strict=True):
            example = cropped.example
            if problem is None and not example.handling.mask_minimum and not masks.get(masks.key(*row)).any():
                problem = LeftOut(example.source.name, "its mask excludes the whole crop")
            if problem is not None:
                problems.setdefault(cropped.place, problem)
        left_out.extend(problems.values())
        return [cropped for cropped in examples if cropped.place not in problems]

    def _fill_sources(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        rows = [
            (cropped, [(self._caches.sources_of(cropped, crop), crop.bucket) for crop in cropped.all_crops()])
            for cropped in examples
            if cropped.example.sources
        ]
        problems = self._source_latents([parts for _, parts in rows], len(examples))
        failed = {
            cropped.place: problem for (cropped, _), problem in zip(rows, problems, strict=True) if problem is not None
        }
        left_out.extend(failed.values())
        return [cropped for cropped in examples if cropped.place not in failed]

    def _source_latents(
        self, rows: list[list[tuple[Sources, tuple[int, int]]]], remaining: int
    ) -> list[LeftOut | None]:
        """Encode the source pictures of each row; return for each None, or the reason for not training on it.

        Args:
            rows: for each crop of an example, its source pictures and its size.
            remaining: number of entries of other kinds that are still to be encoded.
        """
        caches = self._caches
        if caches.references is not None:
            return caches.references.fill(rows, self._reporting(len(rows) + remaining))
        given, places = [], []
        for place, row in enumerate(rows):
            for column in zip(*(sources for sources, _ in row), strict=True):
                given.append((column[0][0], [crop for _, crop in column]))
                places.append(place)
        problems: list[LeftOut | None] = [None] * len(rows)
        reasons = caches.latents.fill(given, self._reporting(len(given) + remaining))
        for place, reason in zip(places, reasons, strict=True):
            problems[place] = problems[place] or reason
        return problems

    def _fill_inpaint_masks(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        if self._caches.inpaint_masks is None:
            return examples
        rows = [(cropped.example, cropped.all_crops()) for cropped in examples]
        problems = self._caches.inpaint_masks.fill(rows, self._reporting(2 * len(examples)))
        return _without_problems(examples, problems, left_out)

    def fill_captions(
        self, training: list[CroppedExample], validation: list[CroppedExample], picture_count: int
    ) -> None:
        """Encode the captions that the run will use, also unvaried, and the prompts of prior targets.

        Args:
            picture_count: number of pictures in the whole dataset, see `captions.variant_count`.
        """
        if self._caches.texts is None:
            return
        caches = self._caches
        prompts: dict[str, Prompt] = {}
        for text, cropped, crop in self._texts(training, validation, picture_count):
            prompt = caches.with_sources(text, cropped, crop)
            prompts.setdefault(caches.texts.key(prompt), prompt)
        self._some_prompt = next(iter(prompts.values()))
        caches.texts.fill(prompts.values(), self._reporting(len(prompts)))

    def fill_prompts(self, texts: Sequence[str]) -> None:
        """Encode prompts that belong to no picture."""
        if self._caches.texts is not None:
            self._caches.texts.fill(texts, self._reporting(len(texts)))

    def _texts(
        self, training: list[CroppedExample], validation: list[CroppedExample], picture_count: int
    ) -> Iterator[tuple[str | EncodedPrompt, CroppedExample, Crop]]:
        # EVA and the measurement of a quantized base take unvaried training pictures.
        for cropped in (*validation, *training):
            for crop in cropped.crops:
                yield cropped.unvaried_prompt(), cropped, crop
        for cropped in training:
            if cropped.example.anchor is not None:
                for crop in cropped.all_crops():
                    for prompt in class_prompts(cropped.example.anchor, ""):
                        yield prompt, cropped, crop
        crops = [(cropped, crop) for cropped in training for crop in cropped.crops]
        for (cropped, crop), visits in zip(crops, self._visits(crops), strict=True):
            anchor = cropped.example.anchor
            for text in self._captions_of(cropped, crop, visits, picture_count):
                for prompt in (text, *(class_prompts(anchor, text) if anchor and anchor.replaced else ())):
                    yield prompt, cropped, crop
                    if cropped.example.handling.flip:
                        yield prompt, cropped, crop.mirrored()

    def fill_previews(self, previews: list[PreviewSources | None]) -> None:
        """Encode the source pictures of the sample pictures, and the prompts that the text encoder sees with them.

        Raises:
            SettingsError: a source picture cannot be read.
        """
        wanted = [preview for preview in previews if preview is not None]
        rows = [[(preview.sources, preview.size)] for preview in wanted if preview.sources]
        for problem in self._source_latents(rows, 0):
            if problem is not None:
                raise SettingsError(
                    f"Cannot draw a sample picture from the source picture {problem}.",
                    "Save the picture again, or name another with --c.",
                    "prompts",
                )
        if self._caches.references is not None:
            prompts = [prompt for preview in wanted for prompt in preview.texts]
            self._caches.texts.fill(prompts, self._reporting(len(prompts)))

    def _visits(self, crops: list[tuple[CroppedExample, Crop]]) -> list[int]:
        return visits_within(
            self._recipe.steps * self._recipe.accumulation,
            [crop.shape for _, crop in crops],
            [cropped.example.repeats for cropped, _ in crops],
            self._recipe.batch_size,
            [cropped.example.prior for cropped, _ in crops],
        )

    def _captions_of(
        self, cropped: CroppedExample, crop: Crop, visits: int, picture_count: int
    ) -> list[str | EncodedPrompt]:
        """List the captions that so many visits of a crop need; the empty one stands for a dropped caption."""
        example = cropped.example
        if example.encoded is not None:
            return [example.encoded]
        count = captions.variant_count(example, picture_count)
        dropped = [""] if example.handling.caption_dropout else []
        if visits >= count or (count == 1 and not dropped):
            numbers = range(count)
        else:
            drawn = {cropped.caption_number(crop, count, self._recipe.seed, visit) for visit in range(visits)}
            numbers = sorted(drawn - {None})
        return dropped + [captions.make_variant(example, number) for number in numbers]

    def check_inputs(self, cropped: CroppedExample) -> None:
        """Let the denoiser refuse a codec or an encoder that does not belong to it."""
        latents, texts = self._caches.latents, self._caches.texts
        latent = latents.get(latents.key(cropped.example, cropped.crops[0]))["mean"]
        text = self._host.text.encode("") if texts is None else texts.get(self._some_prompt)
        self._host.denoiser.check_inputs(latent, text)

    def _reporting(self, remaining: int) -> Callable[[str], None]:
        """Return a callback that reports each encoded entry to the host; at most `remaining` more are expected."""
        total = self._done + remaining

        def tick(name: str) -> None:
            self._done += 1
            self._host.report("cache", {"name": name, "done": self._done, "total": total})

        return tick


def _without_problems(
    examples: list[CroppedExample], problems: list[LeftOut | None], left_out: list[LeftOut]
) -> list[CroppedExample]:
    left_out.extend(problem for problem in problems if problem is not None)
    return [cropped for cropped, problem in zip(examples, problems, strict=True) if problem is None]
