"""Encoding of pictures and captions into the caches of a dataset, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..data import captions
from ..data.examples import LeftOut
from .sampler import visits_within

if TYPE_CHECKING:
    from ..data.buckets import Crop
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample
    from .dataset_caches import DatasetCaches


class CacheFiller:
    """Encodes all that a training needs into the dataset's caches, and reports each entry to the host."""

    def __init__(self, caches: DatasetCaches, recipe: Recipe, host: Host):
        self._caches = caches
        self._recipe = recipe
        self._host = host
        self._done = 0
        self._some_caption = ""

    def fill_pictures(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        """Encode the pictures, and what belongs to them. Return the usable ones; add the others to `left_out`."""
        # The captions are not counted yet.
        tick = self._reporting(2 * len(examples))
        problems = self._caches.latents.fill([(cropped.example, cropped.all_crops()) for cropped in examples], tick)
        examples = _without_problems(examples, problems, left_out)
        for fill in (self._fill_masks, self._fill_sources, self._fill_inpaint_masks):
            examples = fill(examples, left_out)
        return examples

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
        paired = [cropped for cropped in examples if cropped.example.control is not None]
        rows = [
            (cropped.example.control, [self._caches.source_crop(cropped, crop) for crop in cropped.all_crops()])
            for cropped in paired
        ]
        problems = self._caches.latents.fill(rows, self._reporting(len(paired) + len(examples)))
        usable = {cropped.place for cropped in _without_problems(paired, problems, left_out)}
        return [cropped for cropped in examples if cropped.example.control is None or cropped.place in usable]

    def _fill_inpaint_masks(self, examples: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        if self._caches.inpaint_masks is None:
            return examples
        rows = [(cropped.example, cropped.all_crops()) for cropped in examples]
        problems = self._caches.inpaint_masks.fill(rows, self._reporting(2 * len(examples)))
        return _without_problems(examples, problems, left_out)

    def fill_captions(
        self, training: list[CroppedExample], validation: list[CroppedExample], picture_count: int
    ) -> None:
        """Encode the captions that the run will use, those of validation, and the prompts of prior targets.

        Args:
            picture_count: number of pictures in the whole dataset, see `captions.variant_count`.
        """
        if self._caches.texts is None:
            return
        texts = dict.fromkeys(captions.plain(cropped.example) for cropped in validation)
        anchors = [cropped.example.anchor for cropped in training if cropped.example.anchor is not None]
        texts.update(dict.fromkeys(anchor.prompt for anchor in anchors))
        crops = [(cropped, crop) for cropped in training for crop in cropped.crops]
        for (cropped, crop), visits in zip(crops, self._visits(crops), strict=True):
            texts.update(dict.fromkeys(self._captions_of(cropped, crop, visits, picture_count)))
        self._some_caption = next(iter(texts))
        self._caches.texts.fill(texts, self._reporting(len(texts)))

    def _visits(self, crops: list[tuple[CroppedExample, Crop]]) -> list[int]:
        """Return an upper bound of the number of visits of each crop in the run."""
        return visits_within(
            self._recipe.steps * self._recipe.accumulation,
            [crop.bucket for _, crop in crops],
            [cropped.example.repeats for cropped, _ in crops],
            self._recipe.batch_size,
            [cropped.example.prior for cropped, _ in crops],
        )

    def _captions_of(self, cropped: CroppedExample, crop: Crop, visits: int, picture_count: int) -> list[str]:
        """List the captions that so many visits of a crop need; the empty one stands for a dropped caption."""
        example = cropped.example
        count = captions.variant_count(example, picture_count)
        dropped = [""] if example.handling.caption_dropout else []
        if visits >= count or (count == 1 and not dropped):
            numbers = range(count)
        else:
            drawn = {cropped.caption_number(crop, count, self._recipe.seed, visit) for visit in range(visits)}
            numbers = sorted(drawn - {None})
        return dropped + [captions.variant(example, number) for number in numbers]

    def check_inputs(self, cropped: CroppedExample) -> None:
        """Let the denoiser refuse a codec or an encoder that does not belong to it."""
        latents, texts = self._caches.latents, self._caches.texts
        latent = latents.get(latents.key(cropped.example, cropped.crops[0]))["mean"]
        text = self._host.text.encode("") if texts is None else texts.get(self._some_caption)
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
    """Return the examples without a problem; add the problems of the others to `left_out`."""
    left_out.extend(problem for problem in problems if problem is not None)
    return [cropped for cropped, problem in zip(examples, problems, strict=True) if problem is None]
