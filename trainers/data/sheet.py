"""A dataset at a glance: the pictures as they will be cropped, and a report of what to look after."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .buckets import choose_crop
from .pixels import cut

if TYPE_CHECKING:
    from PIL import Image

    from ..protocols import Geometry
    from .examples import Dataset

_CHUNK = 75
_CELL = 192
_COLUMNS = 6
_LIMIT = 60
_TEXT = 34
_INK = (235, 235, 235)
_GREY = (40, 40, 44)


def contact_sheet(dataset: Dataset, geometry: Geometry) -> np.ndarray:
    """The first pictures of a dataset as they will be cropped, with bucket and caption: [H, W, 3] float32 in 0..1."""
    from PIL import Image

    shown = dataset.examples[:_LIMIT]
    columns = min(_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * _CELL, rows * (_CELL + _TEXT)), _GREY)
    for index, example in enumerate(shown):
        crop = choose_crop(example.size, geometry, example.source.name)
        picture = cut(example.source.open(), crop)
        corner = (index % columns * _CELL, index // columns * (_CELL + _TEXT))
        lines = [
            f"{crop.bucket[0]}x{crop.bucket[1]}  {example.source.name}",
            dataset.caption(example) or "(no caption)",
        ]
        _paste(sheet, picture, corner, lines)
    return np.asarray(sheet, dtype=np.float32) / 255.0


def _paste(sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], lines: list[str]) -> None:
    from PIL import Image, ImageDraw

    factor = (_CELL - 4) / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize(size, Image.LANCZOS if factor < 1 else Image.NEAREST)
    left = corner[0] + (_CELL - size[0]) // 2
    top = corner[1] + (_CELL - size[1]) // 2
    sheet.paste(picture, (left, top))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        draw.text((corner[0] + 4, corner[1] + _CELL + 2 + 15 * number), _fitting(draw, line), fill=_INK)


def _fitting(draw, line: str) -> str:
    """The longest beginning of a line that fits a cell."""
    line = line.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(line) <= _CELL - 8:
        return line
    while line and draw.textlength(line + "...") > _CELL - 8:
        line = line[:-1]
    return line + "..."


def report(dataset: Dataset, geometry: Geometry, count_tokens: Callable[[str], int] | None) -> str:
    """What a dataset holds, and what may go wrong with it, in plain lines.

    Args:
        count_tokens: tokens of a caption; None when no text encoder is connected.
    """
    examples = dataset.examples
    crops = [choose_crop(example.size, geometry, example.source.name) for example in examples]
    repeats = sum(example.repeats for example in examples)
    lines = [
        f"Dataset '{dataset.name}': {len(examples)} pictures, {repeats} in an epoch.",
        f"Resolution {geometry.resolution}, buckets in steps of {geometry.step} pixels.",
    ]
    for bucket, number in sorted(Counter(crop.bucket for crop in crops).items()):
        lines.append(f"bucket {bucket[0]}x{bucket[1]}: {number}")
    lines.append(f"Trigger: {dataset.trigger or 'none'}")
    lines += _named("without a caption file or text", [e for e in examples if not e.caption])
    lines += _named(
        "with neither caption nor trigger (training will refuse)", [e for e in examples if not dataset.caption(e)]
    )
    lines += _named(
        "smaller than their bucket's usual size",
        [
            e
            for e, crop in zip(examples, crops, strict=True)
            if crop.bucket[0] * crop.bucket[1] < 0.6 * geometry.resolution**2
        ],
    )
    lines += _named(
        "cropped by more than a fifth", [e for e, crop in zip(examples, crops, strict=True) if crop.kept < 0.8]
    )
    lines += _token_lines(dataset, count_tokens)
    # As a list, since a node that shows text may take it for Markdown and join the lines.
    return "\n".join(f"- {line}" for line in lines)


def _token_lines(dataset: Dataset, count_tokens: Callable[[str], int] | None) -> list[str]:
    if count_tokens is None:
        return ["Captions' tokens: connect clip to count them."]
    counts = {example: count_tokens(dataset.caption(example)) for example in dataset.examples}
    long = [example for example, count in counts.items() if count > _CHUNK]
    lines = [f"Longest caption: {max(counts.values())} tokens."]
    return lines + _named(f"with a caption beyond {_CHUNK} tokens (encoded in parts, none is cut)", long)


def _named(what: str, examples: list) -> list[str]:
    if not examples:
        return []
    names = ", ".join(example.source.name for example in examples[:8])
    return [f"{len(examples)} {what}: {names}{' ...' if len(examples) > 8 else ''}"]
