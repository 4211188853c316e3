"""Pictures, captions and masks that a graph makes, written one by one into a dataset's folder."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.arrays import fit_mask
from ..data.listing import stem_of
from ..data.masks import SUFFIX
from ..data.pictures import is_picture, pixel_digest, reading
from ..errors import DatasetError
from ..formats import atomic
from ..text import counted, join_first

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

EXISTING = ("keep", "replace", "add")

# Key of a PNG's text with the hash of its pixels, which tells at once whether a file holds a picture.
_PIXELS = "graft_pixels"
_NUMBER = re.compile("[0-9]{1,9}")
# Content of a picture's caption and mask, by the ending of the file's name; None for no file.
_Beside = dict[str, Callable[[], bytes] | None]


@dataclass(frozen=True)
class Saved:
    """Result of saving.

    Attributes:
        written: number of pictures of which at least one file was written.
        kept: number of the others.
        differing: names of kept files that hold another picture than the one that arrived.
    """

    written: int
    kept: int
    differing: tuple[str, ...]

    def warnings(self) -> tuple[str, ...]:
        """Return a warning about kept files that hold other pictures."""
        if not self.differing:
            return ()
        return (
            f"Graft Save Dataset kept {counted(len(self.differing), 'file')} although another picture arrived: "
            f"{join_first(self.differing, 5)}. Set existing to replace to write them again, or to add to keep both.",
        )


def save_pictures(
    folder: str,
    pictures: Iterable[np.ndarray],
    texts: Sequence[str],
    masks: Iterable[np.ndarray | None],
    existing: str = EXISTING[0],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Saved:
    """Write pictures as 00001.png and so on, with 00001.txt and 00001-masklabel.png beside them.

    A picture's file appears after its caption and its mask, so that an interrupted picture is written again as a whole.
    No file is removed. If all texts are empty, caption files stay as they are.

    Args:
        folder: absolute path; it need not exist.
        pictures: each [H, W, 3] or [H, W, 4] uint8, read one by one.
        texts: a caption for each picture, or an empty text.
        masks: a mask [H, W] uint8 for each picture, or None; each is stretched to its picture.
        existing: one of EXISTING, for a picture whose number is taken. "keep": leave the file, and add a missing
            caption or mask if it holds the same pixels. "replace": write the files again. "add": give the picture the
            next free number, unless a file of the folder holds the same pixels. Only "replace" replaces a caption or
            mask without a picture.
        tick: called with (done, total) pictures; may raise to interrupt.

    Raises:
        DatasetError: with "replace", a picture of another format has the number's name.
        RunError: a file cannot be written. The pictures before it are complete.
    """
    numbered = _NumberedFiles(folder, existing)
    captioned = any(texts)
    written = 0
    differing = []
    for number, (array, text, mask) in enumerate(zip(pictures, texts, masks, strict=True), 1):
        tick(number - 1, len(texts))
        changed, other = numbered.save(number, array, text if captioned else None, mask)
        written += changed
        differing += [other] if other else []
    tick(len(texts), len(texts))
    return Saved(written, len(texts) - written, tuple(differing))


class _NumberedFiles:
    def __init__(self, folder: str, existing: str):
        atomic.sweep(folder)
        self._folder = folder
        self._existing = existing
        names = os.listdir(folder) if os.path.isdir(folder) else []
        # Sort .png last, so that it counts if pictures of several formats have the same name.
        names = sorted(filter(is_picture, names), key=lambda name: name.endswith(".png"))
        self._by_stem = {stem_of(name): name for name in names}
        self._by_pixels: dict[str, str] = {}
        if existing == "add":
            self._by_pixels = {self._pixels_of(name): stem for stem, name in self._by_stem.items()}
        self._last = max((int(stem) for stem in self._by_stem if _NUMBER.fullmatch(stem)), default=0)

    def save(self, number: int, array: np.ndarray, text: str | None, mask: np.ndarray | None) -> tuple[bool, str]:
        """Write the wanted files of a picture.

        Returns:
            whether one was written, and the name of a kept file that is of another picture; empty if there is none.
        """
        from PIL import Image

        if array.shape[-1] == 4 and array[..., 3].min() == 255:
            array = array[..., :3]
        pixels = pixel_digest(array)
        beside: _Beside = {
            ".txt": text.encode if text else None,
            f"{SUFFIX}.png": None if mask is None else lambda: _png(fit_mask(mask, array.shape[:2])),
        }
        stem = self._stem(number, pixels, beside)
        present = self._by_stem.get(stem)
        keeps = present is not None and self._existing != "replace"
        if keeps and self._pixels_of(present) != pixels:
            return False, present
        if not keeps:
            self._refuse_other_format(stem, present)
        replaces = self._existing == "replace"
        strangers = [] if present is not None or replaces else self._strangers(stem, beside)
        # An empty caption has a use only in place of another picture's.
        if replaces and text == "" and os.path.lexists(os.path.join(self._folder, f"{stem}.txt")):
            beside[".txt"] = text.encode
        written = False
        for ending, encode in beside.items():
            if encode is not None:
                written |= self._write(f"{stem}{ending}", not replaces, encode)
        if not keeps:
            written |= self._write(f"{stem}.png", False, lambda: _png(Image.fromarray(array), pixels))
            self._by_stem[stem] = f"{stem}.png"
            self._by_pixels[pixels] = stem
        return written, next(iter(strangers), "")

    def _strangers(self, stem: str, beside: _Beside) -> list[str]:
        """Return the captions and masks of a name without a picture that an interrupted save has not written."""
        names = []
        for ending, encode in beside.items():
            path = os.path.join(self._folder, f"{stem}{ending}")
            if os.path.lexists(path) and (encode is None or not _holds(path, encode())):
                names.append(f"{stem}{ending}")
        return names

    def _stem(self, number: int, pixels: str, beside: _Beside) -> str:
        if self._existing != "add":
            return f"{number:05}"
        if pixels in self._by_pixels:
            return self._by_pixels[pixels]
        self._last += 1
        while self._strangers(f"{self._last:05}", beside):
            self._last += 1
        return f"{self._last:05}"

    def _write(self, name: str, keeps: bool, encode: Callable[[], bytes]) -> bool:
        path = os.path.join(self._folder, name)
        return not (keeps and os.path.lexists(path)) and atomic.write_bytes(path, encode())

    def _pixels_of(self, name: str) -> str:
        """Return the hash of the pixels that this module wrote to a file; empty if another program wrote it."""
        from PIL import Image

        path = os.path.join(self._folder, name)
        try:
            with reading(name), Image.open(path) as image:
                return str(image.info.get(_PIXELS, ""))
        except DatasetError:
            return ""

    def _refuse_other_format(self, stem: str, present: str | None) -> None:
        if present not in (None, f"{stem}.png"):
            raise DatasetError(
                f"The folder holds '{present}', with which '{stem}.png' would share its caption.",
                "Choose another folder, or set existing to add.",
                "folder",
            )


def _holds(path: str, content: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(content) + 1) == content
    except OSError:
        return False


def _png(image: Image.Image, pixels: str = "") -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if pixels:
        info.add_text(_PIXELS, pixels)
    with io.BytesIO() as file:
        image.save(file, format="PNG", pnginfo=info)
        return file.getvalue()
