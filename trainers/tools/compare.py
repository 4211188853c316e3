"""A labeled grid of images: one row per prompt, one column per adapter setting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..inspection.contact_sheet import letters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image, ImageDraw

_GAP = 4
_BACK = (40, 40, 44)
_INK = (235, 235, 235)
# The font size is this fraction of an image's width, so that labels stay readable when the grid is scaled down.
_LETTERS = 24
_LEAST = 11
_SIDE = 0.5  # width of the prompt column, relative to an image's width
_LINES = 4


def grid(rows: Sequence[str], columns: Sequence[str], pictures: Sequence[Sequence[Image.Image]]) -> np.ndarray:
    """Draw the grid as [H, W, 3] float32 in 0..1.

    Args:
        pictures: images by row and column, all of one size.
    """
    from PIL import Image, ImageDraw

    width, height = pictures[0][0].size
    font = letters(max(_LEAST, width // _LETTERS))
    line = round(font.size * 1.3)
    left = max(8 * font.size, round(width * _SIDE)) + 2 * _GAP
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    heads = [_wrapped(pen, label, width, font) for label in columns]
    head = max(len(lines) for lines in heads) * line + 2 * _GAP
    sheet = Image.new("RGB", (left + len(columns) * (width + _GAP), head + len(rows) * (height + _GAP)), _BACK)
    pen = ImageDraw.Draw(sheet)
    for place, lines in enumerate(heads):
        _write(pen, lines, (left + place * (width + _GAP), _GAP), line, font)
    for number, (label, row) in enumerate(zip(rows, pictures, strict=True)):
        top = head + number * (height + _GAP)
        lines = _wrapped(pen, label, left - 2 * _GAP, font, max(1, height // line))
        _write(pen, lines, (_GAP, top), line, font)
        for place, picture in enumerate(row):
            sheet.paste(picture, (left + place * (width + _GAP), top))
    return np.asarray(sheet, dtype=np.float32) / 255.0


def _write(pen: ImageDraw.ImageDraw, lines: list[str], corner: tuple[int, int], line: int, font) -> None:
    for number, text in enumerate(lines):
        pen.text((corner[0], corner[1] + number * line), text, fill=_INK, font=font)


def _wrapped(pen: ImageDraw.ImageDraw, text: str, width: int, font, most: int = _LINES) -> list[str]:
    """Wrap a text into at most `most` lines of `width` pixels. "..." marks a shortened text."""
    lines = [""]
    for word in text.split():
        for part in _cut(pen, word, width, font):
            longer = f"{lines[-1]} {part}".strip()
            if pen.textlength(longer, font=font) <= width:
                lines[-1] = longer
            else:
                lines.append(part)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    return lines


def _cut(pen: ImageDraw.ImageDraw, word: str, width: int, font) -> list[str]:
    parts = [""]
    for letter in word:
        if parts[-1] and pen.textlength(parts[-1] + letter, font=font) > width:
            parts.append("")
        parts[-1] += letter
    return parts
