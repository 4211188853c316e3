"""Edits of a dataset's pictures: exclusion, crop centers, repeats, rotation, masks, removal to a trash folder."""

from __future__ import annotations

import io
import os
import posixpath
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..data.caption_files import CaptionFiles
from ..data.clips import VideoSource, is_media
from ..data.dataset_file import DatasetFile, encode, path_of, read_dataset_file
from ..data.listing import Listing, fold, list_folder, path_inside, stem_of
from ..data.masks import SUFFIX, Masks, own_masks
from ..data.pictures import is_picture, reading
from ..data.scan import ScanOptions
from ..data.source_images import CONTROL_FOLDERS, WORSE_FOLDER, PictureColumns, matching
from ..errors import DatasetError, GraftError
from ..formats.atomic import refuse_links, replacing, write_bytes
from .caption_edits import BACKUP
from .folder import EDITING, TRASH, find_picture, list_pictures, measure_source, path_to_write, source_of

if TYPE_CHECKING:
    from PIL import Image

    from ..data.source_images import MatchingFolder, PictureColumn

# Pillow's name of each format that a picture can be rotated in, and how it is saved without visible loss.
_SAVING = {
    "PNG": {},
    "BMP": {},
    "TIFF": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
_NUMBER = re.compile(r"\d{4,9}")


def exclude(folder: str, names: Sequence[str], excluded: bool) -> list[str]:
    """Exclude pictures from training, or include them again. Return the names of all excluded pictures."""

    def change(listing: Listing, choices: DatasetFile) -> DatasetFile:
        for name in names:
            find_picture(listing, name)
        kept = choices.excluded | set(names) if excluded else choices.excluded - set(names)
        return replace(choices, excluded=frozenset(kept))

    return sorted(_change(folder, change).excluded)


def set_center(folder: str, name: str, center: tuple[float, float] | None) -> None:
    """Set the point that a picture's crops are centered on, in fractions of its width and height; None: the middle."""

    def change(listing: Listing, choices: DatasetFile) -> DatasetFile:
        find_picture(listing, name)
        centers = {key: value for key, value in choices.centers.items() if key != name}
        return replace(choices, centers=centers if center is None else {**centers, name: center})

    _change(folder, change)


def set_repeats(folder: str, subfolder: str, repeats: int | None) -> None:
    """Set the visits in an epoch of each picture in a subfolder, "" for the folder itself; None: by its name."""

    def change(listing: Listing, choices: DatasetFile) -> DatasetFile:
        if subfolder and not any(name.startswith(f"{subfolder}/") for name in listing.files):
            raise DatasetError(f"There is no folder '{subfolder}'.", "Open the dataset again.", "subfolder")
        others = {key: value for key, value in choices.repeats.items() if key != subfolder}
        return replace(choices, repeats=others if repeats is None else {**others, subfolder: repeats})

    _change(folder, change)


def _change(folder: str, change: Callable[[Listing, DatasetFile], DatasetFile]) -> DatasetFile:
    with EDITING:
        listing = list_folder(folder)
        choices = change(listing, read_dataset_file(listing.root))
        try:
            content = encode(choices)
        except UnicodeEncodeError as error:
            raise DatasetError("A file name is not UTF-8.", "Rename the file.", "names") from error
        write_bytes(path_to_write(listing.root, os.path.basename(path_of(folder))), content)
        return choices


def discard(folder: str, names: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Move pictures with their captions and masks into the folder's trash.

    Returns:
        The names of the moved pictures, and (name, reason) of the others.
    """
    with EDITING:
        listing = list_folder(folder)
        companions = _Companions(listing)
        place = _new_place(listing.root)
        moved, failed = [], []
        for name in dict.fromkeys(names):
            try:
                find_picture(listing, name)
                _move(listing.root, {part: _below(place, part) for part in (name, *companions.of(name))})
                moved.append(name)
            except (GraftError, OSError) as error:
                failed.append((str(name), str(error)))
        return moved, failed


class _Companions:
    """The files that belong to a picture of a listing and to no other: its captions, their backups and its mask."""

    def __init__(self, listing: Listing):
        masks = own_masks(listing, is_media)
        self._files = listing.files
        self._masks = masks.by_stem
        self._captions = CaptionFiles(listing, lines_are_variants=False)
        self._stems = Counter(stem_of(name) for name in listing.files if is_media(name) and name not in masks.files)

    def of(self, name: str) -> list[str]:
        if self._stems[stem_of(name)] > 1:
            return []
        texts = [file.name for file in self._captions.files_of(name)]
        backups = [f"{text}{BACKUP}" for text in texts if f"{text}{BACKUP}" in self._files]
        mask = self._masks.get(stem_of(name))
        return [*texts, *backups, *([mask.name] if mask is not None else [])]


def restore(folder: str, names: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Move pictures with their captions and masks back from the folder's trash, each as it was discarded last.

    Returns:
        The names of the restored pictures, and (name, reason) of the others.
    """
    with EDITING:
        root = os.path.realpath(folder)
        restored, failed = [], []
        for name in dict.fromkeys(names):
            try:
                place = next((place for place in _places(root) if os.path.isfile(_below(place, name))), None)
                if place is None:
                    raise DatasetError(f"The trash has no picture '{name}'.", "It was removed there.", "name")
                listing = list_folder(place)
                find_picture(listing, name)
                inside = os.path.relpath(place, root).replace(os.sep, "/")
                parts = (name, *_Companions(listing).of(name))
                _move(root, {f"{inside}/{part}": _below(root, part) for part in parts})
                restored.append(name)
            except (GraftError, OSError) as error:
                failed.append((str(name), str(error)))
        return restored, failed


def _below(folder: str, name: str) -> str:
    return os.path.join(folder, *name.split("/"))


def _places(root: str) -> Iterable[str]:
    trash = os.path.join(root, TRASH)
    numbers = [name for name in os.listdir(trash) if _NUMBER.fullmatch(name)] if os.path.isdir(trash) else []
    return [os.path.join(trash, number) for number in sorted(numbers, key=int, reverse=True)]


def _new_place(root: str) -> str:
    """Return the path of a new numbered folder in the trash. Each removal has its own, so that no file is replaced."""
    refuse_links(root, os.path.join(root, TRASH))
    last = next(iter(_places(root)), "0")
    return os.path.join(root, TRASH, f"{int(os.path.basename(last)) + 1:04d}")


def move_to_trash(root: str, name: str) -> None:
    """Move one file of a dataset's folder into its trash."""
    _move(root, {name: _below(_new_place(root), name)})


def _move(root: str, targets: Mapping[str, str]) -> None:
    """Move files of a folder, given with their new paths; none of them if one cannot be moved."""
    paths = {path_to_write(root, name): target for name, target in targets.items()}
    for target in paths.values():
        refuse_links(root, target)
        if os.path.lexists(target):
            raise DatasetError(f"The file '{target}' exists.", "Rename or move it first.", "name")
    for path, target in paths.items():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.rename(path, target)


def rotate(
    folder: str, name: str, degrees: int, mask_folder: str = "", paired: Mapping[str, str] | None = None
) -> None:
    """Rotate a picture clockwise, with its masks, its source and worse pictures and its crop's center.

    The files as they were go to the trash.

    Args:
        degrees: 90, 180 or 270.
        mask_folder: absolute path of a folder of masks; empty for none.
        paired: absolute paths of the folders of source and worse pictures, by the node's inputs; empty for none.

    Raises:
        DatasetError: a picture cannot be read, its format cannot be written without visible loss, a mask or picture
            that belongs to it is outside the dataset's folder, or another picture has the same source.
    """
    with EDITING:
        listing = list_pictures(folder, name)
        columns, folders = PictureColumns(listing), paired or {}
        inputs = (*CONTROL_FOLDERS, WORSE_FOLDER)
        by_input = {input: matching(folders.get(input, ""), input, "", "source", listing, columns) for input in inputs}
        matches = {input: match for input, match in by_input.items() if match is not None}
        own = listing
        for match in matches.values():
            own = match.outside(own)
        pairs = (_pair_of(own, name, *match) for match in matches.items())
        parts = dict.fromkeys((name, *_masks_of(listing, name, mask_folder), *(pair for pair in pairs if pair)))
        rotated = {part: _rotated(listing, part, degrees) for part in parts}
        for part, content in rotated.items():
            _keep(listing.root, part)
            write_bytes(path_to_write(listing.root, part), content)
        center = read_dataset_file(listing.root).centers.get(name)
        if center is not None:
            set_center(folder, name, _rotated_point(center, degrees))


def _masks_of(listing: Listing, name: str, mask_folder: str) -> list[str]:
    """Return the names of a picture's masks: its own, and that in a folder of masks inside the dataset's folder."""
    own = own_masks(listing).by_stem.get(stem_of(name))
    names = [own.name] if own is not None else []
    other = None
    if mask_folder:
        other = Masks(listing, ScanOptions(mask_folder=mask_folder)).by_stem.get(stem_of(name))
    if other is not None:
        inside = path_inside(listing, os.path.realpath(mask_folder))
        if not inside:
            raise DatasetError(
                f"The mask of '{name}' is in another folder, to which the page does not write.",
                "Move the folder of masks into the dataset's, or rotate both in another program.",
                "mask_folder",
            )
        names.append(inside + other.name)
    return list(dict.fromkeys(names))


def _pair_of(own: Listing, name: str, input: str, match: MatchingFolder | PictureColumn) -> str:
    """Return the name of the source or worse picture that an input or a table has for a picture; empty for none.

    Args:
        own: the dataset's folder without all such folders.
    """
    file = match.find(name)
    if file is None:
        return ""
    if not match.inside:
        raise DatasetError(
            f"The picture of '{name}' in {input} is in another folder, to which the page does not write.",
            "Move that folder into the dataset's, or rotate both in another program.",
            input,
        )
    pair = posixpath.normpath(match.inside + file.name)
    others = (other for other in own.files if is_picture(other) and other != name)
    if shared := next((other for other in others if other == pair or match.find(other) is file), ""):
        raise DatasetError(
            f"'{name}' and '{shared}' have the same picture in {input}.", "Rotate them in another program.", input
        )
    return pair


def _rotated(listing: Listing, name: str, degrees: int) -> bytes:
    from PIL import Image

    turns = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
    source = source_of(listing, name)
    if isinstance(source, VideoSource):
        raise DatasetError(f"The clip '{name}' cannot be rotated here.", "Rotate it in another program.", "name")
    with reading(name):
        with Image.open(source.path) as opened:
            format = "JPEG" if opened.format == "MPO" else opened.format
            is_moving = getattr(opened, "n_frames", 1) > 1 and opened.format != "MPO"
        cure = "Rotate it in another program."
        if format not in _SAVING:
            raise DatasetError(f"The picture '{name}' is {format}, which Graft does not write.", cure, "name")
        if is_moving:
            raise DatasetError(f"The file '{name}' holds several pictures, of which one would stay.", cure, "name")
        image = source.decoded()
        buffer = io.BytesIO()
        profile = image.info.get("icc_profile")
        image.transpose(turns[degrees]).save(buffer, format=format, icc_profile=profile, **_SAVING[format])
    return buffer.getvalue()


def _rotated_point(point: tuple[float, float], degrees: int) -> tuple[float, float]:
    for _ in range(degrees // 90):
        point = (1.0 - point[1], point[0])
    return point


def write_mask(folder: str, name: str, content: bytes) -> bool:
    """Write the mask of a picture as NAME-masklabel.png, or remove it. The mask before goes to the trash.

    Args:
        content: a picture file of the picture's size; empty to remove the mask.

    Returns:
        True if the picture has a mask now.

    Raises:
        DatasetError: the content is not a picture of that size.
    """
    with EDITING:
        listing = list_pictures(folder, name)
        before = own_masks(listing, is_media).by_stem.get(stem_of(name))
        target = f"{stem_of(name)}{SUFFIX}.png"
        if content:
            encoded = _mask_file(listing, name, content)
            _keep(listing.root, target)
            write_bytes(path_to_write(listing.root, target), encoded)
        # A mask in a folder of masks may stay: training prefers one with the suffix.
        is_other = before is not None and fold(before.name) != fold(target)
        is_rival = is_other and stem_of(before.name).lower().endswith(SUFFIX)
        if before is not None and (not content or is_rival):
            move_to_trash(listing.root, before.name)
        return stem_of(name) in own_masks(list_folder(folder), is_media).by_stem


def _keep(root: str, name: str) -> None:
    path = path_to_write(root, name)
    if os.path.isfile(path):
        place = _below(_new_place(root), name)
        with replacing(place) as temporary:
            shutil.copyfile(path, temporary)


def _mask_file(listing: Listing, name: str, content: bytes) -> bytes:
    from PIL import Image

    mask_name = f"mask of {name}"
    size = measure_source(source_of(listing, name))[0]
    with reading(mask_name):
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            if opened.size != size:
                raise DatasetError(
                    f"The mask has {opened.width}x{opened.height} pixels, '{name}' has {size[0]}x{size[1]}.",
                    "Draw the mask at the picture's size.",
                    "mask",
                )
            mask: Image.Image = opened.convert("L")
        buffer = io.BytesIO()
        mask.save(buffer, format="PNG")
    return buffer.getvalue()
