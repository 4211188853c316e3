"""Access to the files of a dataset's folder by the names that a page sends, which are untrusted."""

from __future__ import annotations

import os
import threading

from ..data.listing import File, Listing, list_folder
from ..data.pictures import FileSource, is_picture
from ..errors import DatasetError
from ..formats.atomic import refuse_links

# Held from the comparison with a file's content to its replacement, so that no edit of another page is lost.
EDITING = threading.RLock()
TRASH = ".trash"


def find_picture(listing: Listing, name: str) -> File:
    """Return a picture of a listing. Raise DatasetError if it holds none of that name."""
    file = listing.files.get(name) if isinstance(name, str) else None
    if file is None or not is_picture(name):
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


def source_of(listing: Listing, name: str) -> FileSource:
    """Return a picture of a listing as a source. Raise DatasetError if it holds none of that name."""
    file = find_picture(listing, name)
    return FileSource(file.path, name, listing.root, "")


def one_picture(folder: str, name: str) -> FileSource:
    """Return a picture as a source without listing its folder.

    Raises:
        DatasetError: the name is not a picture's, is hidden or leads out of the folder, or there is no such file.
    """
    parts = name.split("/")
    is_possible = is_picture(name) and "\0" not in name and "\\" not in name
    path = os.path.join(folder, *parts)
    if not is_possible or any(not part or part.startswith(".") for part in parts) or not os.path.isfile(path):
        return source_of(Listing(folder, {}, []), name)
    return FileSource(path, name, os.path.realpath(folder), "")


def path_to_write(root: str, name: str) -> str:
    """Return the path of a file to write. Raise RunError if a link would lead the write elsewhere."""
    path = os.path.join(root, *name.split("/"))
    refuse_links(root, path)
    return path
