"""Numbers of pictures with each tag, as kohya's sd-scripts write them to a file's metadata."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .examples import Dataset


def count_tags(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Return {dataset's name: {tag: captions with it}} of the trained pictures. Commas separate tags."""
    tags: Counter[str] = Counter()
    for example in dataset.examples:
        if not example.prior and not example.held_out:
            for caption in example.captions:
                parts = (part.strip().lower() for part in f"{example.trigger},{caption}".split(","))
                tags.update(part for part in parts if part)
    return {dataset.name: dict(tags)}
