"""Captions that a graph makes, written beside the pictures of a dataset's folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..data.captions import variants_of
from ..data.examples import Dataset, Example
from ..data.listing import fold, stem_of
from ..data.pictures import FileSource, is_picture
from ..errors import DatasetError
from ..formats import atomic
from ..text import counted
from .caption_edits import write_caption


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
    for example in dataset.examples:
        path = _caption_path(example)
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


def _caption_path(example: Example) -> str:
    source = example.source
    if not isinstance(source, FileSource) or example.prior:
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
    if _shares_stem(source.path):
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


def _shares_stem(path: str) -> bool:
    folder, own = os.path.split(path)
    names = (name for name in os.listdir(folder) if name != own and is_picture(name))
    return any(fold(stem_of(name)) == fold(stem_of(own)) for name in names)
