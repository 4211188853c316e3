"""What a dataset is: pictures by reference, captions, repeats; no pixels are held."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Example:
    """One picture and its caption.

    Attributes:
        source: where the pixels come from; `.name`, `.open()` -> PIL RGB upright.
        caption: literal text, without the trigger.
        size: (width, height) upright, pixels.
        digest: hash of the picture's content.
        repeats: how often it is shown in an epoch.
        mask: None, or a source whose picture is the loss weight (white counts, black does not).
    """

    source: Source
    caption: str
    size: tuple[int, int]
    digest: str
    repeats: int = 1
    mask: Source | None = None


class Source:
    """Where a picture comes from."""

    name: str

    def open(self) -> Image.Image:
        """The picture, upright, RGB."""
        raise NotImplementedError


@dataclass(frozen=True)
class Dataset:
    """Examples and how to show them.

    Attributes:
        examples: in a stable order.
        trigger: word put in front of every caption that does not hold it; empty for none.
        resolution: side of the training square in pixels, 0 for the model's own.
        name: for file names and reports.
    """

    examples: tuple[Example, ...]
    trigger: str
    resolution: int
    name: str

    def caption(self, example: Example) -> str:
        """The caption as it is trained on: with the trigger."""
        return with_trigger(example.caption, self.trigger)

    def fingerprint(self) -> str:
        """Hash of everything here that decides what is learnt."""
        rows = []
        for example in self.examples:
            mask = example.mask.name if example.mask else ""
            rows.append([example.digest, self.caption(example), example.repeats, mask])
        text = json.dumps([rows, self.resolution])
        return hashlib.sha256(text.encode()).hexdigest()


def with_trigger(caption: str, trigger: str) -> str:
    """Puts the trigger in front unless the caption holds it; `[trigger]` is replaced by it."""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger).strip()
    if not trigger or _holds_words(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def _holds_words(caption: str, words: str) -> bool:
    import re

    pattern = r"(?<!\w)" + re.escape(words) + r"(?!\w)"
    return re.search(pattern, caption, re.IGNORECASE) is not None


def combine(a: Dataset, b: Dataset) -> Dataset:
    """Both datasets as one; each example keeps its own trigger.

    Raises:
        DatasetError: when both name a resolution and the two differ.
    """
    if a.resolution and b.resolution and a.resolution != b.resolution:
        raise DatasetError(
            f"The datasets '{a.name}' and '{b.name}' want different resolutions, {a.resolution} and {b.resolution}.",
            "Give both the same resolution, or 0.",
            "dataset_b",
        )
    examples = _with_written_trigger(a) + _with_written_trigger(b)
    return Dataset(examples, "", a.resolution or b.resolution, f"{a.name}+{b.name}")


def _with_written_trigger(dataset: Dataset) -> tuple[Example, ...]:
    from dataclasses import replace

    return tuple(replace(example, caption=dataset.caption(example)) for example in dataset.examples)
