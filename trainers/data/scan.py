"""Scan of a folder, or of pictures from a node's inputs, into a dataset with captions, masks and repeats."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError
from . import captions
from .examples import Augmentation, Dataset, Example, LeftOut
from .index import Index, mark_of
from .listing import File, Listing, Owners, list_folder, stem_of
from .masks import mask_owner, own_masks
from .pictures import AlphaSource, FileSource, MaskSource, is_clear, is_picture, measure_file, why_unread
from .source_images import SourceImages

if TYPE_CHECKING:
    pass

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
    """

    lines_are_variants: bool = False
    masks: str = "auto"
    mask_folder: str = ""
    validation_folder: str = ""
    control_folder: str = ""


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
        DatasetError: the folder does not exist, it holds no picture to train on, or the validation folder holds none
            or all of the pictures.
    """
    if not os.path.isdir(folder):
        raise DatasetError(f"There is no folder '{folder}'.", "Choose a folder below ComfyUI's input folder.", "folder")
    reading = reading or ScanOptions()
    listing = list_folder(folder)
    source_images = SourceImages(reading.control_folder, listing)
    listing = source_images.outside(listing)
    left_out = list(listing.left_out)
    masks = own_masks(listing)
    pictures = [file for name, file in listing.files.items() if is_picture(name) and name not in masks.files]
    left_out += [LeftOut(name, "a mask without its picture") for name in masks.lonely]
    left_out += [
        LeftOut(name, reason)
        for name in listing.files
        if not captions.is_caption_file(name) and (reason := why_unread(name))
    ]
    reader = _Reader(
        listing, trigger.strip(), repeats, handling or Augmentation(), reading, masks, left_out, source_images
    )
    index = Index(index_folder, folder)
    try:
        examples = reader.examples(pictures, index, tick)
    finally:
        index.save()
    left_out += source_images.lonely()
    name = os.path.basename(os.path.normpath(folder))
    _refuse_if_empty(folder, examples, left_out)
    _refuse_if_nothing_held_out(examples, reading)
    return Dataset(tuple(examples), trigger.strip(), resolution, name, tuple(left_out), reader.warnings())


def _refuse_if_empty(folder: str, examples: list[Example], left_out: list[LeftOut]) -> None:
    if examples:
        return
    if not left_out:
        raise DatasetError(f"The folder '{folder}' holds no picture.", "Put PNG, JPEG or WebP files into it.", "folder")
    raise DatasetError(
        f"The folder '{folder}' holds no picture to train on: {shortened(left_out)}.",
        "Save the pictures again as PNG or JPEG, or choose another folder.",
        "folder",
    )


def _refuse_if_nothing_held_out(examples: list[Example], reading: ScanOptions) -> None:
    if not reading.validation_folder.strip():
        return
    count = sum(example.held_out for example in examples)
    if count in (0, len(examples)):
        what = "holds no picture" if count == 0 else "holds all pictures"
        raise DatasetError(
            f"The validation folder '{reading.validation_folder}' {what} of the dataset.",
            "Name a folder inside the dataset's folder, such as 'validation'. Keep pictures to train on outside it.",
            "validation_folder",
        )


def shortened(left_out: Iterable[LeftOut], most: int = 5) -> str:
    """Join the first `most` files in one line, and add the number of the others."""
    rows = [str(row) for row in left_out]
    return "; ".join(rows[:most]) + (f"; and {len(rows) - most} more" if len(rows) > most else "")


class _Reader:
    """Reader of examples from a listing; adds unusable files to `left_out` with their reasons."""

    def __init__(self, listing, trigger, repeats, handling, reading, masks, left_out, source_images):
        self._listing = listing
        self._trigger = trigger
        self._repeats = repeats
        self._handling = handling
        self._reading = reading
        self._left_out: list[LeftOut] = left_out
        self._unusual: dict[str, tuple[int, int]] = {}
        self._source_images: SourceImages = source_images
        self._sidecars = self._find_sidecars()
        self._metadata = self._read_metadata()
        self._masks = {} if reading.masks == "off" else masks.by_stem
        self._mask_root = listing.root
        if reading.masks != "off" and reading.mask_folder:
            self._mask_root, self._masks = self._masks_in_folder(list_folder(reading.mask_folder))
        self._validation_prefix = reading.validation_folder.strip().replace("\\", "/").strip("/")

    def examples(self, pictures: list[File], index: Index, tick: Callable[[int, int], None]) -> list[Example]:
        examples = []
        for number, file in enumerate(pictures):
            tick(number, len(pictures))
            try:
                examples.append(self._example(file, index))
            except DatasetError as error:
                self._left_out.append(LeftOut(file.name, reason_of(error, file.name)))
        tick(len(pictures), len(pictures))
        return examples

    def _example(self, file: File, index: Index) -> Example:
        facts = _measured(file, index)
        size = tuple(facts["size"])
        source = FileSource(file.path, file.name, self._listing.root, facts["digest"])
        times, class_tokens, folder = self._of_folder(file.name)
        if times > _USUAL_REPEATS:
            self._unusual[folder] = (times, self._unusual.get(folder, (times, 0))[1] + 1)
        if times == 0:
            raise DatasetError("its folder's name repeats it 0 times", "Rename the folder.", "folder")
        texts = self._captions(file) or captions.variants_of(class_tokens, False) or ("",)
        mask = self._mask(file, source, facts["alpha"], index)
        held_out = bool(self._validation_prefix) and file.name.startswith(f"{self._validation_prefix}/")
        source_image = self._source_images.of(file.name, lambda picture: _measured(picture, index))
        return Example(
            source,
            texts,
            size,
            facts["digest"],
            self._trigger,
            min(_MOST_REPEATS, self._repeats * times),
            mask,
            self._handling,
            held_out,
            control=source_image,
        )

    def _captions(self, file: File) -> tuple[str, ...]:
        for sidecar in self._sidecars.get(file.name, ()):
            texts = captions.read_sidecar(sidecar.path, sidecar.name, self._reading.lines_are_variants)
            if texts:
                return texts
        return self._metadata.get(file.name, ())

    def _masks_in_folder(self, listing: Listing) -> tuple[str, dict[str, File]]:
        """Return the root of a folder of masks, and its masks by the stems of their pictures."""
        owners = Owners(stem_of(name) for name in self._listing.files if is_picture(name))
        by_stem: dict[str, File] = {}
        self._left_out += listing.left_out
        for name, file in listing.files.items():
            of = owners.of(mask_owner(name)) if is_picture(name) else ()
            by_stem.update(dict.fromkeys(of, file))
            reason = "a mask without its picture" if is_picture(name) else why_unread(name)
            if not of and reason:
                self._left_out.append(LeftOut(name, reason))
        return listing.root, by_stem

    def _find_sidecars(self) -> dict[str, list[File]]:
        """Return the caption files of each picture, by its name, in the order to try them.

        A file belongs to the picture with the file's stem; else to the picture whose whole name is the file's stem, as
        in `a.png.txt`; else to pictures whose names differ only in case or Unicode form. Caption files without a
        picture go to `left_out`.
        """
        # Include unread formats, so that their captions are not reported as captions without a picture.
        names = [name for name in self._listing.files if not captions.is_caption_file(name)]
        by_stem: dict[str, list[str]] = {}
        for name in names:
            by_stem.setdefault(stem_of(name), []).append(name)
        stems, wholes = Owners(by_stem), Owners(names)
        sidecars: dict[str, list[tuple[tuple[int, int], File]]] = {}
        for name, file in self._listing.files.items():
            stem, suffix = posixpath.splitext(name)
            if suffix.lower() not in captions.SUFFIXES:
                continue
            kind, of = self._owners_of(stem, by_stem, stems, wholes)
            for owner in of:
                sidecars.setdefault(owner, []).append(((kind, captions.SUFFIXES.index(suffix.lower())), file))
            if not of:
                self._left_out.append(LeftOut(name, "a caption without its picture"))
        return {name: [file for _, file in sorted(rows, key=lambda row: row[0])] for name, rows in sidecars.items()}

    @staticmethod
    def _owners_of(stem: str, by_stem: dict[str, list[str]], stems: Owners, wholes: Owners) -> tuple[int, list[str]]:
        """Return the distance of a caption file's name to its pictures' names (0 is nearest), and these names."""
        for kind, of in enumerate(
            (
                by_stem.get(stem, ()),
                wholes.of(stem) if (stem,) == wholes.of(stem) else (),
                [name for match in stems.of(stem) for name in by_stem[match]],
                wholes.of(stem),
            )
        ):
            if of:
                return kind, list(of)
        return 0, []

    def _read_metadata(self) -> dict[str, tuple[str, ...]]:
        texts_by_picture: dict[str, tuple[str, ...]] = {}
        owners = Owners(name for name in self._listing.files if is_picture(name))
        for name, file in self._listing.files.items():
            if posixpath.basename(name).lower() not in captions.METADATA:
                continue
            missing = []
            has_texts = False
            try:
                for wanted, texts in captions.read_metadata(file.path, name, self._reading.lines_are_variants):
                    # Look up only among listed files, so that no row leads out of the folder.
                    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), wanted.replace("\\", "/")))
                    of = owners.of(target)
                    if not of:
                        missing.append(wanted)
                    for picture in of if texts else ():
                        texts_by_picture.setdefault(picture, texts)
                    has_texts = has_texts or bool(texts)
                if not has_texts:
                    self._left_out.append(LeftOut(name, f"no row has a caption under {captions.FIELDS_IN_WORDS}"))
            except DatasetError as error:
                self._left_out.append(LeftOut(name, reason_of(error, name)))
            if missing:
                listed = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
                self._left_out.append(LeftOut(name, f"it names {len(missing)} missing pictures: {listed}"))
        return texts_by_picture

    def warnings(self) -> tuple[str, ...]:
        """Return questions about folder names whose repeats are probably not intended."""
        return tuple(
            f"The folder name '{folder}' repeats its {_counted(count)} {times} times in an epoch. "
            f"If {times} is a date or a number, rename the folder, such as to '{folder.replace('_', '-', 1)}'."
            for folder, (times, count) in self._unusual.items()
        )

    def _of_folder(self, name: str) -> tuple[int, str, str]:
        """Return repeats, class tokens and name of the nearest folder that has repeats in its name."""
        folders = [os.path.basename(self._listing.root), *name.split("/")[:-1]]
        for folder in reversed(folders):
            match = _REPEAT_FOLDER.fullmatch(folder)
            if match:
                return int(match.group(1)), match.group(2).strip(), folder
        return 1, "", ""

    def _mask(self, file: File, source: FileSource, transparent: bool, index: Index):
        mask = self._masks.get(stem_of(file.name))
        if mask is not None:
            try:
                return _mask_of(mask, self._mask_root, index)
            except DatasetError as error:
                reason = f"its mask {mask.name} {reason_of(error, mask.name)}"
                raise DatasetError(reason, "Save the mask again, or remove it.") from error
        if self._reading.masks == "alpha" and transparent:
            return AlphaSource(source)
        return None


def _counted(pictures: int) -> str:
    return f"{pictures} pictures" if pictures != 1 else "picture"


def _measured(file: File, index: Index) -> dict:
    return index.facts(file.path, file.stat, lambda: _measure(file), _are_facts)


def _measure(file: File) -> dict:
    size, digest, transparent = measure_file(file.path, file.name)
    return {"size": list(size), "digest": digest, "alpha": transparent}


def _mask_of(file: File, root: str, index: Index) -> MaskSource:
    """Return a mask file as a source. Raise DatasetError if it cannot be read."""

    def measure() -> dict:
        facts = _measure(file)
        # The file's head says only that a mask may be transparent. Check the pixels, since most masks are opaque.
        clear = facts["alpha"] and is_clear(FileSource(file.path, file.name, root, facts["digest"]))
        return {**facts, "clear": clear}

    facts = index.facts(file.path, file.stat, measure, _are_mask_facts)
    return MaskSource(FileSource(file.path, file.name, root, facts["digest"]), facts.get("clear", False))


def _are_mask_facts(facts: dict) -> bool:
    """Return True if facts are those of a mask; earlier versions did not store `clear`."""
    return _are_facts(facts) and (not facts["alpha"] or isinstance(facts.get("clear"), bool))


def _are_facts(facts: dict) -> bool:
    """Return True if facts from a file have the form that `_measured` stores."""
    size = facts.get("size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return False
    return isinstance(facts.get("digest"), str) and isinstance(facts.get("alpha"), bool)


def reason_of(error: DatasetError, name: str) -> str:
    """Return an error's message without the file's name, for a list whose rows begin with that name."""
    for opening in (f"The picture '{name}' ", f"The caption file '{name}' "):
        if error.message.startswith(opening):
            return error.message[len(opening) :].rstrip(".")
    return error.message.rstrip(".")


def folder_fingerprint(folder: str, *others: str) -> str:
    """Hash names, sizes and times of all files in folders, to detect cheaply that one may have changed."""
    total = hashlib.sha256()
    for place in (folder, *others):
        if place:
            for name, file in list_folder(place).files.items():
                total.update(f"{name!r} {mark_of(file.stat)}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def check_captions(dataset: Dataset) -> None:
    """Raise DatasetError if an example has neither a caption nor a trigger."""
    bare = [example.source.name for example in dataset.examples if not captions.plain(example)]
    if bare:
        listed = ", ".join(bare[:5]) + (" ..." if len(bare) > 5 else "")
        raise DatasetError(
            f"{len(bare)} of {len(dataset.examples)} pictures have neither a caption nor a trigger: {listed}.",
            "Write a caption into a .txt file next to each picture, or set the dataset's trigger.",
            "dataset",
        )
