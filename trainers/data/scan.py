"""From a folder to a dataset: which pictures, which captions, how often."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .examples import Dataset, Example
from .pixels import ArraySource, FileSource, is_picture, measure_file

if TYPE_CHECKING:
    import numpy as np


def picture_paths(folder: str) -> list[str]:
    """Paths of the pictures in a folder and below it, sorted; nothing outside the folder is followed."""
    root = os.path.realpath(folder)
    found = []
    for directory, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in sorted(files):
            path = os.path.join(directory, file)
            if is_picture(path) and not file.startswith(".") and _is_below(path, root):
                found.append(path)
    return found


def _is_below(path: str, root: str) -> bool:
    real = os.path.realpath(path)
    return os.path.commonpath([real, root]) == root


def scan_folder(folder: str, trigger: str, resolution: int, repeats: int) -> Dataset:
    """The dataset of a folder.

    Args:
        folder: absolute path; every picture in it and below it is taken.
        trigger: word for the thing to be learnt, may be empty.
        resolution: pixels, 0 for the model's own.
        repeats: how often each picture is shown in an epoch.

    Raises:
        DatasetError: no such folder, no picture in it, an unreadable picture or caption.
    """
    if not os.path.isdir(folder):
        raise DatasetError(f"There is no folder '{folder}'.", "Choose a folder below ComfyUI's input folder.", "folder")
    paths = picture_paths(folder)
    if not paths:
        raise DatasetError(
            f"The folder '{folder}' holds no picture.",
            "Put PNG, JPEG or WebP files into it.",
            "folder",
        )
    examples = tuple(_read_example(path, folder, repeats) for path in paths)
    name = os.path.basename(os.path.normpath(folder))
    return Dataset(examples, trigger.strip(), resolution, name)


def _read_example(path: str, folder: str, repeats: int) -> Example:
    name = os.path.relpath(path, os.path.realpath(folder)).replace(os.sep, "/")
    size, digest = measure_file(path, name)
    sidecar = captions.caption_file(path)
    caption = ""
    if sidecar:
        caption = captions.read_caption(sidecar, os.path.basename(sidecar))
    return Example(FileSource(path, name), caption, size, digest, repeats)


def from_arrays(
    images: list[np.ndarray], texts: list[str], trigger: str, resolution: int, masks: list[np.ndarray] = ()
) -> Dataset:
    """The dataset of pictures that came over wires.

    Args:
        images: each [H, W, 3] uint8.
        texts: one caption for all, or one for each picture.
        masks: none, or one [H, W] uint8 for each picture; white counts in the loss, black does not.

    Raises:
        DatasetError: no picture, or numbers of captions or masks that do not fit.
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
    examples = []
    for index, image in enumerate(images):
        source = ArraySource(image, f"image {index + 1}")
        text = texts[index if len(texts) > 1 else 0]
        mask = None
        if masks:
            mask_array = masks[index if len(masks) > 1 else 0]
            mask = _mask_source(mask_array, image.shape[:2], index)
        size = (image.shape[1], image.shape[0])
        examples.append(Example(source, " ".join(text.split()), size, source.digest, 1, mask))
    return Dataset(tuple(examples), trigger.strip(), resolution, "images")


def _mask_source(mask: np.ndarray, shape: tuple[int, int], index: int) -> ArraySource:
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(mask).resize((shape[1], shape[0]), Image.BILINEAR)
    array = np.asarray(picture.convert("RGB"))
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return ArraySource(array, f"mask {index + 1} {digest[:16]}")


def folder_fingerprint(folder: str) -> str:
    """Hash of names and contents of all pictures and captions in a folder, to tell whether it changed."""
    total = hashlib.sha256()
    for path in picture_paths(folder):
        sidecar = captions.caption_file(path)
        for part in (path, sidecar):
            if part is None:
                continue
            total.update(os.path.relpath(part, folder).encode("utf-8", "surrogateescape"))
            total.update(_file_digest(part))
    return total.hexdigest()


def _file_digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return b"unreadable"


def check_captions(dataset: Dataset) -> None:
    """Raises DatasetError when an example has nothing to be conditioned on."""
    bare = [example.source.name for example in dataset.examples if not dataset.caption(example)]
    if bare:
        shown = ", ".join(bare[:5]) + (" ..." if len(bare) > 5 else "")
        raise DatasetError(
            f"{len(bare)} of {len(dataset.examples)} pictures have neither a caption nor a trigger: {shown}.",
            "Write a caption into a .txt file beside each picture, or set the dataset's trigger.",
            "dataset",
        )
