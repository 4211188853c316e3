"""Preparation of a dataset: crops, cached encodings, and dataset items that vary at every visit."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..data import captions
from ..data.examples import LeftOut
from ..data.prior import refuse_if_one_sided
from ..data.scan import shortened
from ..errors import DatasetError
from ..formats.atomic import refuse_links
from ..protocols import HOLE, SOURCE, Conditioning
from ..rng import stream_seed
from .cache import Cache, cache_size, prune
from .crops import CroppedExample, all_resolutions, cut_dataset, held_out, source_image_crop
from .dataset_warnings import list_warnings
from .encode import LatentCache, TextCache
from .inpaint_masks import InpaintMaskCache
from .lru_cache import LRUCache
from .mask_weights import MaskCache
from .sampler import visits_within

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from ..data.buckets import Crop
    from ..data.examples import Dataset, Example
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .items import DatasetItem, Sample

log = logging.getLogger(__name__)

_CACHES = ("latents", "text", "masks", "holes")


@dataclass(frozen=True)
class Prepared:
    """Dataset that is ready for the training loop.

    Attributes:
        training, validation: items.
        places: places in the dataset of the examples that are in either.
        left_out: files that are not trained on.
        facts: for the run's record, JSON-serializable.
    """

    training: list[DatasetItem]
    validation: list[DatasetItem]
    places: frozenset[int]
    left_out: tuple[LeftOut, ...]
    facts: dict


def prepare(
    dataset: Dataset,
    recipe: Recipe,
    host: Host,
    cache_folder: str,
    cache_limit: int,
    copy: str = "",
    used_since: float = math.inf,
) -> Prepared:
    """Encode uncached pictures and captions, and return the examples as dataset items.

    Args:
        copy: folder for a cache of only what this training needs; empty for none.
        used_since: keep cache files used after this time (seconds since the epoch); other running trainings need them.

    Raises:
        DatasetError: nothing is left to train on, or something cannot be encoded.
        SettingsError: the validation split leaves nothing to train on.
    """
    started = min(time.time(), used_since)
    _refuse_sources(dataset, host)
    geometries = {side: host.denoiser.geometry(side or recipe.resolution) for side in all_resolutions(dataset)}
    cuts, left_out = cut_dataset(dataset, geometries)
    maker = _ItemMaker(dataset, recipe, host, cache_folder)
    cuts = maker.encode_pictures(cuts, left_out)
    _refuse_if_empty(dataset, cuts, left_out)
    refuse_if_one_sided(dataset, [cut.example for cut in cuts], left_out)
    validation = held_out(cuts, recipe)
    training = [cut for cut in cuts if cut.place not in validation]
    maker.encode_captions(training, [cut for cut in cuts if cut.place in validation])
    maker.check_inputs(cuts[0])
    if copy:
        maker.copy(copy)
    removed = prune(cache_folder, cache_limit, started)
    if removed:
        log.info("Graft: removed %.1f GB of the oldest cached latents and texts.", removed / 1e9)
    for warning in dataset.warnings:
        log.warning("Graft: %s", warning)
    everything = (*dataset.left_out, *left_out)
    if everything:
        log.warning("Graft: skipped %d files: %s", len(everything), shortened(everything, 50))
    warnings = list_warnings(dataset, recipe, training, everything)
    for warning in warnings:
        if warning["kind"] != "skipped":
            log.warning("Graft: %s", warning["text"])
    if warnings:
        host.report("warnings", {"warnings": warnings})
    facts = {
        "left_out": [str(row) for row in everything],
        **maker.beside_facts(cuts),
        "latents": maker.latent_kind(cuts),
        "cache_bytes": cache_size(cache_folder),
    }
    return Prepared(
        [maker.item(cut, crop) for cut in training for crop in cut.crops],
        [maker.item(cut, crop) for cut in cuts if cut.place in validation for crop in cut.crops],
        frozenset(cut.place for cut in cuts),
        everything,
        facts,
    )


def _refuse_sources(dataset: Dataset, host: Host) -> None:
    if host.denoiser.conditioning_kind != SOURCE and any(example.control is not None for example in dataset.examples):
        raise DatasetError(
            f"The dataset has source pictures, but this model ({host.denoiser.family}) takes none.",
            "Leave control_folder empty, or use a model that edits pictures, such as Flux Kontext or Qwen-Image-Edit.",
            "dataset",
        )


def _refuse_if_empty(dataset: Dataset, cuts: list[CroppedExample], left_out: list[LeftOut]) -> None:
    if not cuts:
        raise DatasetError(
            f"Graft cannot train on any of the {len(dataset.examples)} pictures of '{dataset.name}': "
            f"{shortened(left_out)}.",
            "Replace damaged pictures. Replace small ones, or turn on upscale.",
            "dataset",
        )


class _ItemMaker:
    """Maker of dataset items: fills the caches, and makes items that read from them."""

    def __init__(self, dataset: Dataset, recipe: Recipe, host: Host, folder: str):
        self._pictures = len(dataset.examples)
        for name in _CACHES:
            # The parent of the cache folder may itself be a link: the pack's folder of outputs, or a job's folder.
            refuse_links(os.path.dirname(folder), os.path.join(folder, name))
        self._recipe = recipe
        self._host = host
        self._caches = {name: Cache(os.path.join(folder, name)) for name in ("latents", "text", "masks")}
        self._latents = LatentCache(self._caches["latents"], host.codec)
        # If the text encoder changes during training, its earlier conditionings are of no use.
        self._texts = None if recipe.live_text else TextCache(self._caches["text"], host.text)
        self._masks = MaskCache(self._caches["masks"])
        self._holes = None
        if host.denoiser.conditioning_kind == HOLE:
            self._caches["holes"] = Cache(os.path.join(folder, "holes"))
            self._holes = InpaintMaskCache(self._caches["holes"], host.codec)
        self._keep = LRUCache()
        # The loop prefetches in a thread, and the caches serve only one thread at a time.
        self._lock = threading.Lock()
        self._done = 0
        self._some_caption = ""

    def _ticking(self, rest: int) -> Callable[[str], None]:
        """Return a callback that reports each encoded entry to the host; at most `rest` more are expected."""
        total = self._done + rest

        def tick(name: str) -> None:
            self._done += 1
            self._host.report("cache", {"name": name, "done": self._done, "total": total})

        return tick

    def copy(self, folder: str) -> None:
        """Copy the needed entries into another cache."""
        for name, cache in self._caches.items():
            cache.copy_requested(os.path.join(folder, name))

    def encode_pictures(self, cuts: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        """Return the examples that have latents and masks; add the others to `left_out`."""
        rows = [(cut.example, cut.all_crops()) for cut in cuts]
        # The captions are not counted yet.
        outcome = self._latents.fill(rows, self._ticking(2 * len(cuts)))
        found = _sound(cuts, outcome, left_out)
        found = self._with_masks(found, left_out)
        return self._with_holes(self._with_sources(found, left_out), left_out)

    def _with_sources(self, cuts: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        paired = [cut for cut in cuts if cut.example.control is not None]
        rows = [(cut.example.control, [self._control_crop(cut, crop) for crop in cut.all_crops()]) for cut in paired]
        outcome = self._latents.fill(rows, self._ticking(len(paired) + len(cuts)))
        kept = {cut.place for cut in _sound(paired, outcome, left_out)}
        return [cut for cut in cuts if cut.example.control is None or cut.place in kept]

    def _with_holes(self, cuts: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        if self._holes is None:
            return cuts
        rows = [(cut.example, cut.all_crops()) for cut in cuts]
        return _sound(cuts, self._holes.fill(rows, self._ticking(2 * len(cuts))), left_out)

    def _control_crop(self, cut: CroppedExample, crop: Crop) -> Crop:
        step = self._host.denoiser.geometry(self._recipe.resolution).step
        return source_image_crop(cut.example.control, cut.example.size, crop, step)

    def beside_facts(self, cuts: list[CroppedExample]) -> dict[str, int]:
        """Count the pictures with a source picture or an inpaint mask; leave out the kinds that are not used."""
        paired = sum(cut.example.control is not None for cut in cuts)
        found = {"source_pictures": paired} if paired else {}
        if self._holes is not None:
            masked = sum(cut.example.mask is not None for cut in cuts)
            found.update(holes_by_mask=masked, holes_drawn=len(cuts) - masked)
        return found

    def _with_masks(self, cuts: list[CroppedExample], left_out: list[LeftOut]) -> list[CroppedExample]:
        rows = []
        owners = []
        for cut in cuts:
            if cut.example.mask is None:
                continue
            for crop in cut.all_crops():
                rows.append((cut.example, crop, self._shape(cut.example, crop)))
                owners.append(cut.place)
        problems: dict[int, LeftOut] = {}
        for place, row, problem in zip(owners, rows, self._masks.fill(rows), strict=True):
            example = row[0]
            if problem is None and not example.handling.mask_minimum and not self._counts(row):
                problem = LeftOut(example.source.name, "its mask excludes the whole crop")
            if problem is not None:
                problems.setdefault(place, problem)
        left_out.extend(problems.values())
        return [cut for cut in cuts if cut.place not in problems]

    def _counts(self, row: tuple) -> bool:
        return bool(self._masks.get(self._masks.key(*row)).any())

    def _shape(self, example: Example, crop: Crop) -> tuple[int, int]:
        return tuple(self._latents.get(self._latents.key(example, crop))["mean"].shape[-2:])

    def encode_captions(self, training: list[CroppedExample], validation: list[CroppedExample]) -> None:
        """Encode the captions that the run will use, those of validation, and the prompts of prior targets."""
        if self._texts is None:
            return
        wanted = dict.fromkeys(captions.plain(cut.example) for cut in validation)
        wanted.update((cut.example.anchor.prompt, None) for cut in training if cut.example.anchor is not None)
        recipe = self._recipe
        pairs = [(cut, crop) for cut in training for crop in cut.crops]
        turns = visits_within(
            recipe.steps * recipe.accumulation,
            [crop.bucket for _, crop in pairs],
            [cut.example.repeats for cut, _ in pairs],
            recipe.batch_size,
            [cut.example.prior for cut, _ in pairs],
        )
        for (cut, crop), times in zip(pairs, turns, strict=True):
            example = cut.example
            count = captions.variant_count(example, self._pictures)
            if count == 1 and not example.handling.caption_dropout:
                wanted[captions.variant(example, 0)] = None
                continue
            if example.handling.caption_dropout:
                wanted[""] = None
            for number in self._shown(cut, crop, count, times):
                wanted[captions.variant(example, number)] = None
        self._some_caption = next(iter(wanted))
        self._texts.fill(wanted, self._ticking(len(wanted)))

    def _shown(self, cut: CroppedExample, crop: Crop, count: int, times: int) -> list[int]:
        """Return the versions of a caption that `times` visits need."""
        if times >= count:
            return list(range(count))
        return sorted({self._version(cut, crop, count, turn) for turn in range(times)} - {None})

    def _version(self, cut: CroppedExample, crop: Crop, count: int, turn: int) -> int | None:
        return captions.variant_of_visit(cut.example, count, self._recipe.seed, cut.stream(crop), turn)

    def check_inputs(self, cut: CroppedExample) -> None:
        """Let the denoiser refuse a codec or an encoder that does not belong to it."""
        latent = self._latents.get(self._latents.key(cut.example, cut.crops[0]))["mean"]
        text = self._host.text.encode("") if self._texts is None else self._texts.get(self._some_caption)
        self._host.denoiser.check_inputs(latent, text)

    def latent_kind(self, cuts: list[CroppedExample]) -> str:
        """Describe the cached latents: posteriors to sample from, or means alone."""
        first = self._latents.get(self._latents.key(cuts[0].example, cuts[0].crops[0]))
        if "logvar" in first:
            return "mean and log-variance, sampled anew at every showing"
        log.info("Graft: this VAE has no posterior to sample; training uses the mean of each picture.")
        return "mean alone: the VAE has no posterior"

    def item(self, cut: CroppedExample, crop: Crop) -> DatasetItem:
        """Return one crop of an example as a dataset item."""
        from .items import DatasetItem

        def show(turn: int | None) -> Sample:
            with self._lock:
                return self._show(cut, crop, turn)

        example = cut.example
        anchored = example.anchor is not None
        return DatasetItem(example.source.name, crop.bucket, example.repeats, show, example.prior, anchored)

    def _show(self, cut: CroppedExample, crop: Crop, turn: int | None) -> Sample:
        from .items import Sample

        example = cut.example
        caption, drawn, source = self._draw(cut, crop, turn)
        key = self._latents.key(example, drawn)
        latent = self._host.denoiser.scale_latents(self._latent(key, source))
        beside = self._beside(cut, crop, drawn, turn)
        conditioning = replace(self._conditioning(caption, example, drawn), **beside)
        weight = None
        if example.mask is not None:
            weight = self._weight(example, drawn, tuple(latent.shape[-2:]))
            weight = weight.view(1, 1, *[1] * (latent.ndim - 4), *latent.shape[-2:])
        anchor = None
        if turn is not None and example.anchor is not None:
            told = replace(self._conditioning(example.anchor.prompt, example, drawn), **beside)
            live = self._live(example.anchor.prompt)
            anchor = Sample(latent, told, weight, live, example.anchor.weight)
        return Sample(latent, conditioning, weight, self._live(caption), example.weight, anchor)

    def _conditioning(self, caption: str, example: Example, drawn: Crop) -> Conditioning:
        """Return the conditioning of a visit; it has no tensors if the text encoder runs at every step."""
        tensors = {}
        if self._texts is not None:
            tensors = self._keep.get(f"text {caption}", lambda: self._texts.get(caption))
        return Conditioning(tensors, example.size, drawn.offset, drawn.bucket)

    def _beside(self, cut: CroppedExample, crop: Crop, drawn: Crop, turn: int | None) -> dict[str, torch.Tensor]:
        """Return the source picture's latent or the inpaint mask of a visit, by seed, place and visit number alone.

        Validation gets the first mask. Latents are means of the posterior, as ComfyUI's own nodes give them.
        """
        example = cut.example
        if example.control is not None:
            key = self._latents.key(example.control, self._control_crop(cut, drawn))
            return {"source": self._latent(key, None)}
        if self._holes is None:
            return {}
        seed = stream_seed("hole", self._recipe.seed, cut.stream(crop), turn) if turn is not None else 0
        key = self._holes.key(example, drawn, seed % self._holes.count(example))
        return self._keep.get(f"hole {key}", lambda: self._holes.get(key))

    def _live(self, caption: str) -> str | None:
        return caption if self._texts is None else None

    def _draw(self, cut: CroppedExample, crop: Crop, turn: int | None):
        """Return (caption, crop, generator of the latent's noise) of a visit, by seed, place and visit number alone.

        Validation has no visit number: it gets the plain caption, no mirroring, and the mean.
        """
        example = cut.example
        if turn is None:
            return captions.plain(example), crop, None
        from ..rng import generator

        place = cut.stream(crop)
        count = captions.variant_count(example, self._pictures)
        number = self._version(cut, crop, count, turn)
        caption = "" if number is None else captions.variant(example, number)
        seed = self._recipe.seed
        flipped = example.handling.flip and stream_seed("flip", seed, place, turn) % 2 == 1
        return caption, crop.mirrored() if flipped else crop, generator("posterior", seed, place, turn)

    def _latent(self, key: str, source: torch.Generator | None) -> torch.Tensor:
        """Return the posterior's mean, or a sample of the posterior if a generator is given."""
        import torch

        found = self._keep.get(f"latent {key}", lambda: self._latents.get(key))
        mean = found["mean"]
        if source is None or "logvar" not in found:
            return mean
        noise = torch.randn(mean.shape, generator=source)
        return mean + torch.exp(0.5 * found["logvar"]) * noise

    def _weight(self, example: Example, crop: Crop, shape: tuple[int, int]) -> torch.Tensor:
        key = self._masks.key(example, crop, shape)
        found = self._keep.get(f"mask {key}", lambda: {"": self._masks.get(key)})
        return found[""].clamp_min(example.handling.mask_minimum)


def _sound(cuts: list[CroppedExample], outcome: list[LeftOut | None], left_out: list[LeftOut]) -> list[CroppedExample]:
    """Return the examples without a problem; add the problems of the others to `left_out`."""
    left_out.extend(problem for problem in outcome if problem is not None)
    return [cut for cut, problem in zip(cuts, outcome, strict=True) if problem is None]
