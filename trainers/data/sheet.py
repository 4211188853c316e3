"""A dataset at a glance: one picture with its buckets, its tags, and its pictures as they will be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

    from .buckets import Crop
    from .inspect import Finding, Findings

_CELL = 192
_COLUMNS = 6
_LIMIT = 60
_TEXT = 49
_LINE = 15
_BARS = 12
_INK = (235, 235, 235)
_FAINT = (150, 150, 155)
_GREY = (40, 40, 44)
_BAR = (96, 150, 214)
_AMBER = (240, 176, 64)
_RED = (230, 40, 40)


def contact_sheet(findings: Findings) -> np.ndarray:
    """[H, W, 3] float32 in 0..1: above the buckets and the tags with their numbers, below the pictures.

    A picture is shown whole, what is cut away dark, what a mask excludes red; those with something to look after come
    first and are framed in amber.
    """
    from PIL import Image, ImageDraw

    shown = chosen(findings)
    columns = max(3, min(_COLUMNS, len(shown)))
    rows = -(-len(shown) // columns)
    head = _head_height(findings)
    sheet = Image.new("RGB", (columns * _CELL, head + rows * (_CELL + _TEXT)), _GREY)
    draw = ImageDraw.Draw(sheet)
    _draw_head(draw, findings, sheet.width)
    for index, finding in enumerate(shown):
        corner = (index % columns * _CELL, head + index // columns * (_CELL + _TEXT))
        _draw_cell(sheet, draw, finding, corner)
    return np.asarray(sheet, dtype=np.float32) / 255.0


def chosen(findings: Findings) -> list[Finding]:
    """The examples that are drawn: all if they fit, else the flagged ones first and an even choice of the rest."""
    rows = findings.rows
    if len(rows) <= _LIMIT:
        return sorted(rows, key=lambda row: (row.example.prior, not row.flags))
    flagged = sorted((row for row in rows if row.flags), key=lambda row: (-len(row.flags), row.kept))[: _LIMIT * 2 // 3]
    taken = {id(row) for row in flagged}
    rest = [row for row in rows if id(row) not in taken]
    wanted = _LIMIT - len(flagged)
    return flagged + [rest[place * len(rest) // wanted] for place in range(min(wanted, len(rest)))]


def _head_height(findings: Findings) -> int:
    return (min(_BARS, max(len(findings.buckets), len(findings.tags), 1)) + 2) * _LINE + 12


def _draw_head(draw: ImageDraw.ImageDraw, findings: Findings, width: int) -> None:
    half = width // 2
    buckets = [(f"{size[0]}x{size[1]}", number) for size, number in findings.buckets.most_common(_BARS)]
    classes = sum(row.example.prior for row in findings.rows)
    title = f"{findings.dataset.name}: {len(findings.rows) - classes} pictures, {len(findings.buckets)} buckets"
    if classes:
        title += f", {classes} class images"
    if findings.left_out:
        title += f", {len(findings.left_out)} left out"
    _draw_bars(draw, title, buckets, 8, half - 16)
    _draw_bars(draw, f"{len(findings.tags)} tags", findings.tags.most_common(_BARS), half + 8, half - 16)


def _draw_bars(draw, title: str, rows: list[tuple[str, int]], left: int, width: int) -> None:
    draw.text((left, 6), _fitting(draw, title, width), fill=_INK)
    most = max((number for _, number in rows), default=1)
    label = width * 2 // 5
    for place, (name, number) in enumerate(rows):
        top = 6 + (place + 1) * _LINE + 4
        draw.text((left, top), _fitting(draw, name, label - 8), fill=_INK)
        length = max(1, (width - label - 40) * number // most)
        draw.rectangle((left + label, top + 3, left + label + length, top + 11), fill=_BAR)
        draw.text((left + label + length + 5, top), str(number), fill=_FAINT)


def _draw_cell(sheet: Image.Image, draw, finding: Finding, corner: tuple[int, int]) -> None:
    crop = finding.crops[0]
    picture = _overlaid(finding, crop)
    left = corner[0] + (_CELL - picture.width) // 2
    top = corner[1] + (_CELL - picture.height) // 2
    sheet.paste(picture, (left, top))
    if finding.flags:
        frame = (corner[0] + 1, corner[1] + 1, corner[0] + _CELL - 2, corner[1] + _CELL + _TEXT - 3)
        draw.rectangle(frame, outline=_AMBER)
    sizes = " ".join(f"{one.bucket[0]}x{one.bucket[1]}" for one in finding.crops)
    example = finding.example
    repeats = f" x{example.repeats}" if example.repeats > 1 else ""
    held = "validation " if example.held_out else "class image " if example.prior else ""
    lines = [
        (f"{sizes}{repeats}  {held}{example.source.name}", _INK),
        (finding.caption or "(no caption)", _FAINT),
        (", ".join(finding.flags), _AMBER),
    ]
    for number, (line, colour) in enumerate(lines):
        place = (corner[0] + 5, corner[1] + _CELL + _LINE * number)
        draw.text(place, _fitting(draw, line, _CELL - 10), fill=colour)


def _overlaid(finding: Finding, crop: Crop) -> Image.Image:
    """The whole picture within a cell, dark where it is cut away, red where its mask excludes it."""
    from PIL import Image, ImageDraw

    picture = finding.example.source.open()
    factor = (_CELL - 8) / max(picture.size)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize(size, Image.LANCZOS if factor < 1 else Image.NEAREST)
    if finding.example.mask is not None:
        mask = finding.example.mask.open().convert("L").resize(size, Image.BILINEAR)
        excluded = mask.point(lambda value: (255 - value) * 3 // 5)
        picture = Image.composite(Image.new("RGB", size, _RED), picture, excluded)
    x = size[0] / crop.scaled[0]
    y = size[1] / crop.scaled[1]
    box = (
        round(crop.offset[0] * x),
        round(crop.offset[1] * y),
        max(1, round((crop.offset[0] + crop.bucket[0]) * x)),
        max(1, round((crop.offset[1] + crop.bucket[1]) * y)),
    )
    dark = picture.point(lambda value: value // 3)
    dark.paste(picture.crop(box), box[:2])
    if box != (0, 0, *size):
        ImageDraw.Draw(dark).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_INK)
    return dark


def _fitting(draw, line: str, width: int) -> str:
    """The longest beginning of a line that fits a width."""
    line = line.encode("latin-1", "replace").decode("latin-1")[:400]
    if draw.textlength(line) <= width:
        return line
    while line and draw.textlength(line + "...") > width:
        line = line[:-1]
    return line + "..."
