"""Clips: moving pictures in files, in folders of numbered frames, and from a node's input."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DatasetError
from ..text import is_below
from ..video import RANDOM, SUFFIXES, VideoFile, choose_pieces, count_at_rate, frames_at_rate
from .examples import Clip, Source
from .index import mark_of
from .listing import File, Listing, list_folder, stem_of
from .masks import MASK_FOLDERS
from .pictures import FileSource, are_facts, is_picture, measure_facts, measured, open_bytes, read_bytes, reading
from .pixel_formats import turn_upright, upright_rgb

if TYPE_CHECKING:
    from PIL import Image

    from ..video import Piece
    from .buckets import Crop
    from .examples import Example
    from .index import Index

# Formats that Pillow reads and that may hold several pictures.
ANIMATIONS = (".gif", ".webp", ".apng")
# Ending of the name that stands for a folder of frames among the files of a dataset.
FRAMES = ".frames"
_NUMBERED = re.compile(r"(.*?)(\d+)")
# Browsers show frames of at most 10 ms for this many ms.
_SLOWEST_SHOWN_MS, _UNTIMED_MS = 10, 100


class ClipSource(Source):
    """Moving picture. Its frames are decoded one by one when needed."""

    def open(self) -> Image.Image:
        """Return the first frame, upright, RGB. Raise DatasetError with the clip's name if it cannot be read."""
        return next(self.frames(0, 1))

    def frames(self, start: int, count: int, rate: float = 0.0) -> Iterator[Image.Image]:
        """Yield frames, upright, RGB. Raise as `open`.

        Args:
            start: number of the first frame at the frame rate.
            count: number of frames.
            rate: frames per second, 0 for all frames as the clip holds them.
        """
        with reading(self.name, "clip"):
            times = self._times()
            wanted = np.arange(start, start + count) if times is None else frames_at_rate(times, rate, start, count)
            yield from _pick(self._decoded(int(wanted[0])), wanted)

    def measure(self) -> tuple[int, float]:
        """Return the number of frames, and the time of the last one after the first in seconds; 0 if it has no times.

        Raises:
            DatasetError: as `open`.
        """
        with reading(self.name, "clip"):
            times = self._times()
            return len(times), float(times[-1])

    def _times(self) -> np.ndarray | None:
        """Return the times of the frames in seconds; None if they have none."""
        raise NotImplementedError

    def _decoded(self, first: int) -> Iterator[tuple[int, Image.Image]]:
        """Yield (index, frame) from a frame on."""
        raise NotImplementedError


def _pick(frames: Iterator[tuple[int, Image.Image]], wanted: Sequence[int]) -> Iterator[Image.Image]:
    """Yield the first frame at or after each wanted index, in ascending order."""
    place = 0
    for index, image in frames:
        while place < len(wanted) and wanted[place] <= index:
            yield image
            place += 1
        if place == len(wanted):
            return
    raise OSError(f"only {place} of the {len(wanted)} frames from frame {wanted[0]} on can be decoded")


class _FileClip(ClipSource):
    """Clip in a file.

    Args:
        path: of the file.
        name: for reports and errors.
        root: the folder that must contain the file, links resolved, at every opening.
        digest: hash of the content.
        mark: `index.mark_of` the file when its content was hashed; None to accept any.
    """

    def __init__(self, path: str, name: str, root: str, digest: str = "", mark: list[int] | None = None):
        self.path = path
        self.name = name
        self.root = root
        self.digest = digest
        self._mark = mark

    def _check(self) -> None:
        if not is_below(self.path, self.root):
            raise OSError("it is a link that leads out of the folder")
        # A video may have gigabytes, so do not hash it at each opening.
        if self._mark is not None and mark_of(os.stat(self.path)) != self._mark:
            raise OSError("it changed after Graft read the dataset; queue the graph again")


class VideoSource(_FileClip):
    """Video file."""

    _file: tuple[list[int], VideoFile] | None = None

    def _opened(self) -> VideoFile:
        self._check()
        mark = mark_of(os.stat(self.path))
        if self._file is None or self._file[0] != mark:
            self._file = mark, VideoFile(self.path)
        return self._file[1]

    def _times(self) -> np.ndarray:
        return self._opened().times

    def _decoded(self, first: int) -> Iterator[tuple[int, Image.Image]]:
        return self._opened().frames(first)


class AnimationSource(_FileClip):
    """Animated GIF, WebP or PNG."""

    def _image(self) -> Image.Image:
        self._check()
        return open_bytes(read_bytes(self.path))

    def _times(self) -> np.ndarray:
        image = self._image()
        shown = []
        for number in range(_first_of(image), image.n_frames):
            image.seek(number)
            image.load()
            duration = image.info.get("duration") or 0
            shown.append(duration if duration > _SLOWEST_SHOWN_MS else _UNTIMED_MS)
        return np.cumsum([0, *shown[:-1]]) / 1000.0

    def _decoded(self, first: int) -> Iterator[tuple[int, Image.Image]]:
        image = self._image()
        hidden = _first_of(image)
        for number in range(first, image.n_frames - hidden):
            image.seek(number + hidden)
            # Convert a copy: turning changes the picture in place.
            yield number, upright_rgb(turn_upright(image.copy()))


def _first_of(image: Image.Image) -> int:
    """Return the number of an animation's first frame: 1 after an APNG's picture for programs that show stills."""
    return int(bool(getattr(image, "default_image", False)))


class FramesSource(ClipSource):
    """Pictures in their order; they have no times, so a frame rate does not choose among them."""

    def __init__(self, pictures: Sequence[Source], name: str):
        self._pictures = pictures
        self.name = name
        self.digest = hashlib.sha256("".join(source.digest for source in pictures).encode()).hexdigest()

    def _times(self) -> None:
        return None

    def measure(self) -> tuple[int, float]:
        """Return the number of pictures, and 0."""
        return len(self._pictures), 0.0

    def _decoded(self, first: int) -> Iterator[tuple[int, Image.Image]]:
        return ((number, self._pictures[number].open()) for number in range(first, len(self._pictures)))


def is_clip(name: str) -> bool:
    """Return True if a name has the suffix of a video, or stands for a folder of frames."""
    return posixpath.splitext(name)[1].lower() in (*SUFFIXES, FRAMES)


def is_media(name: str) -> bool:
    """Return True if a name has the suffix of a picture or is a clip's."""
    return is_picture(name) or is_clip(name)


def with_pieces(
    example: Example, crops: Sequence[Crop], snap: Callable[[int], int] = lambda frames: frames, seed: int = 0
) -> tuple[tuple[Crop, ...], tuple[Piece, ...]]:
    """Return crops of an example with the pieces of its clip, and the pieces that take turns at random, if any.

    Args:
        snap: returns the largest number of frames, up to a number, that the codec takes.
        seed: for random pieces.
    """
    clip = example.clip
    if clip is None:
        return tuple(crops), ()
    pieces = choose_pieces(clip.count, clip.frames, clip.pieces, snap, f"{seed} {example.digest}")
    is_random = clip.pieces == RANDOM and len(pieces) > 1
    shown = pieces[:1] if is_random else pieces
    cut = tuple(replace(crop, piece=piece) for crop in crops for piece in shown)
    return cut, tuple(pieces) if is_random else ()


def hash_file(path: str) -> str:
    """Return the SHA-256 of a file of any size."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


@dataclass(frozen=True)
class ListedClip:
    """Clip of a folder.

    Attributes:
        facts: its size and transparency, as those of a picture.
    """

    source: ClipSource
    facts: dict
    length: Clip


class ClipFiles:
    """Clips of a folder: video files, animations, folders of frames.

    Args:
        frames, rate, pieces: as in `examples.Clip`; 0 frames for no clips.
    """

    def __init__(self, frames: int, rate: float, pieces: str, index: Index):
        self._frames, self._rate, self._pieces = frames, float(rate), pieces
        self._index = index
        self._folders: dict[str, list[File]] = {}

    def join_frames(self, listing: Listing, is_caption: Callable[[str], bool]) -> Listing:
        """Replace folders of frames by one name each: consecutively numbered pictures, a caption beside the folder.

        `walk/0001.png`, `walk/0002.png` and `walk.txt` become the clip `walk.frames`.
        """
        if not self._frames:
            return listing
        captioned = {stem_of(name) for name in listing.files if is_caption(name)}
        by_folder: dict[str, list[File]] = {}
        for name, file in listing.files.items():
            by_folder.setdefault(posixpath.dirname(name), []).append(file)
        files = dict(listing.files)
        for folder, members in by_folder.items():
            is_of_masks = posixpath.basename(folder).lower() in MASK_FOLDERS
            frames = _in_order(members) if folder in captioned and not is_of_masks else None
            if frames is not None:
                for frame in frames:
                    del files[frame.name]
                name = folder + FRAMES
                self._folders[name] = frames
                files[name] = File(posixpath.dirname(frames[0].path), name, frames[0].stat)
        return Listing(listing.root, files, listing.left_out)

    def of(self, file: File, root: str) -> ListedClip | None:
        """Return a file as a clip; None for a still. Raise DatasetError if it cannot be read."""
        if not self._frames:
            return None
        if file.name in self._folders:
            source, facts = self._frames_of(file.name, root)
        elif is_clip(file.name) or file.name.lower().endswith(ANIMATIONS):
            facts = self._index.get_or_make(file.path, file.stat, lambda: _measure(file, root), _are_facts)
            if facts["frames"] < 2 and not is_clip(file.name):
                return None
            kind = VideoSource if is_clip(file.name) else AnimationSource
            source = kind(file.path, file.name, root, facts["digest"], mark_of(file.stat))
        else:
            return None
        last = facts["last"]
        rate = self._rate if last else 0.0
        count = count_at_rate(last, facts["frames"], rate)
        shown = round((facts["frames"] - 1) / last, 3) if last else 0.0
        return ListedClip(source, facts, Clip(count, rate, self._frames, self._pieces, shown))

    def _frames_of(self, name: str, root: str) -> tuple[FramesSource, dict]:
        """Return a folder of frames, and its facts."""
        files = self._folders[name]
        rows = [measured(file, self._index) for file in files]
        sizes = {tuple(row["size"]) for row in rows}
        if len(sizes) > 1:
            raise DatasetError(f"its frames have {len(sizes)} sizes", "Save them again in one size.", "folder")
        frames = [FileSource(file.path, file.name, root, row["digest"]) for file, row in zip(files, rows, strict=True)]
        return FramesSource(frames, name), {"size": rows[0]["size"], "alpha": False, "frames": len(files), "last": 0.0}


def _measure(file: File, root: str) -> dict:
    """Return the facts about a video or an animation that an index keeps."""
    if not is_clip(file.name):
        facts = measure_facts(file)
        frames, last = AnimationSource(file.path, file.name, root).measure()
        return {**facts, "frames": frames, "last": last}
    source = VideoSource(file.path, file.name, root)
    frames, last = source.measure()
    size = list(source.open().size)
    with reading(file.name, "clip"):
        return {"size": size, "digest": hash_file(file.path), "alpha": False, "frames": frames, "last": last}


def _are_facts(facts: dict) -> bool:
    frames, last = facts.get("frames"), facts.get("last")
    return are_facts(facts) and type(frames) is int and frames > 0 and type(last) is float and last >= 0


def list_frames(folder: str) -> list[str]:
    """Return the paths of the frames in a folder, in order; none if it is no folder of frames."""
    listing = list_folder(folder)
    return [file.path for file in _in_order(list(listing.files.values())) or ()]


def _in_order(files: Sequence[File]) -> list[File] | None:
    """Return pictures by their numbers; None if a file is no picture, or the numbers have gaps or several stems."""
    numbers = {}
    for file in files:
        match = _NUMBERED.fullmatch(posixpath.basename(stem_of(file.name)))
        if match is None or not is_picture(file.name):
            return None
        numbers[match[1], int(match[2])] = file
    first = min((number for _, number in numbers), default=0)
    stems = {stem for stem, _ in numbers}
    if len(stems) != 1 or len(files) < 2 or len(numbers) != len(files):
        return None
    ordered = [numbers.get((min(stems), first + place)) for place in range(len(files))]
    return None if None in ordered else ordered


def check_frames(frames: int, rate: float) -> None:
    """Raise DatasetError if the numbers of the node's inputs are out of range."""
    if frames < 0:
        raise DatasetError(f"frames is {frames}.", "It must be 0 or more.", "frames")
    if not 0 <= rate <= 1000:
        raise DatasetError(f"frame_rate is {rate}.", "It must lie between 0 and 1000.", "frame_rate")
