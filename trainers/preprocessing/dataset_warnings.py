"""Warnings about a dataset and a recipe, shown when a training starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.dataset_warnings import warn_of_enlarged, warn_of_resolution, warn_of_scan, warn_of_skipped

if TYPE_CHECKING:
    from ..data.examples import Dataset, LeftOut
    from ..recipe.recipe import Recipe
    from .crops import CroppedExample


def list_warnings(
    dataset: Dataset, recipe: Recipe, training: Sequence[CroppedExample], left_out: Sequence[LeftOut]
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
    ]
    return [warning for warning in warnings if warning]


def _warn_of_batch(recipe: Recipe, subject: Sequence[CroppedExample]) -> dict[str, Any] | None:
    """Warn of a batch that is larger than the dataset."""
    showings = sum(cropped.example.repeats * len(cropped.crops) for cropped in subject)
    if recipe.batch_size <= showings:
        return None
    text = (
        f"batch_size {recipe.batch_size} is larger than the dataset: a step shows all {showings} pictures at most. "
        f"Set batch_size to {showings} or less, or add pictures."
    )
    return {"kind": "batch", "text": text, "batch": recipe.batch_size, "count": showings}
