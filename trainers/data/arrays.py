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
    if not images:
        raise DatasetError("No picture arrived.", "Connect an IMAGE output with at least one picture.", "images")
    if len(texts) not in (1, len(images)):
        raise DatasetError(
            f"{len(texts)} captions arrived for {len(images)} pictures.",
            "Give one caption for all pictures, or exactly one for each.",
            "captions",
        )
    if masks and len(masks) not in (1, len(images)):
        raise DatasetError(
            f"{len(masks)} masks arrived for {len(images)} pictures.",
            "Give one mask for all pictures, or exactly one for each.",
            "masks",
        )
    if source_images and len(source_images) != len(images):
        raise DatasetError(
            f"{len(source_images)} source pictures arrived for {len(images)} pictures.",
            "Connect exactly one source picture for each picture.",
            "control_images",
        )
    trigger = trigger.strip()
    examples = []
    for index, image in enumerate(images):
        source = ArraySource(image, f"image {index + 1}")
        text = texts[index if len(texts) > 1 else 0]
        mask = None
        if masks:
            mask_array = masks[index if len(masks) > 1 else 0]
            mask = _mask_source(mask_array, image.shape[:2], index)
        size = (image.shape[1], image.shape[0])
        variants = captions.variants_of(text, lines_are_variants) or ("",)
        source_image = None
        if source_images:
            height, width = source_images[index].shape[:2]
            source_image = source_image_of(
                ArraySource(source_images[index], f"source image {index + 1}"), (width, height)
            )
        augmentation = handling or Augmentation()
        examples.append(
            Example(source, variants, size, source.digest, trigger, 1, mask, augmentation, control=source_image)
        )
    return Dataset(tuple(examples), trigger, resolution, "images")


def _mask_source(mask: np.ndarray, shape: tuple[int, int], index: int) -> ArraySource:
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(mask).resize((shape[1], shape[0]), Image.BILINEAR)
    return ArraySource(np.asarray(picture.convert("RGB")), f"mask {index + 1}")
