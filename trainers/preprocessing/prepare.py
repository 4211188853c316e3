"""Preparation of a dataset: crops, cached encodings, and dataset items that vary at every visit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data.examples import LeftOut, shortened
from ..data.prior import refuse_if_one_sided
from ..errors import DatasetError, SettingsError
from ..inspection.dataset_warnings import warn_of_enlarged, warn_of_resolution, warn_of_scan, warn_of_skipped
from ..protocols import HOLE, MAX_SOURCES, SOURCE
from ..recipe.options import PROMPT_NODES, TEXT_ALONE
from ..recipe.parsing import read_prompts
from ..runs import run_lock
from ..text import join_first
from .cache import cache_size, prune
from .crops import CroppedExample, all_resolutions, crop_examples, held_out
from .dataset_caches import CacheFiller, DatasetCaches
from .items import DatasetItem, slider_items
from .preview_sources import named_sources, preview_sources
from .samples import SampleReader

if TYPE_CHECKING:
    from ..data.examples import Dataset, Example
    from ..protocols import Host, TextEncoder
    from ..recipe.recipe import Recipe
    from ..runs.folders import Folders
    from .preview_sources import PreviewInput

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Dataset that is ready for the training loop.

    Attributes:
        previews: for each prompt of a sample picture, a function that reads its encoded source pictures, or None.
        places: places in the dataset of the examples that are in either.
        left_out: files that are not trained on.
        facts: for the run's record, JSON-serializable.
        named: source pictures that prompts of sample pictures name, by these names.
    """

    training: list[DatasetItem]
    validation: list[DatasetItem]
    previews: list[Callable[[], PreviewInput] | None]
    places: frozenset[int]
    left_out: tuple[LeftOut, ...]
    facts: dict[str, Any]
    named: dict[str, Example]

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
    _refuse_sources(dataset, recipe, host)
    _refuse_pairs(dataset, recipe, host)
    _refuse_clips(dataset, host)
    _refuse_first_frame(dataset, recipe, host)
    _refuse_without_validation(dataset, recipe)
    caches = DatasetCaches(folders.cache, recipe, host)
    filler = CacheFiller(caches, recipe, host)
    if recipe.slider_prompts:
        items = slider_items(recipe, host, caches, filler)
        if copy:
            caches.copy_used(copy)
        return Prepared(items, [], [], frozenset(), (), {"images": 0}, {})
    training, validation, unusable = _encode(dataset, recipe, host, filler)
    if not validation:
        _refuse_unmeasured(recipe, f"the held-out pictures cannot be used ({shortened(unusable)})")
    named = named_sources(recipe, folders)
    previews = preview_sources(training, validation, recipe, caches, named)
    filler.fill_previews(previews)
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
        previews=[None if preview is None else reader.preview_input(preview) for preview in previews],
        places=frozenset(cropped.place for cropped in examples),
        left_out=left_out,
        facts={
            "left_out": [str(row) for row in left_out],
            **_count_image_conditionings(examples, caches),
            "latents": _describe_latents(examples[0], caches),
            "cache_bytes": cache_size(folders.cache),
        },
        named=named,
    )


def _encode(
    dataset: Dataset, recipe: Recipe, host: Host, filler: CacheFiller
) -> tuple[list[CroppedExample], list[CroppedExample], list[LeftOut]]:
    """Fill the caches, and return (training examples, validation examples, pictures that cannot be used)."""
    geometries = {side: host.denoiser.geometry(side or recipe.resolution) for side in all_resolutions(dataset)}
    snap = host.codec.snap_frames if any(example.clip for example in dataset.examples) else lambda frames: frames
    examples, unusable = crop_examples(dataset, geometries, snap, recipe.seed)
    examples = filler.fill_pictures(examples, unusable)
    _refuse_if_empty(dataset, examples, unusable)
    refuse_if_one_sided(dataset, [cropped.example for cropped in examples], unusable)
    places = held_out(examples, recipe)
    training = [cropped for cropped in examples if cropped.place not in places]
    validation = [cropped for cropped in examples if cropped.place in places]
    filler.fill_captions(training, validation, len(dataset.examples))
    filler.check_inputs(examples[0])
    return training, validation, unusable


def _refuse_sources(dataset: Dataset, recipe: Recipe, host: Host) -> None:
    denoiser, node = host.denoiser, recipe.prompt_node
    most = max((len(example.sources) for example in dataset.examples), default=0)
    named = max((len(prompt.sources) for prompt in read_prompts(recipe.preview_prompts)), default=0)
    if denoiser.conditioning_kind != SOURCE and (most or named):
        what = "The dataset has source pictures" if most else "A prompt of a sample picture has a --c"
        cure = "Leave control_folder empty" if most else "Remove --c"
        kind = DatasetError if most else SettingsError
        raise kind(
            f"{what}, but this model ({denoiser.family}) takes none.",
            f"{cure}, or use a model that edits pictures, such as Flux Kontext or Qwen-Image-Edit.",
            "dataset" if most else "prompts",
        )
    if node != TEXT_ALONE:
        host.text.check_prompt_node(node)
    limit = PROMPT_NODES.get(node, MAX_SOURCES)
    if max(most, named) > 1 and (limit == 1 or denoiser.max_sources == 1):
        taker = node if limit == 1 else f"this model ({denoiser.family})"
        if most > 1:
            raise DatasetError(
                f"A picture has {most} source pictures, but {taker} takes one.",
                "Leave control_folder_2 and control_folder_3 empty.",
                "dataset",
            )
        raise SettingsError(
            f"A prompt of a sample picture has {named} --c, but {taker} takes one.", "Write one --c.", "prompts"
        )


def _refuse_pairs(dataset: Dataset, recipe: Recipe, host: Host) -> None:
    alone = [example.source.name for example in dataset.examples if example.paired is None]
    if recipe.takes_pairs and alone:
        raise DatasetError(
            f"{len(alone)} of {len(dataset.examples)} pictures have no worse picture to compare with: "
            f"{join_first(alone, 5)}.",
            "Set worse_folder in Graft Load Dataset, write worse_file_name into metadata.jsonl, or connect "
            "worse_images. Use no class images.",
            "dataset",
        )
    if recipe.takes_pairs and host.denoiser.conditioning_kind == HOLE:
        raise DatasetError(
            f"This inpainting model ({host.denoiser.family}) sees the better picture around the hole, so the worse one "
            "would not fit.",
            "Use a model that is not made for inpainting.",
            "dataset",
        )
    if not recipe.takes_pairs and len(alone) < len(dataset.examples):
        raise DatasetError(
            "The dataset has worse pictures, but this training does not compare pictures.",
            "Use Graft Train Preference, or leave out worse_folder, worse_file_name and worse_images.",
            "dataset",
        )


def _refuse_clips(dataset: Dataset, host: Host) -> None:
    """Refuse clips if the codec encodes stills alone, or if the model sees the picture around a mask."""
    clips = sum(example.clip is not None for example in dataset.examples)
    if clips and (host.denoiser.conditioning_kind == HOLE or host.codec.snap_frames(1) == 0):
        raise DatasetError(
            f"The dataset has {clips} clips, but this model ({host.denoiser.family}) or its VAE takes stills alone.",
            "Set frames of the dataset to 0, or use a video model with its VAE.",
            "dataset",
        )


def _refuse_first_frame(dataset: Dataset, recipe: Recipe, host: Host) -> None:
    if not recipe.first_frame_probability:
        return
    if not host.denoiser.takes_first_frame:
        raise SettingsError(
            f"first_frame_probability is set, but this model ({host.denoiser.family}) takes no first frame without "
            "noise.",
            "Set it to 0. For a model that sees the picture beside the clip, such as Wan I2V, connect the conditioning "
            "of ComfyUI's node to Graft Dataset from Images.",
            "first_frame_probability",
        )
    if all(example.clip is None for example in dataset.examples):
        raise SettingsError(
            "first_frame_probability is set, but the dataset has no clips.",
            "Set it to 0, or set frames of the dataset.",
            "first_frame_probability",
        )


def _refuse_without_validation(dataset: Dataset, recipe: Recipe) -> None:
    if not recipe.validation_fraction and not any(example.held_out for example in dataset.examples):
        _refuse_unmeasured(recipe, "no pictures are held out to measure a validation loss with")


def _refuse_unmeasured(recipe: Recipe, problem: str) -> None:
    """Raise SettingsError for an option that has no effect without a validation loss."""
    for name in ("keep_best", "stop_when"):
        if getattr(recipe, name) != "off":
            raise SettingsError(
                f"{name} is set, but {problem}.",
                "Set validation_fraction in Graft Run Options or validation_folder in Graft Load Dataset, or leave "
                f"{name} unset.",
                name,
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
    if left_out:
        log.warning("Graft: skipped %d files: %s", len(left_out), shortened(left_out, 50))
    warnings = _list_warnings(dataset, recipe, training, left_out, host.text)
    for warning in warnings:
        if warning["kind"] != "skipped":
            log.warning("Graft: %s", warning["text"])
    if warnings:
        host.report("warnings", {"warnings": warnings})


def _count_image_conditionings(examples: list[CroppedExample], caches: DatasetCaches) -> dict[str, int]:
    counts = {}
    clips = sum(cropped.example.clip is not None for cropped in examples)
    if clips:
        counts["clips"] = clips
    edited = sum(bool(cropped.example.sources) for cropped in examples)
    if edited:
        counts["source_pictures"] = edited
    pairs = sum(cropped.example.paired is not None for cropped in examples)
    if pairs:
        counts["pairs"] = pairs
    if caches.inpaint_masks is not None:
        masked = sum(cropped.example.mask is not None for cropped in examples)
        counts.update(holes_by_mask=masked, holes_drawn=len(examples) - masked)
    return counts


def _describe_latents(cropped: CroppedExample, caches: DatasetCaches) -> str:
    if "logvar" in caches.latents.get(caches.latents.key(cropped.example, cropped.crops[0])):
        return "mean and log-variance, sampled anew at every showing"
    log.info("Graft: this VAE has no posterior to sample; training uses the mean of each picture.")
    return "mean alone: the VAE has no posterior"


def _list_warnings(
    dataset: Dataset,
    recipe: Recipe,
    training: Sequence[CroppedExample],
    left_out: Sequence[LeftOut],
    text_encoder: TextEncoder,
) -> list[dict[str, Any]]:
    """List the warnings that a user should read before a long training.

    Args:
        training: the pictures that are trained on.
        left_out: all files that are not trained on, with those of the scan.
    """
    pictures = [(cropped.example, crop) for cropped in training for crop in cropped.crops]
    warnings = [
        warn_of_skipped(left_out, len(dataset.examples) + len(dataset.left_out)),
        *warn_of_scan(dataset),
        warn_of_enlarged(pictures),
        _warn_of_batch(recipe, [cropped for cropped in training if not cropped.example.prior]),
        warn_of_resolution(recipe.resolution, recipe.family),
        _warn_of_unseen_sources(recipe, training, text_encoder),
    ]
    return [warning for warning in warnings if warning]


def _warn_of_unseen_sources(
    recipe: Recipe, training: Sequence[CroppedExample], text_encoder: TextEncoder
) -> dict[str, Any] | None:
    has_sources = any(cropped.example.sources for cropped in training)
    if recipe.prompt_node != TEXT_ALONE or not has_sources or not text_encoder.sees_pictures:
        return None
    text = (
        "This text encoder can see source pictures, but training encodes the captions alone. If a node such as "
        "TextEncodeQwenImageEditPlus encodes your prompts, choose it as prompt_node in Graft Run Options."
    )
    return {"kind": "sources", "text": text}


def _warn_of_batch(recipe: Recipe, subject: Sequence[CroppedExample]) -> dict[str, Any] | None:
    showings = sum(cropped.example.repeats * len(cropped.crops) for cropped in subject)
    if recipe.batch_size <= showings:
        return None
    text = (
        f"batch_size {recipe.batch_size} is larger than the dataset: a step shows all {showings} pictures at most. "
        f"Set batch_size to {showings} or less, or add pictures."
    )
    return {"kind": "batch", "text": text, "batch": recipe.batch_size, "count": showings}
