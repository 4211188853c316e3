"""Small copies of a dataset's pictures, made once and kept in the cache."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING

from ..data.clips import ClipSource, VideoSource
from ..data.index import mark_of
from ..data.pictures import FileSource
from ..formats.atomic import refuse_links, write_bytes
from ..video.pieces import count_at_rate

if TYPE_CHECKING:
    from PIL import Image

SIDE = 256
# The most frames of a moving thumbnail, and those of a second.
_FRAMES, _RATE = 24, 8


def thumbnail(source: FileSource | VideoSource, cache: str) -> bytes:
    """Return a picture, or a clip's first frame, as WebP of at most SIDE pixels a side; from the cache if it is there.

    Args:
        cache: folder of all caches; its folder "thumbnails" may be removed at any time.

    Raises:
        DatasetError: the picture cannot be read.
    """
    state = f"{os.path.realpath(source.path)!r} {mark_of(os.stat(source.path))}"
    key = hashlib.sha256(state.encode("utf-8", "surrogateescape")).hexdigest()
    path = os.path.join(cache, "thumbnails", key[:2], f"{key[2:34]}.webp")
    refuse_links(cache, path)
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        content = draw_thumbnail(source)
    write_bytes(path, content)
    return content


def draw_thumbnail(source: FileSource | VideoSource) -> bytes:
    """Return a picture as WebP, at most SIDE pixels a side. Raise DatasetError if it cannot be read."""
    return _encoded(_small(source.open()), "WEBP", quality=80)


def moving_thumbnail(source: ClipSource) -> bytes:
    """Return the first seconds of a clip as animated WebP, at most SIDE pixels a side. Raise as `draw_thumbnail`."""
    count, last = source.measure()
    rate = _RATE if last else 0
    shown = min(_FRAMES, count_at_rate(last, count, rate))
    first, *others = [_small(frame) for frame in source.frames(0, shown, rate)]
    moving = {"save_all": True, "append_images": others, "duration": 1000 // _RATE, "loop": 0}
    return _encoded(first, "WEBP", quality=80, **moving)


def _small(image: Image.Image) -> Image.Image:
    from PIL import Image

    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image


def full_picture(source: FileSource | VideoSource) -> bytes:
    """Return a picture as JPEG at its full size. Raise DatasetError if it cannot be read."""
    return _encoded(source.open(), "JPEG", quality=92)


def _encoded(image, format: str, **saving) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **saving)
    return buffer.getvalue()
