"""Warnings about a dataset and a recipe, shown when a training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..inspection.dataset_warnings import warn_of_enlarged, warn_of_resolution, warn_of_scan, warn_of_skipped
from ..recipe.options import TEXT_ALONE

if TYPE_CHECKING:
    from ..data.examples import Dataset, LeftOut
    from ..protocols import TextEncoder
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample


def list_warnings(
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
