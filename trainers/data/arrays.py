"""Datasets of pictures that arrive as arrays over a graph's wires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .clips import FramesSource
from .examples import Augmentation, Clip, Dataset, EncodedPrompt, Example
from .pictures import ArraySource
from .source_images import check_pair, source_image_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


def from_arrays(
    images: list[np.ndarray | list[np.ndarray]],
    texts: list[str],
    trigger: str,
    resolution: int,
    masks: list[np.ndarray] = (),
    handling: Augmentation | None = None,
    lines_are_variants: bool = False,
    source_images: list[np.ndarray] = (),
    encoded: list[EncodedPrompt] = (),
    worse_images: list[np.ndarray] = (),
) -> Dataset:
    """Make a dataset from pictures that arrive at a node's inputs.

    Args:
        images: each [H, W, 3] uint8, or a list of such, the frames of a clip.
        texts: one caption for all, or one for each picture.
        masks: none, one for all, or one for each picture, [H, W] uint8; white counts in the loss, black does not.
        source_images: none, or one source picture for each picture.
        encoded: none, one for all, or one for each picture; they take the place of captions.
        worse_images: none, or one worse picture for each picture.

    Raises:
        DatasetError: there is no picture, or the number of captions, masks, source pictures, encoded prompts or worse
            pictures does not match; a worse picture has another shape; or an encoded prompt contradicts another input.
    """
    handling = handling or Augmentation()
    counts = (len(rows) for rows in (images, texts, masks, source_images, encoded, worse_images))
    check_counts(*counts, any(isinstance(image, list) for image in images))
    if encoded:
        lines = {"captions": any(text.strip() for text in texts), "trigger": trigger.strip()}
        _check_encoded(encoded, {**lines, "lines_are_variants": lines_are_variants}, handling, bool(source_images))
    examples = []
    for index, image in enumerate(images):
        clip = None
        if isinstance(image, list):
            name = f"clip {index + 1}"
            clip = Clip(len(image), frames=len(image))
            source = FramesSource([ArraySource(frame, name) for frame in image], name)
            image = image[0]
        else:
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
                handling=handling,
                control=_array_example(source_images[index], f"source image {index + 1}") if source_images else None,
                encoded=encoded[index if len(encoded) > 1 else 0] if encoded else None,
                paired=_array_example(worse_images[index], f"worse image {index + 1}") if worse_images else None,
                clip=clip,
            )
        )
        if worse_images:
            check_pair(examples[-1].paired, examples[-1].size, "worse_images")
    return Dataset(tuple(examples), trigger.strip(), resolution, "images")


def split_clips(batch: list[np.ndarray], clips: int) -> list[list[np.ndarray]]:
    """Split the frames of a batch into clips of equal length; drop the frames that are left over.

    Raises:
        DatasetError: the batch has fewer frames than clips.
    """
    length = len(batch) // clips
    if not length:
        raise DatasetError(
            f"A batch of {len(batch)} images cannot be split into {clips} clips.",
            "Lower clips, or connect more images.",
            "clips",
        )
    return [batch[number * length : (number + 1) * length] for number in range(clips)]


def check_counts(
    images: int,
    texts: int,
    masks: int,
    source_images: int = 0,
    encoded: int = 0,
    worse_images: int = 0,
    clips: bool = False,
) -> None:
    """Raise DatasetError if there is no picture, or if a number does not match the number of pictures or clips."""
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
    if encoded and encoded not in (1, images):
        raise DatasetError(
            f"{encoded} conditionings arrived for {images} pictures.",
            "Connect one conditioning for all pictures, or a list with exactly one for each.",
            "conditioning",
        )
    if worse_images and clips:
        raise DatasetError(
            "A clip cannot have a worse picture.", "Disconnect worse_images, or set clips to 0.", "clips"
        )
    if worse_images and worse_images != images:
        raise DatasetError(
            f"{worse_images} worse pictures arrived for {images} pictures.",
            "Connect exactly one worse picture for each picture.",
            "worse_images",
        )


def _check_encoded(
    encoded: list[EncodedPrompt], lines: dict[str, object], handling: Augmentation, has_sources: bool
) -> None:
    """Raise DatasetError if an input would have no effect on encoded prompts, or would contradict them.

    Args:
        lines: inputs about captions that are not part of `handling`, by name.
    """
    varied = ("shuffle_tags", "keep_tokens", "tag_dropout", "caption_dropout", "wildcards", "caption_variants")
    used = [name for name, value in {**lines, **{name: getattr(handling, name) for name in varied}}.items() if value]
    if used:
        raise DatasetError(
            f"The connected conditioning trains in place of captions, so {used[0]} has no effect.",
            f"Clear {used[0]}, or disconnect conditioning.",
            used[0],
        )
    if any(prompt.holds_pictures for prompt in encoded) and (handling.flip or has_sources):
        name = "flip" if handling.flip else "control_images"
        why = "flip would mirror only its result" if handling.flip else "control_images bring another one"
        raise DatasetError(
            f"The connected conditioning holds a source picture, and {why}.",
            f"{'Turn off' if handling.flip else 'Disconnect'} {name}, or remove ReferenceLatent from the conditioning.",
            name,
        )


def _array_example(image: np.ndarray, name: str) -> Example:
    height, width = image.shape[:2]
    return source_image_of(ArraySource(image, name), (width, height))


def _mask_source(mask: np.ndarray, shape: tuple[int, int], index: int) -> ArraySource:
    import numpy as np

    return ArraySource(np.asarray(fit_mask(mask, shape).convert("RGB")), f"mask {index + 1}")


def fit_mask(mask: np.ndarray, shape: tuple[int, int]) -> Image.Image:
    """Return a mask, [H, W] uint8, stretched to a picture's (height, width)."""
    from PIL import Image

    return Image.fromarray(mask).resize((shape[1], shape[0]), Image.BILINEAR)
