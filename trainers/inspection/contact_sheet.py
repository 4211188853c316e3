"""Contact sheet: a dataset's buckets, tags and cropped pictures in one image."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..data.pixel_formats import as_weight
from ..errors import DatasetError
from ..text import counted
from .report import bucket_name, common_tags

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    from ..data.examples import Example
    from .report import Finding, Findings

_CELL = 208
_COLUMNS = 6
_LIMIT = 60
_LINE = 15
_CAPTION_LINES = 2
# Below a picture: its name, its crops, its caption, its flags.
_TEXT = (3 + _CAPTION_LINES) * _LINE + 8
_LETTERS = 11
_BARS = 12
_INK = (235, 235, 235)
_FAINT = (150, 150, 155)
_GRAY = (40, 40, 44)
_BAR = (96, 150, 214)
_AMBER = (240, 176, 64)
_RED = (230, 40, 40)


def contact_sheet(findings: Findings) -> np.ndarray:
    """Draw a dataset's contact sheet, [H, W, 3] float32 in 0..1.

    The buckets and the tags are at the top with their numbers, the pictures below. Each picture is shown whole: dark
    outside its worst crop, red where a mask excludes it, and with its source or worse picture small in its corner.
    Pictures with flags come first and have an amber frame.
    """
    from PIL import Image, ImageDraw

    selected = chosen(findings)
    columns = max(3, min(_COLUMNS, len(selected)))
    rows = -(-len(selected) // columns)
    left, right = _bucket_bars(findings), _tag_bars(findings)
    head = (max(len(left[1]), len(right[1])) + 3) * _LINE + 16
    sheet = Image.new("RGB", (columns * _CELL, head + rows * (_CELL + _TEXT)), _GRAY)
    draw = ImageDraw.Draw(sheet)
    draw.font = letters()
    half = sheet.width // 2
    _draw_bars(draw, *left, 8, half - 16)
    _draw_bars(draw, *right, half + 8, half - 16)
    _draw_legend(draw, head - _LINE - 8, any(_beside(finding.example) for finding in selected))
    for index, finding in enumerate(selected):
        corner = (index % columns * _CELL, head + index // columns * (_CELL + _TEXT))
        _draw_cell(sheet, draw, finding, corner)
    return np.asarray(sheet, dtype=np.float32) / 255.0


def chosen(findings: Findings) -> list[Finding]:
    """Select the examples to draw: all if they fit, else the flagged ones first and an even choice of the rest."""
    rows = findings.rows
    if len(rows) <= _LIMIT:
        return sorted(rows, key=lambda row: (row.example.prior, not row.flags))
    flagged = sorted((row for row in rows if row.flags), key=lambda row: (-len(row.flags), row.kept))[: _LIMIT * 2 // 3]
    taken = {id(row) for row in flagged}
    rest = [row for row in rows if id(row) not in taken]
    wanted = _LIMIT - len(flagged)
    return flagged + [rest[place * len(rest) // wanted] for place in range(min(wanted, len(rest)))]


@functools.lru_cache(maxsize=4)
def letters(size: int = _LETTERS) -> ImageFont.ImageFont:
    """Load DejaVu, which comes with matplotlib and has letters for most alphabets; Pillow's own font if it is missing.

    Args:
        size: in pixels.
    """
    import matplotlib
    from PIL import ImageFont

    try:
        return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
    except (OSError, ImportError):
        return ImageFont.load_default()


def _bucket_bars(findings: Findings) -> tuple[str, list[tuple[str, int]]]:
    classes = sum(row.example.prior for row in findings.rows)
    title = f"{findings.dataset.name}: {counted(len(findings.rows) - classes, 'picture')}"
    title += f", {counted(len(findings.buckets), 'bucket')}"
    if classes:
        title += f", {counted(classes, 'class image')}"
    if findings.left_out:
        title += f", {len(findings.left_out)} left out"
    return title, [(bucket_name(size), number) for size, number in findings.buckets.most_common(_BARS)]


def _tag_bars(findings: Findings) -> tuple[str, list[tuple[str, int]]]:
    common = common_tags(findings, _BARS)
    return (counted(len(findings.tags), "tag") if common else "no tag occurs twice"), common


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, beside: bool) -> None:
    left = 8
    marks = [("dark: cropped", _FAINT), ("red: masked out", _RED), ("amber frame: check it", _AMBER)]
    if beside:
        marks.append(("blue corner: source or worse picture", _BAR))
    for text, color in marks:
        draw.text((left, top), text, fill=color)
        left += int(draw.textlength(text)) + 20


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
    picture = _whole(finding)
    left = corner[0] + (_CELL - picture.width) // 2
    top = corner[1] + (_CELL - picture.height) // 2
    sheet.paste(picture, (left, top))
    _draw_beside(sheet, draw, _beside(finding.example), corner)
    if finding.flags:
        frame = (corner[0] + 1, corner[1] + 1, corner[0] + _CELL - 2, corner[1] + _CELL + _TEXT - 3)
        draw.rectangle(frame, outline=_AMBER, width=2)
    width = _CELL - 12
    example = finding.example
    cuts = " ".join(dict.fromkeys(bucket_name(crop.shape) for crop in finding.crops)) + _length_of(example)
    repeats = f" x{example.repeats}" if example.repeats > 1 else ""
    loss = "" if finding.loss is None else f"  loss {finding.loss:.2f}"
    role = "  validation" if example.held_out else "  class image" if example.prior else ""
    caption = _wrapped(draw, finding.caption or "(no caption)", width, _CAPTION_LINES)
    # The end of a long name says more than the folder at its beginning.
    lines = [(_fitting(draw, example.source.name, width, keep_end=True), _INK)]
    lines.append((_fitting(draw, f"{cuts}{repeats}{role}{loss}", width), _FAINT))
    lines += [(line, _INK) for line in caption]
    lines.append((_fitting(draw, ", ".join(finding.flags), width), _AMBER))
    for number, (line, color) in enumerate(lines):
        draw.text((corner[0] + 6, corner[1] + _CELL + _LINE * number), line, fill=color)


def _beside(example: Example) -> list[Example]:
    return [*example.sources, *[example.paired] * (example.paired is not None)]


def _draw_beside(sheet: Image.Image, draw, pictures: Sequence[Example], corner: tuple[int, int]) -> None:
    """Paste pictures, whole and framed in blue, side by side into the lower left of their picture's cell."""
    from PIL import Image

    left, bottom = corner[0] + 4, corner[1] + _CELL - 4
    side = min(_CELL * 2 // 5, _CELL // max(1, len(pictures)) - 6)
    for picture in pictures:
        small = picture.source.open()
        small.thumbnail((side, side), Image.LANCZOS)
        sheet.paste(small, (left, bottom - small.height))
        draw.rectangle((left - 2, bottom - small.height - 2, left + small.width + 1, bottom + 1), outline=_BAR, width=2)
        left += small.width + 4


def _length_of(example: Example) -> str:
    clip = example.clip
    if clip is None:
        return ""
    return f" of {clip.count}" + (f", {clip.shown:.4g}/s" if clip.shown else "")


def _whole(finding: Finding) -> Image.Image:
    """Return the picture, scaled to a cell; of a clip the first, the middle and the last frame."""
    from PIL import Image

    example, side = finding.example, _CELL - 8
    if example.clip is None:
        return _overlaid(example.source.open(), finding, side / max(example.size))
    width, height = example.size
    across = height > width
    factor = min(side / max(width, height), (side - 4) / 3 / min(width, height))
    frames = [_overlaid(frame, finding, factor) for frame in _three_frames(example)]
    step = (frames[0].width + 2, 0) if across else (0, frames[0].height + 2)
    last = len(frames) - 1
    strip = Image.new("RGB", (frames[0].width + last * step[0], frames[0].height + last * step[1]), _GRAY)
    for number, frame in enumerate(frames):
        strip.paste(frame, (number * step[0], number * step[1]))
    return strip


def _three_frames(example: Example) -> list[Image.Image]:
    clip = example.clip
    frames = [example.source.open()]
    for place in dict.fromkeys((clip.count // 2, clip.count - 1)):
        with contextlib.suppress(DatasetError):
            frames += example.source.frames(place, 1, clip.rate) if place else ()
    return frames


def _overlaid(picture: Image.Image, finding: Finding, factor: float) -> Image.Image:
    from PIL import Image, ImageDraw

    crop = min(finding.crops, key=lambda candidate: candidate.kept)
    size = tuple(max(1, round(side * factor)) for side in picture.size)
    picture = picture.resize(size, Image.LANCZOS if factor < 1 else Image.NEAREST)
    if finding.example.mask is not None:
        mask = as_weight(finding.example.mask.open()).resize(size, Image.BILINEAR)
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


def _printable(draw: ImageDraw.ImageDraw, text: str) -> str:
    """Return the text in one line, with only what the font can draw; file names may hold anything."""
    from PIL import ImageFont

    kind = "utf-8" if isinstance(draw.font, ImageFont.FreeTypeFont) else "latin-1"
    return " ".join(text.encode(kind, "replace").decode(kind).split())


def _fitting(draw: ImageDraw.ImageDraw, line: str, width: int, keep_end: bool = False) -> str:
    line = _printable(draw, line)
    line = line[-400:] if keep_end else line[:400]
    if draw.textlength(line) <= width:
        return line
    while line and draw.textlength(f"...{line}") > width:
        line = line[1:] if keep_end else line[:-1]
    return f"...{line}" if keep_end else f"{line}..."


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int, most: int) -> list[str]:
    words = _printable(draw, text[:1000]).split()
    lines: list[str] = []
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and draw.textlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_fitting(draw, " ".join(words[:count]), width))
        words = words[count:]
    if words:
        lines.append(_fitting(draw, " ".join(words), width))
    return lines
