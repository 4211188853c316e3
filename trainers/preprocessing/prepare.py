"""Preparation of a dataset: crops, cached encodings, and dataset items that vary at every visit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.examples import LeftOut
from ..data.prior import refuse_if_one_sided
from ..data.scan import shortened
from ..errors import DatasetError
from ..protocols import SOURCE
from ..runs import run_lock
from .cache import cache_size, prune
from .cache_filler import CacheFiller
from .crops import CroppedExample, all_resolutions, crop_examples, held_out
from .dataset_caches import DatasetCaches
from .dataset_warnings import list_warnings
from .samples import SampleReader

if TYPE_CHECKING:
    from ..data.examples import Dataset
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from ..runs.folders import Folders
    from .items import DatasetItem

log = logging.getLogger(__name__)


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
    facts: dict[str, Any]

    def counts(self) -> dict[str, int]:
        """Count the pictures for the run's record; class images only if there are some."""
        training = {item.name for item in self.training if not item.prior}
        validation = {item.name for item in self.validation}
        class_images = {item.name for item in self.training if item.prior}
        counts = {"images": len(training | validation), "validation_images": len(validation)}
        return {**counts, "class_images": len(class_images)} if class_images else counts


def prepare(dataset: Dataset, recipe: Recipe, host: Host, folders: Folders, copy: str = "") -> Prepared:
    """Encode uncached pictures and captions, and return the examples as dataset items.

    Args:
        copy: folder for a cache of only what this training needs; empty for none.

    Raises:
        DatasetError: nothing is left to train on, or something cannot be encoded.
        SettingsError: the validation split leaves nothing to train on.
    """
    # Other running trainings still need the cache files that they used.
    used_since = run_lock.earliest_start(folders.runs)
    _refuse_sources(dataset, host)
    caches = DatasetCaches(folders.cache, recipe, host)
    training, validation, unusable = _encode(dataset, recipe, host, caches)
    if copy:
        caches.copy_used(copy)
    removed = prune(folders.cache, folders.cache_limit, used_since)
    if removed:
        log.info("Graft: removed %.1f GB of the oldest cached latents and texts.", removed / 1e9)
    left_out = (*dataset.left_out, *unusable)
    _report_warnings(dataset, recipe, host, training, left_out)
    examples = [*training, *validation]
    reader = SampleReader(caches, recipe, host.denoiser, len(dataset.examples))
    return Prepared(
        training=reader.items(training),
        validation=reader.items(validation),
        places=frozenset(cropped.place for cropped in examples),
        left_out=left_out,
        facts={
            "left_out": [str(row) for row in left_out],
            **_count_image_conditionings(examples, caches),
            "latents": _describe_latents(examples[0], caches),
            "cache_bytes": cache_size(folders.cache),
        },
    )


def _encode(
    dataset: Dataset, recipe: Recipe, host: Host, caches: DatasetCaches
) -> tuple[list[CroppedExample], list[CroppedExample], list[LeftOut]]:
    """Fill the caches, and return (training examples, validation examples, pictures that cannot be used)."""
    geometries = {side: host.denoiser.geometry(side or recipe.resolution) for side in all_resolutions(dataset)}
    examples, unusable = crop_examples(dataset, geometries)
    filler = CacheFiller(caches, recipe, host)
    examples = filler.fill_pictures(examples, unusable)
    _refuse_if_empty(dataset, examples, unusable)
    refuse_if_one_sided(dataset, [cropped.example for cropped in examples], unusable)
    places = held_out(examples, recipe)
    training = [cropped for cropped in examples if cropped.place not in places]
    validation = [cropped for cropped in examples if cropped.place in places]
    filler.fill_captions(training, validation, len(dataset.examples))
    filler.check_inputs(examples[0])
    return training, validation, unusable


def _refuse_sources(dataset: Dataset, host: Host) -> None:
    if host.denoiser.conditioning_kind != SOURCE and any(example.control is not None for example in dataset.examples):
        raise DatasetError(
            f"The dataset has source pictures, but this model ({host.denoiser.family}) takes none.",
            "Leave control_folder empty, or use a model that edits pictures, such as Flux Kontext or Qwen-Image-Edit.",
            "dataset",
        )


def _refuse_if_empty(dataset: Dataset, examples: list[CroppedExample], left_out: list[LeftOut]) -> None:
    if not examples:
        raise DatasetError(
            f"Graft cannot train on any of the {len(dataset.examples)} pictures of '{dataset.name}': "
            f"{shortened(left_out)}.",
            "Replace damaged pictures. Replace small ones, or turn on upscale.",
            "dataset",
        )


def _report_warnings(
    dataset: Dataset, recipe: Recipe, host: Host, training: list[CroppedExample], left_out: tuple[LeftOut, ...]
) -> None:
    """Report files that are not trained on, and what looks unintended in the dataset."""
    if left_out:
        log.warning("Graft: skipped %d files: %s", len(left_out), shortened(left_out, 50))
    warnings = list_warnings(dataset, recipe, training, left_out)
    for warning in warnings:
        if warning["kind"] != "skipped":
            log.warning("Graft: %s", warning["text"])
    if warnings:
        host.report("warnings", {"warnings": warnings})


def _count_image_conditionings(examples: list[CroppedExample], caches: DatasetCaches) -> dict[str, int]:
    """Count the pictures with a source image or an inpaint mask; leave out the kinds that are not used."""
    counts = {}
    paired = sum(cropped.example.control is not None for cropped in examples)
    if paired:
        counts["source_pictures"] = paired
    if caches.inpaint_masks is not None:
        masked = sum(cropped.example.mask is not None for cropped in examples)
        counts.update(holes_by_mask=masked, holes_drawn=len(examples) - masked)
    return counts


def _describe_latents(cropped: CroppedExample, caches: DatasetCaches) -> str:
    """Describe the cached latents: posteriors to sample from, or means alone."""
    if "logvar" in caches.latents.get(caches.latents.key(cropped.example, cropped.crops[0])):
        return "mean and log-variance, sampled anew at every showing"
    log.info("Graft: this VAE has no posterior to sample; training uses the mean of each picture.")
    return "mean alone: the VAE has no posterior"
