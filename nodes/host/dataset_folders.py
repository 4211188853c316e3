"""Folders of datasets and pictures: below ComfyUI's input folder, or below folders that the user allowed."""

import os
from collections.abc import Sequence

import folder_paths

from ...trainers.data.clips import is_media
from ...trainers.data.source_images import CONTROL_FOLDERS
from ...trainers.errors import DatasetError, SettingsError
from ...trainers.formats.atomic import refuse_links
from ...trainers.text import check_file_name, is_below
from . import settings

# No dataset root holds more folders than this, and the browser waits for the list.
_MOST_FOLDERS = 20_000
_LONGEST_PATH = 4096


def _roots() -> dict[str, str]:
    """Return the allowed roots of datasets by the prefix of their choices. The input folder has an empty prefix."""
    roots = {"": folder_paths.get_input_directory()}
    if "datasets" in folder_paths.folder_names_and_paths:
        for path in folder_paths.get_folder_paths("datasets"):
            roots.setdefault(os.path.basename(os.path.normpath(path)), path)
    return roots


def dataset_choices() -> list[str]:
    """Return the names of all folders below the roots that hold pictures at any depth.

    Names are relative and have forward slashes. Folders below the roots from the user's settings have absolute paths.
    """
    names = set()
    for name, root in _roots().items():
        for relative in _picture_folders(root):
            if relative != ".":
                names.add(f"{name}/{relative}" if name else relative)
    for root in settings.dataset_roots():
        for relative in _picture_folders(root):
            names.add(root if relative == "." else f"{root}/{relative}")
    return sorted(names)


def below_input(choices: list[str]) -> list[str]:
    """Return the choices that lie below ComfyUI's input folder, to which a page can upload."""
    root = folder_paths.get_input_directory()
    return [name for name in choices if os.path.isdir(path := os.path.join(root, name)) and is_below(path, root)]


def _picture_folders(root: str) -> set[str]:
    """Return the relative names of the folders at and below a root that hold pictures at any depth; '.' is the root."""
    names = set()
    pending = [(".", root)]
    visited = 0
    while pending and visited < _MOST_FOLDERS:
        relative, directory = pending.pop()
        visited += 1
        holds = False
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    # Ask for the kind of an entry only if its name does not tell: a folder may be large.
                    if not holds and is_media(entry.name):
                        holds = True
                    elif not is_media(entry.name) and not entry.name.startswith(".") and _is_folder(entry):
                        below = entry.name if relative == "." else f"{relative}/{entry.name}"
                        pending.append((below, entry.path))
        except OSError:
            # This user cannot read the folder, or it was removed meanwhile.
            continue
        if holds:
            parts = relative.split("/")
            names.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def dataset_path(choice: str, input: str = "folder") -> str:
    """Return the absolute path of a choice.

    Args:
        input: name of the node's input, for errors.

    Raises:
        DatasetError: the path lies outside the roots, or is not a folder.
    """
    if not is_possible(choice):
        raise DatasetError(
            f"'{printable(choice)}' is not a valid folder name.",
            "Choose a folder below ComfyUI's input folder.",
            input,
        )
    wanted = choice.strip()
    if not wanted:
        raise DatasetError(
            "No folder is chosen.", "Put a folder of pictures into ComfyUI's input folder and choose it.", input
        )
    candidates = _candidates(wanted)
    allowed = [path for path in candidates if _is_allowed(path)]
    for path in allowed:
        if os.path.isdir(path):
            return os.path.realpath(path)
    if len(allowed) < len(candidates):
        # For example, a link in one root leads elsewhere and the other roots have no such folder.
        raise DatasetError(
            f"The folder '{printable(choice)}' lies outside the folders that datasets may come from.",
            "Put it below ComfyUI's input folder (a link that leads elsewhere does not count), add its parent as "
            "'datasets' in extra_model_paths.yaml, or allow it in ComfyUI's settings under Graft.",
            input,
        )
    raise DatasetError(
        f"There is no folder '{printable(choice)}' below ComfyUI's input folder "
        f"({folder_paths.get_input_directory()}).",
        "Create it and put pictures into it, or choose another.",
        input,
    )


def new_dataset_path(name: str) -> str:
    """Return the absolute path of a folder below the input folder to write a dataset to. It need not exist.

    Raises:
        SettingsError: the name is invalid on some system, or leads elsewhere.
        RunError: a part of the path is a link.
    """
    check_file_name(name, "folder")
    root = folder_paths.get_input_directory()
    path = os.path.join(root, *name.split("/"))
    refuse_links(root, path, "Choose another folder.")
    return path


def _candidates(choice: str) -> list[str]:
    """Return the paths that a choice may stand for: below each root, with or without the root's own prefix."""
    roots = _roots()
    paths = [os.path.join(root, choice) for root in roots.values()]
    for name, root in roots.items():
        if name and (choice == name or choice.startswith(f"{name}/")):
            paths.append(os.path.join(root, choice[len(name) + 1 :]))
    return paths


def control_path(folder: str, choice: str, input: str = "control_folder") -> str:
    """Return the absolute path of a folder of source or worse pictures, or an empty string if none is chosen.

    The folder lies inside the dataset's folder, or is a choice of its own.

    Args:
        input: name of the node's input, for errors.

    Raises:
        DatasetError: neither place has a folder of that name.
    """
    wanted = choice.strip() if isinstance(choice, str) else choice
    if wanted == "":
        return ""
    inside = os.path.join(dataset_path(folder), wanted) if is_possible(wanted) else ""
    if inside and os.path.isdir(inside) and _is_allowed(inside):
        return os.path.realpath(inside)
    return dataset_path(wanted, input)


def control_paths(folder: str, choices: Sequence[str]) -> list[str]:
    """Return the absolute paths of the folders of source pictures, empty for those that are not set."""
    return [control_path(folder, choice, input) for choice, input in zip(choices, CONTROL_FOLDERS, strict=True)]


def picture_path(name: str) -> str:
    """Return the absolute path of a picture below the folders that datasets may come from.

    Raises:
        SettingsError: there is none of that name.
    """
    for path in _candidates(name) if is_possible(name) else ():
        if os.path.isfile(path) and _is_allowed(path):
            return os.path.realpath(path)
    raise SettingsError(
        f"There is no picture '{printable(name)}' below ComfyUI's input folder ({folder_paths.get_input_directory()}).",
        "Put it there, and write its name behind --c.",
        "prompts",
    )


def is_possible(name: str) -> bool:
    """Report whether a name can be passed to the file system. Prompts sent without a browser may hold anything."""
    return isinstance(name, str) and "\0" not in name and len(name) <= _LONGEST_PATH


def printable(name: str) -> str:
    """Return a name in a printable, shortened form for an error message."""
    name = str(name)
    return name if name.isprintable() and len(name) <= 200 else ascii(name[:200])[1:-1]


def _is_allowed(path: str) -> bool:
    return any(is_below(path, root) for root in (*_roots().values(), *settings.dataset_roots()))
