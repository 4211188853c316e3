"""Contents of the page of a dataset: a row for each picture, with what training will see of it, and small copies."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..data.buckets import Crop, geometry_without_model
from ..data.captions import is_caption_file
from ..data.clips import ClipFiles, ClipSource, VideoSource
from ..data.dataset_file import DatasetFile, read_dataset_file
from ..data.examples import Augmentation, Dataset, Example, LeftOut, reason_of
from ..data.index import Index, is_settled, listing_fingerprint, mark_of
from ..data.listing import Listing, list_folder
from ..data.masks import Masks
from ..data.pictures import FileSource
from ..data.scan import ScanOptions, scan_listing
from ..errors import DatasetError
from ..formats.atomic import refuse_links, write_bytes
from ..inspection.near_duplicates import find_near_duplicates, signatures
from ..inspection.report import Finding, inspect_example, lacks_trigger
from ..video import count_at_rate
from .caption_edits import Caption, CaptionReader
from .folder import list_pictures, measure_source, source_of

if TYPE_CHECKING:
    from PIL import Image

NO_CAPTION = Caption("", "none", "")
SIDE = 256  # of a thumbnail, pixels
# The most frames of a moving thumbnail, and those of a second.
_FRAMES, _RATE = 24, 8
_MOST_KEPT = 4
# (state of the files, page) by folder and settings: those read last. The page of 10,000 pictures takes 10 MB.
_kept: dict[tuple, tuple[str, DatasetPage]] = {}
_keeping = threading.Lock()


@dataclass(frozen=True)
class PictureRow:
    """One picture of a dataset.

    Attributes:
        name: relative to the folder, with forward slashes.
        mark: changes with the picture or its mask.
        size: (width, height), pixels; None if unknown.
        caption: text to edit.
        origin: "file", "table", "none" as of `Caption`, or "folder" for the folder's name.
        file: name of the text file that an edit writes.
        bucket: (width, height) of the crop that loses most, pixels; None if it cannot be cropped.
        crop: (left, top, width, height) of that crop, in fractions of the picture.
        center: point that the user wants it centered on, in fractions of width and height; None for the middle.
        repeats: visits in an epoch, by its folder.
        flags: things to look at, in a few words each.
        problem: reason why it cannot be trained on; empty if it can.
        frames: number of frames of a clip, 0 for a still.
        frame_rate: frames per second of its file, 0 if unknown.
    """

    name: str
    mark: str = ""
    size: tuple[int, int] | None = None
    caption: str = ""
    origin: str = "none"
    file: str = ""
    bucket: tuple[int, int] | None = None
    crop: tuple[float, float, float, float] | None = None
    center: tuple[float, float] | None = None
    repeats: int = 1
    mask: bool = False
    held_out: bool = False
    excluded: bool = False
    flags: tuple[str, ...] = ()
    problem: str = ""
    frames: int = 0
    frame_rate: float = 0.0


@dataclass(frozen=True)
class DatasetPage:
    """Contents of a dataset's page.

    Attributes:
        resolution: side of the training square that buckets and crops are for, pixels.
        pictures: in the scan's order, also those that cannot be trained on.
        left_out: other files that are not used.
        folders: visits in an epoch of each picture in a folder, by the folder's name; "" is the dataset's own.
        chosen: names of the folders whose number the user has set.
        warnings: sentences about content that is used but may not be intended.
    """

    name: str
    resolution: int
    pictures: tuple[PictureRow, ...]
    left_out: tuple[LeftOut, ...]
    folders: dict[str, int]
    chosen: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PageOptions:
    """Settings of the node that names the folder.

    Attributes:
        trigger, resolution, reading: as in `scan_folder`.
    """

    trigger: str = ""
    resolution: int = 0
    upscale: bool = False
    reading: ScanOptions = ScanOptions()


def read_page(
    folder: str, options: PageOptions, count_tokens: Callable[[str], int] | None, index_folder: str | None
) -> DatasetPage:
    """Read a folder as a page shows it, without decoding its pictures.

    Args:
        folder: absolute path.
        count_tokens: returns the number of tokens of a caption; None to count none.
        index_folder: as in `scan_folder`.

    Raises:
        DatasetError: as `scan_folder`.
    """
    listing = list_folder(folder)
    key = (folder, options, count_tokens)
    state = _state_of(listing, options)
    known, page = _kept.get(key, ("", None))
    if page is None or not state or known != state:
        page = _read(folder, listing, options, count_tokens, index_folder)
    with _keeping:
        # The last one in the order is the one that was read last.
        _kept.pop(key, None)
        if state:
            _kept[key] = (state, page)
        while len(_kept) > _MOST_KEPT:
            del _kept[next(iter(_kept))]
    return page


def _state_of(listing: Listing, options: PageOptions) -> str:
    """Return a hash that changes with any file that a page depends on; empty if a file was changed just now."""
    reading = options.reading
    controls = reading.control_folder, *reading.more_control_folders
    others = {reading.mask_folder, *controls, reading.worse_folder} - {""}
    listings = [listing, *map(list_folder, sorted(others))]
    is_quiet = all(is_settled(file.stat) for folder in listings for file in folder.files.values())
    return listing_fingerprint(listings) if is_quiet else ""


def _read(
    folder: str,
    listing: Listing,
    options: PageOptions,
    count_tokens: Callable[[str], int] | None,
    index_folder: str | None,
) -> DatasetPage:
    with Index(index_folder, folder) as index:
        dataset = _scan(folder, listing, index, options)
        geometry = geometry_without_model(options.resolution)
        reading = options.reading
        clips = ClipFiles(reading.frames, reading.frame_rate, reading.pieces, index)
        listing = clips.join_frames(listing, is_caption_file)
        rows = _Rows(listing, index, count_tokens, {0: geometry})
        pictures = [rows.of(example) for example in dataset.examples]
    problems = [row for row in dataset.left_out if options.reading.takes(row.name) and row.name in listing.files]
    pictures += [rows.of_unusable(row) for row in problems]
    return DatasetPage(
        name=dataset.name,
        resolution=geometry.resolution,
        pictures=tuple(pictures),
        left_out=tuple(row for row in dataset.left_out if row not in problems),
        folders={posixpath.dirname(example.source.name): example.repeats for example in dataset.examples},
        chosen=tuple(sorted(read_dataset_file(listing.root).repeats)),
        warnings=dataset.warnings,
    )


def _scan(folder: str, listing: Listing, index: Index, options: PageOptions) -> Dataset:
    augmentation = Augmentation(upscale=options.upscale)
    reading = replace(options.reading, with_excluded=True)
    return scan_listing(folder, listing, index, options.trigger, options.resolution, 1, augmentation, reading)


class _Rows:
    def __init__(self, listing: Listing, index: Index, count_tokens: Callable[[str], int] | None, geometries: dict):
        self._captions = CaptionReader(listing, index)
        self._choices: DatasetFile = read_dataset_file(listing.root)
        self._count_tokens = count_tokens
        self._geometries = geometries

    def of(self, example: Example) -> PictureRow:
        name = example.source.name
        facts: dict[str, Any] = {
            "mark": example.digest[:16] + (example.mask.digest[-8:] if example.mask is not None else ""),
            "size": example.size,
            "center": example.center,
            "repeats": example.repeats,
            "mask": example.mask is not None,
            "held_out": example.held_out,
            "frames": example.clip.count if example.clip is not None else 0,
            "frame_rate": example.clip.shown if example.clip is not None else 0.0,
        }
        try:
            finding = inspect_example(example, self._geometries, self._count_tokens)
            crop = min(finding.crops, key=lambda crop: crop.kept)
            facts |= {"bucket": crop.bucket, "crop": _fractions(crop), "flags": _flags(finding)}
        except DatasetError as error:
            facts["problem"] = reason_of(error, name)
        row = self._row(name, facts)
        if row.origin == "none" and any(example.captions):
            row = replace(row, caption="\n".join(example.captions), origin="folder")
        return row

    def of_unusable(self, left_out: LeftOut) -> PictureRow:
        return self._row(left_out.name, {"problem": left_out.reason})

    def _row(self, name: str, facts: dict[str, Any]) -> PictureRow:
        try:
            caption = self._captions.read(name)
        except DatasetError:
            # The picture's own problem says so.
            caption = NO_CAPTION
        excluded = name in self._choices.excluded
        texts = {"caption": caption.text, "origin": caption.origin, "file": caption.file}
        return PictureRow(name, excluded=excluded, **texts, **facts)


def _fractions(crop: Crop) -> tuple[float, float, float, float]:
    width, height = crop.scaled
    return (
        crop.offset[0] / width,
        crop.offset[1] / height,
        crop.bucket[0] / width,
        crop.bucket[1] / height,
    )


def _flags(finding: Finding) -> tuple[str, ...]:
    missing = any(finding.example.captions) and lacks_trigger(finding.example)
    return (*finding.flags, *(["trigger missing"] if missing else []))


def find_alike(
    folder: str, options: PageOptions, index_folder: str | None
) -> tuple[list[tuple[str, str]], list[LeftOut]]:
    """Decode the pictures that were not decoded before, and find those that look alike.

    Returns:
        Pairs of names, and the pictures that cannot be decoded, with reasons.
    """
    with Index(index_folder, folder) as index:
        dataset = _scan(folder, list_folder(folder), index, options)
    marks, broken = signatures(dataset.examples, index_folder, lambda done, total: None)
    names = [example.source.name for example in dataset.examples]
    return [(names[first], names[second]) for first, second in find_near_duplicates(marks)], broken


def read_mask(folder: str, name: str, reading: ScanOptions) -> bytes:
    """Return the mask that training uses for a picture, as a PNG of one channel and of the picture's size.

    Raises:
        DatasetError: there is no such picture, it has no mask, or the mask cannot be read.
    """
    from PIL import Image

    listing = list_pictures(folder, name)
    source = source_of(listing, name)
    size, has_alpha = measure_source(source)
    mask = Masks(listing, reading).of(source, has_alpha, Index(None, folder))
    if mask is None:
        raise DatasetError(f"The picture '{name}' has no mask.", "Paint one.", "name")
    return _encoded(mask.open().convert("L").resize(size, Image.Resampling.BILINEAR), "PNG")


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
