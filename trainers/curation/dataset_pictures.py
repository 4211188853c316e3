"""Pictures of a dataset, decoded for a graph's other nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.examples import Dataset, LeftOut, reason_of, shortened
from ..errors import DatasetError

if TYPE_CHECKING:
    import numpy as np


def decode_pictures(
    dataset: Dataset,
    only_without_caption: bool = False,
    most: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[np.ndarray], Dataset]:
    """Decode pictures of a dataset, and return them with the dataset that holds just these, in the same order.

    Class images are left out, and so is a picture that cannot be decoded: the dataset lists it among its `left_out`.

    Args:
        only_without_caption: leave out pictures with a caption.
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
