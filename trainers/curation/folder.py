"""Access to the files of a dataset's folder by the names that a page sends, which are untrusted."""

import os
import threading

from ..data.clips import FRAMES, AnimationSource, ClipSource, FramesSource, VideoSource, is_clip, is_media, list_frames
from ..data.listing import File, Listing, list_folder
from ..data.pictures import FileSource, measure_file
from ..errors import DatasetError
from ..formats.atomic import refuse_links

# Held from the comparison with a file's content to its replacement, so that no edit of another page is lost.
EDITING = threading.RLock()
TRASH = ".trash"


def find_picture(listing: Listing, name: str) -> File:
    """Return a picture of a listing. Raise DatasetError if it holds none of that name."""
    file = listing.files.get(name) if isinstance(name, str) else None
    if file is None or not is_media(name):
        raise DatasetError(
            f"The folder has no picture '{str(name)[:200]}'.",
            "It was moved: open the dataset again.",
            "name",
        )
    return file


def list_pictures(folder: str, *names: str) -> Listing:
    """List a folder. Raise DatasetError if it has no picture of one of the names."""
    listing = list_folder(folder)
    for name in names:
        find_picture(listing, name)
    return listing


def source_of(listing: Listing, name: str) -> FileSource | VideoSource:
    """Return a picture of a listing as a source. Raise DatasetError if it holds none of that name."""
    file = find_picture(listing, name)
    return _source(file.path, name, listing.root)


def _source(path: str, name: str, root: str) -> FileSource | VideoSource:
    return VideoSource(path, name, root) if is_clip(name) else FileSource(path, name, root, "")


def measure_source(source: FileSource | VideoSource) -> tuple[tuple[int, int], bool]:
    """Return the (width, height) of a picture or clip, and its transparency. Raise DatasetError if it is unreadable."""
    if isinstance(source, VideoSource):
        return source.open().size, False
    size, _, has_alpha = measure_file(source.path, source.name)
    return size, has_alpha


def one_picture(folder: str, name: str) -> FileSource | VideoSource:
    """Return a picture, a video, or the first of a folder of frames as a source without listing its folder.

    Raises:
        DatasetError: the name is not a picture's, is hidden or leads out of the folder, or there is no such file.
    """
    parts = name.split("/")
    is_possible = is_media(name) and "\0" not in name and "\\" not in name
    path = os.path.join(folder, *parts)
    root = os.path.realpath(folder)
    is_possible = is_possible and not any(not part or part.startswith(".") for part in parts)
    if is_possible and name.endswith(FRAMES) and not os.path.lexists(path):
        frames = list_frames(path.removesuffix(FRAMES))
        return FileSource(frames[0], name, root, "") if frames else source_of(Listing(folder, {}, []), name)
    if not is_possible or not os.path.isfile(path):
        return source_of(Listing(folder, {}, []), name)
    return _source(path, name, root)


def one_clip(folder: str, name: str) -> ClipSource:
    """Return a clip as a source of its frames without listing its folder. Raise as `one_picture`."""
    source = one_picture(folder, name)
    if isinstance(source, VideoSource):
        return source
    root = os.path.realpath(folder)
    if os.path.basename(source.path) == name.rpartition("/")[2]:
        return AnimationSource(source.path, name, root)
    frames = list_frames(os.path.dirname(source.path))
    return FramesSource([FileSource(frame, name, root, "") for frame in frames], name)


def path_to_write(root: str, name: str) -> str:
    """Return the path of a file to write. Raise RunError if a link would lead the write elsewhere."""
    path = os.path.join(root, *name.split("/"))
    refuse_links(root, path)
    return path
