"""Captioning in a graph: a dataset's pictures, decoded, and captions, written beside the pictures of its folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.captions import variants_of
from ..data.clips import AnimationSource, VideoSource, is_media
from ..data.examples import Dataset, Example, LeftOut, reason_of, shortened
from ..data.listing import fold, stem_of
from ..data.pictures import FileSource, is_picture
from ..errors import DatasetError
from ..formats import atomic
from ..text import counted
from .caption_edits import write_caption

if TYPE_CHECKING:
    import numpy as np


def read_captions(values: Sequence, pictures: int) -> list[tuple[str, ...]]:
    """Return the captions in each value that arrived over a wire, each in one line; a blank text has none.

    Args:
        values: a text, or a list of texts, for each picture; or for each batch a list with a text for each picture.
        pictures: number of pictures, which tells the two apart.

    Raises:
        DatasetError: a value is no text, or a caption cannot be saved.
    """
    if len(values) != pictures:
        values = [text for value in values for text in (value if isinstance(value, (list, tuple)) else (value,))]
    return [_captions(value, number) for number, value in enumerate(values, 1)]


def _captions(value: object, number: int) -> tuple[str, ...]:
    texts = value if isinstance(value, (list, tuple)) else (value,)
    for text in texts:
        if not isinstance(text, str):
            raise DatasetError(
                f"Caption {number} is of type {type(text).__name__}, not a text.",
                "Connect the text output of a captioner.",
                "captions",
            )
    try:
        return tuple(caption for text in texts for caption in variants_of(text, False))
    except DatasetError as error:
        raise DatasetError(f"Caption {number} cannot be saved: {error.message}", error.cure, "captions") from error


def save_captions(
    dataset: Dataset, values: Sequence, tick: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Dataset, int]:
    """Write captions as NAME.txt beside the pictures of a dataset, and return it with them, and the number of files.

    The text that the first written caption replaces stays as NAME.txt.bak. A blank caption changes nothing.

    Args:
        values: captions as `read_captions` takes them, in the order of the dataset's pictures.
        tick: called with (done, total) pictures; may raise to interrupt.

    Raises:
        DatasetError: a picture has no caption file of its own, or a caption is missing, left over or unusable.
            No file has changed then.
        RunError: a file is a link, or cannot be written. The error names it; the files before it are written.
    """
    paths = _caption_paths(dataset)
    captions = read_captions(values, len(paths))
    if len(captions) != len(paths):
        raise DatasetError(
            f"{counted(len(captions), 'caption')} arrived for {counted(len(paths), 'picture')} of '{dataset.name}'.",
            "Give exactly one for each: connect images and dataset of one Graft Images from Dataset.",
            "captions",
        )
    examples = []
    written = 0
    for number, (example, path, own) in enumerate(zip(dataset.examples, paths, captions, strict=True)):
        tick(number, len(paths))
        if own and own != example.captions:
            written += write_caption(path, "\n".join(own))
            example = replace(example, captions=own)
        examples.append(example)
    tick(len(paths), len(paths))
    return replace(dataset, examples=tuple(examples)), written


def _caption_paths(dataset: Dataset) -> list[str]:
    """Return the path of each picture's caption file. Raise DatasetError or RunError as `save_captions` does."""
    owners: dict[str, str] = {}
    paths = []
    takes = is_media if any(example.clip for example in dataset.examples) else is_picture
    for example in dataset.examples:
        path = _caption_path(example, takes)
        owner = owners.get(fold(path))
        if owner is not None:
            raise DatasetError(
                f"The pictures '{owner}' and '{example.source.name}' have the same caption file "
                f"'{os.path.basename(path)}'.",
                "Rename one of them, or remove it.",
                "dataset",
            )
        owners[fold(path)] = example.source.name
        paths.append(path)
    return paths


def _caption_path(example: Example, takes: Callable[[str], bool]) -> str:
    source = example.source
    if not isinstance(source, (FileSource, AnimationSource, VideoSource)) or example.prior:
        raise DatasetError(
            f"The picture '{source.name}' is no file in the dataset's folder.",
            "Connect Graft Load Dataset or Graft Save Dataset, or Graft Images from Dataset behind them.",
            "dataset",
        )
    if not os.path.isfile(source.path):
        raise DatasetError(
            f"The picture '{source.name}' was removed after Graft read the dataset.",
            "Queue the graph again.",
            "dataset",
        )
    path = f"{stem_of(source.path)}.txt"
    if _shares_stem(source.path, takes):
        if os.path.exists(path):
            raise DatasetError(
                f"The file '{os.path.basename(path)}' is the caption of '{source.name}' and of another picture of that "
                "name.",
                "Rename one of the pictures.",
                "dataset",
            )
        path = f"{source.path}.txt"
    atomic.refuse_links(source.root, path, "Replace it with a file of its own.")
    return path


def _shares_stem(path: str, takes: Callable[[str], bool]) -> bool:
    folder, own = os.path.split(path)
    names = (name for name in os.listdir(folder) if name != own and takes(name))
    return any(fold(stem_of(name)) == fold(stem_of(own)) for name in names)


def decode_pictures(
    dataset: Dataset,
    only_without_caption: bool = False,
    most: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[np.ndarray], Dataset]:
    """Decode pictures of a dataset, and return them with the dataset that holds just these, in the same order.

    Class images are left out, and so is a picture that cannot be decoded: the dataset lists it among its `left_out`.

    Args:
        most: number of pictures to decode, 0 for all.
        tick: called with (done, total) pictures; may raise to interrupt.

    Returns:
        the pictures, each [H, W, 3] uint8, and their dataset.

    Raises:
        DatasetError: no picture is left.
    """
    import numpy as np

    wanted = [
        example
        for example in dataset.examples
        if not (example.prior or (only_without_caption and any(example.captions)))
    ]
    total = min(most or len(wanted), len(wanted))
    pictures, examples, left_out = [], [], []
    for example in wanted:
        if len(pictures) == total:
            break
        tick(len(pictures), total)
        try:
            pictures.append(np.asarray(example.source.open()))
            examples.append(example)
        except DatasetError as error:
            left_out.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
    if not pictures:
        raise _nothing_left(dataset, left_out, only_without_caption)
    tick(total, total)
    return pictures, replace(dataset, examples=tuple(examples), left_out=(*dataset.left_out, *left_out))


def _nothing_left(dataset: Dataset, left_out: list[LeftOut], only_without_caption: bool) -> DatasetError:
    if left_out:
        return DatasetError(
            f"No picture of '{dataset.name}' can be read: {shortened(left_out)}.",
            "Save them again as PNG or JPEG.",
            "dataset",
        )
    if only_without_caption:
        return DatasetError(
            f"Every picture of '{dataset.name}' has a caption.",
            "Nothing is left to do. To get the pictures all the same, turn only_without_caption off.",
            "only_without_caption",
        )
    return DatasetError(f"'{dataset.name}' holds no picture.", "Connect another dataset.", "dataset")
