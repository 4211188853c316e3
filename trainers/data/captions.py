"""Reading the caption that lies beside a picture."""

from __future__ import annotations

import os

from ..errors import DatasetError

SUFFIXES = (".txt", ".caption")


def caption_file(image_path: str) -> str | None:
    """Path of the caption that belongs to a picture, None when there is none."""
    stem = os.path.splitext(image_path)[0]
    for suffix in SUFFIXES:
        if os.path.isfile(stem + suffix):
            return stem + suffix
    return None


def read_caption(path: str, name: str) -> str:
    """The whole file as one caption, line breaks turned to spaces.

    Raises:
        DatasetError: naming the file, when it is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"The caption file '{name}' is not UTF-8 text ({error}).",
            "Save it with the encoding UTF-8.",
            "folder",
        ) from error
    except OSError as error:
        raise DatasetError(
            f"The caption file '{name}' cannot be read ({error}).",
            "Check its permissions, or remove it.",
            "folder",
        ) from error
    return " ".join(text.split())
