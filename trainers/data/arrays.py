"""Datasets of pictures that arrive as arrays over a graph's wires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .examples import Augmentation, Dataset, Example
from .pictures import ArraySource
from .source_images import source_image_of

if TYPE_CHECKING:
    import numpy as np


def from_arrays(
    images: list[np.ndarray],
    texts: list[str],
    trigger: str,
    resolution: int,
    masks: list[np.ndarray] = (),
    handling: Augmentation | None = None,
    lines_are_variants: bool = False,
    source_images: list[np.ndarray] = (),
) -> Dataset:
    """Make a dataset from pictures that arrive at a node's inputs.

    Args:
        images: each [H, W, 3] uint8.
        texts: one caption for all, or one for each picture.
        masks: none, one for all, or one for each picture, [H, W] uint8; white counts in the loss, black does not.
        source_images: none, or one source picture for each picture.

    Raises:
        DatasetError: there is no picture, or the number of captions, masks or source pictures does not match.
    """
    _check_counts(len(images), len(texts), len(masks), len(source_images))
    examples = []
    for index, image in enumerate(images):
        source = ArraySource(image, f"image {index + 1}")
        text = texts[index if len(texts) > 1 else 0]
        mask = _mask_source(masks[index if len(masks) > 1 else 0], image.shape[:2], index) if masks else None
        examples.append(
            Example(
                source=source,
                captions=captions.variants_of(text, lines_are_variants) or ("",),
                size=(image.shape[1], image.shape[0]),
                digest=source.digest,
                trigger=trigger.strip(),
                mask=mask,
                handling=handling or Augmentation(),
                control=_source_image(source_images[index], index) if source_images else None,
            )
        )
    return Dataset(tuple(examples), trigger.strip(), resolution, "images")


def _check_counts(images: int, texts: int, masks: int, source_images: int) -> None:
    """Raise DatasetError if there is no picture, or if a number does not match the number of pictures."""
    if not images:
        raise DatasetError("No picture arrived.", "Connect an IMAGE output with at least one picture.", "images")
    if texts not in (1, images):
        raise DatasetError(
            f"{texts} captions arrived for {images} pictures.",
            "Give one caption for all pictures, or exactly one for each.",
            "captions",
        )
    if masks and masks not in (1, images):
        raise DatasetError(
            f"{masks} masks arrived for {images} pictures.",
            "Give one mask for all pictures, or exactly one for each.",
            "masks",
        )
    if source_images and source_images != images:
        raise DatasetError(
            f"{source_images} source pictures arrived for {images} pictures.",
            "Connect exactly one source picture for each picture.",
            "control_images",
        )


def _source_image(image: np.ndarray, index: int) -> Example:
    height, width = image.shape[:2]
    return source_image_of(ArraySource(image, f"source image {index + 1}"), (width, height))


def _mask_source(mask: np.ndarray, shape: tuple[int, int], index: int) -> ArraySource:
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(mask).resize((shape[1], shape[0]), Image.BILINEAR)
    return ArraySource(np.asarray(picture.convert("RGB")), f"mask {index + 1}")
