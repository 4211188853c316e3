"""Scan of a folder, or of pictures from a node's inputs, into a dataset with captions, masks and repeats."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from ..errors import DatasetError
from ..text import join_first
from ..video import PIECES
from . import captions
from .caption_files import CaptionFiles
from .clips import FRAMES, ClipFiles, check_frames, is_media
from .dataset_file import EXCLUDED, NAME, read_dataset_file
from .examples import Augmentation, Dataset, Example, LeftOut, reason_of, shortened
from .index import Index, listing_fingerprint
from .listing import File, Listing, list_folder, path_inside, without_folder
from .masks import Masks
from .pictures import FileSource, is_picture, measured, why_unread
from .source_images import PictureColumns, SourceFolders, WorsePictures

MASKS = ("auto", "alpha", "off")
_MOST_REPEATS = 1_000_000
# Higher numbers are probably not intended: "202311_shoot" is a date.
_USUAL_REPEATS = 100

# kohya's name for a folder with repeats: "20_sls frog".
_REPEAT_FOLDER = re.compile(r"(\d{1,6})_(.*)")


@dataclass(frozen=True)
class ScanOptions:
    """Options for reading a folder.

    Attributes:
        lines_are_variants: each line of a caption file is a separate caption.
        masks: one of MASKS: "auto" uses mask files, "alpha" uses mask files or else transparency, "off" uses none.
        mask_folder: absolute path of a folder of masks; empty for a folder named 'masks' in the dataset's folder.
        validation_folder: relative name of a folder inside, whose pictures are held out; empty for none.
        control_folder: absolute path of a folder of source pictures; empty for none.
        more_control_folders: those of the second and the third source pictures; empty for none.
        sources_optional: train on pictures without any source picture too.
        worse_folder: absolute path of a folder of worse pictures; empty for none.
        with_excluded: read also the pictures that the user excluded.
        frames: frames of a piece of a clip; 0 for stills alone.
        frame_rate: frames per second to train at, 0 for each file's own frames.
        pieces: one of `video.PIECES`.
    """

    lines_are_variants: bool = False
    masks: str = "auto"
    mask_folder: str = ""
    validation_folder: str = ""
    control_folder: str = ""
    more_control_folders: tuple[str, ...] = ()
    sources_optional: bool = False
    worse_folder: str = ""
    with_excluded: bool = False
    frames: int = 0
    frame_rate: float = 0.0
    pieces: str = PIECES[0]

    def takes(self, name: str) -> bool:
        """Report whether a file of a name can be trained on."""
        return is_media(name) if self.frames else is_picture(name)

    @property
    def held_out_prefix(self) -> str:
        """Return the prefix of the names of pictures that are held out; empty for none."""
        folder = self.validation_folder.strip().replace("\\", "/").strip("/")
        return f"{folder}/" if folder else ""


def scan_folder(
    folder: str,
    trigger: str,
    resolution: int,
    repeats: int,
    handling: Augmentation | None = None,
    reading: ScanOptions | None = None,
    index_folder: str | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read a folder as a dataset, with every picture in it and below it.

    A folder named `N_name` repeats its pictures N times. `name` becomes the caption of those pictures that have no
    caption of their own (kohya's rule).

    Args:
        folder: absolute path.
        trigger: word for the subject, may be empty.
        resolution: pixels, 0 for the model's own.
        repeats: visits of each picture in an epoch, multiplied by the number in its folder's name.
        index_folder: folder that keeps the index of known files; None to read all files each time.
        tick: called with (done, total) pictures; may raise to interrupt. The index keeps the pictures read so far.

    Raises:
        DatasetError: the folder does not exist, it holds no picture to train on, the validation folder holds none or
            all of the pictures, or the folder of masks, source or worse pictures is the folder itself.
    """
    with Index(index_folder, folder) as index:
        return scan_listing(folder, list_folder(folder), index, trigger, resolution, repeats, handling, reading, tick)


def scan_listing(
    folder: str,
    listing: Listing,
    index: Index,
    trigger: str,
    resolution: int,
    repeats: int,
    handling: Augmentation | None = None,
    reading: ScanOptions | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Read a listed folder as `scan_folder` does; the caller saves the index."""
    if not os.path.isdir(folder):
        raise DatasetError(f"There is no folder '{folder}'.", "Choose a folder below ComfyUI's input folder.", "folder")
    options = reading or ScanOptions()
    check_frames(options.frames, options.frame_rate)
    shared = _FolderSettings(trigger.strip(), repeats, handling or Augmentation(), options.held_out_prefix)
    reader = _Reader(listing, options, shared, index)
    examples = reader.read(tick)
    left_out = reader.left_out()
    _refuse_if_empty(folder, examples, left_out)
    _refuse_if_nothing_held_out(examples, options)
    name = os.path.basename(os.path.normpath(folder))
    return Dataset(tuple(examples), shared.trigger, resolution, name, left_out, reader.warnings())


def _without_masks(listing: Listing, mask_folder: str) -> Listing:
    """Return a listing without the folder of masks, whose pictures must not be trained on even if masks are off."""
    inside = path_inside(listing, os.path.realpath(mask_folder)) if mask_folder else ""
    if inside == "./":
        raise DatasetError(
            "The folder of masks is the dataset's own, so every picture would be its own mask.",
            "Put the masks into a folder of their own, under the names of their pictures.",
            "mask_folder",
        )
    return without_folder(listing, inside) if inside else listing


def _unread(listing: Listing, takes: Callable[[str], bool]) -> list[LeftOut]:
    return [
        LeftOut(name, reason)
        for name in listing.files
        if not captions.is_caption_file(name) and not takes(name) and (reason := why_unread(name))
    ]


def _refuse_if_empty(folder: str, examples: list[Example], left_out: Sequence[LeftOut]) -> None:
    if examples:
        return
    if not left_out:
        raise DatasetError(f"The folder '{folder}' holds no picture.", "Put PNG, JPEG or WebP files into it.", "folder")
    raise DatasetError(
        f"The folder '{folder}' holds no picture to train on: {shortened(left_out)}.",
        "Include excluded pictures, save unreadable ones again as PNG or JPEG, or choose another folder.",
        "folder",
    )


def _refuse_if_nothing_held_out(examples: list[Example], options: ScanOptions) -> None:
    if not options.validation_folder.strip():
        return
    count = sum(example.held_out for example in examples)
    if count in (0, len(examples)):
        what = "holds no picture" if count == 0 else "holds all pictures"
        raise DatasetError(
            f"The validation folder '{options.validation_folder}' {what} of the dataset.",
            "Name a folder inside the dataset's folder, such as 'validation'. Keep pictures to train on outside it.",
            "validation_folder",
        )


@dataclass(frozen=True)
class _FolderSettings:
    trigger: str
    repeats: int
    handling: Augmentation
    held_out_prefix: str


class _Reader:
    def __init__(self, listing: Listing, options: ScanOptions, shared: _FolderSettings, index: Index):
        listing.files.pop(NAME, None)
        self._options = options
        self._clips = ClipFiles(options.frames, options.frame_rate, options.pieces, index)
        listing = self._clips.join_frames(listing, captions.is_caption_file)
        self._index = index
        self._choices = read_dataset_file(listing.root)
        self._with_excluded = options.with_excluded
        folders = (options.control_folder, *options.more_control_folders)
        columns = PictureColumns(listing)
        self._sources = SourceFolders(folders, listing, columns, options.sources_optional)
        self._worse = WorsePictures(options.worse_folder, listing, columns)
        self._listing = _without_masks(self._worse.outside(self._sources.outside(listing)), options.mask_folder)
        others = listing.files.keys() - self._listing.files.keys()
        self._caption_files = CaptionFiles(self._listing, options.lines_are_variants, index, others, options.takes)
        self._masks = Masks(self._listing, options)
        self._shared = shared
        self._unusable: list[LeftOut] = []
        # (repeats, pictures) of folders with unusually many repeats.
        self._unusual: dict[str, tuple[int, int]] = {}

    def read(self, tick: Callable[[int, int], None]) -> list[Example]:
        pictures = self._masks.pictures
        examples = []
        for number, file in enumerate(pictures):
            tick(number, len(pictures))
            if file.name in self._choices.excluded and not self._with_excluded:
                self._unusable.append(LeftOut(file.name, EXCLUDED))
                continue
            try:
                examples.append(self._example(file))
            except DatasetError as error:
                self._unusable.append(LeftOut(file.name, reason_of(error, file.name)))
        tick(len(pictures), len(pictures))
        return examples

    def left_out(self) -> tuple[LeftOut, ...]:
        """Return the files that are not trained on, with their reasons. Call it after `read`."""
        return (
            *self._listing.left_out,
            *self._masks.without_picture,
            *_unread(self._listing, self._options.takes),
            *self._caption_files.left_out,
            *self._masks.left_out,
            *self._unusable,
            *self._sources.lonely(),
            *self._worse.lonely(),
        )

    def _example(self, file: File) -> Example:
        shared, index = self._shared, self._index
        clip = self._clips.of(file, self._listing.root)
        facts = measured(file, index) if clip is None else clip.facts
        source = clip.source if clip else FileSource(file.path, file.name, self._listing.root, facts["digest"])
        repeats, class_tokens, folder = self._repeats_of(file.name)
        if repeats > _USUAL_REPEATS and folder.startswith(f"{repeats}_"):
            self._unusual[folder] = (repeats, self._unusual.get(folder, (repeats, 0))[1] + 1)
        if repeats == 0:
            raise DatasetError("its folder's name repeats it 0 times", "Rename the folder.", "folder")
        if clip is not None and self._options.worse_folder:
            raise DatasetError("a clip cannot have a worse picture", "Leave worse_folder empty.", "worse_folder")
        example = Example(
            source=source,
            captions=self._caption_files.of(file.name) or captions.variants_of(class_tokens, False) or ("",),
            size=tuple(facts["size"]),
            digest=source.digest,
            trigger=shared.trigger,
            repeats=min(_MOST_REPEATS, shared.repeats * repeats),
            mask=self._masks.of(source, facts["alpha"] and clip is None, index),
            handling=shared.handling,
            held_out=bool(shared.held_out_prefix) and file.name.startswith(shared.held_out_prefix),
            center=self._choices.centers.get(file.name),
            clip=clip and clip.length,
        )
        measure = partial(measured, index=index)
        example = replace(example, paired=self._worse.of(file.name, example.size, measure))
        sources = self._sources.of(file.name, measure)
        return replace(example, control=sources[0], more_controls=sources[1:]) if sources else example

    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"The folder name '{folder}' repeats its {_counted(count)} {times} times in an epoch. "
            f"If {times} is a date or a number, rename the folder, such as to '{folder.replace('_', '-', 1)}'."
            for folder, (times, count) in self._unusual.items()
        )

    def _repeats_of(self, name: str) -> tuple[int, str, str]:
        parts = _folders_of(name)
        chosen = None
        for depth in range(len(parts), -1, -1):
            folder = parts[depth - 1] if depth else os.path.basename(self._listing.root)
            match = _REPEAT_FOLDER.fullmatch(folder)
            if chosen is None:
                chosen = self._choices.repeats.get("/".join(parts[:depth]))
            if match:
                return int(match.group(1)) if chosen is None else chosen, match.group(2).strip(), folder
        return 1 if chosen is None else chosen, "", ""


def _folders_of(name: str) -> list[str]:
    # A folder of frames may repeat itself.
    return name.removesuffix(FRAMES).split("/")[: None if name.endswith(FRAMES) else -1]


def class_tokens_of(listing: Listing, name: str) -> str:
    """Return the caption that the nearest folder of the form `N_name` gives to a picture; empty for none."""
    folders = (os.path.basename(listing.root), *_folders_of(name))
    matches = (_REPEAT_FOLDER.fullmatch(folder) for folder in reversed(folders))
    return next((match.group(2).strip() for match in matches if match), "")


def _counted(pictures: int) -> str:
    return f"{pictures} pictures" if pictures != 1 else "picture"


def folder_fingerprint(folder: str, *others: str) -> str:
    """Hash names, sizes and times of all files in folders, to detect cheaply that one may have changed."""
    return listing_fingerprint(list_folder(place) for place in (folder, *others) if place)


def check_captions(dataset: Dataset, live_text: bool = False) -> None:
    """Raise DatasetError if an example has neither a caption nor a trigger nor an encoded prompt.

    Args:
        live_text: training encodes captions at every step, so an encoded prompt is an error.
    """
    encoded = [example.source.name for example in dataset.examples if example.encoded is not None]
    if encoded and live_text:
        raise DatasetError(
            f"The conditionings of {len(encoded)} pictures are encoded already, so no embedding and no text encoder "
            "can learn from them.",
            "Connect captions to the dataset, not conditioning. Or train the model alone.",
            "dataset",
        )
    bare = [
        example.source.name
        for example in dataset.examples
        if example.encoded is None and not captions.unvaried_caption(example)
    ]
    if bare:
        raise DatasetError(
            f"{len(bare)} of {len(dataset.examples)} pictures have neither a caption nor a trigger: "
            f"{join_first(bare, 5)}.",
            "Write a caption into a .txt file next to each picture, or set the dataset's trigger.",
            "dataset",
        )
