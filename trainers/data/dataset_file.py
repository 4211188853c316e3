"""The user's choices about a dataset's pictures, in one small file in its folder."""

import os
from dataclasses import dataclass, field

from ..errors import DatasetError
from ..text import is_below

NAME = "graft_dataset.json"
EXCLUDED = "excluded from training"
_LIMIT = 16 * 1024 * 1024
_MOST_REPEATS = 1_000_000


@dataclass(frozen=True)
class DatasetFile:
    """Choices about the pictures in a folder. Names are relative to it, with forward slashes.

    Attributes:
        excluded: pictures that are not trained on.
        centers: center of a picture's crop, as (x, y) in fractions of its width and height.
        repeats: visits in an epoch of each picture in a folder, in place of the number in the folder's name; the
            folder "" is the dataset's own.
    """

    excluded: frozenset[str] = frozenset()
    centers: dict[str, tuple[float, float]] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)


def path_of(folder: str) -> str:
    """Return the path of a folder's file."""
    return os.path.join(folder, NAME)


def read_dataset_file(folder: str) -> DatasetFile:
    """Return the choices in a folder's file; none if there is no file.

    Raises:
        DatasetError: the file cannot be read, or holds something else. The choices are not ignored then: excluded
            pictures would be trained on.
    """
    import msgspec

    path = path_of(folder)
    try:
        if os.path.exists(path) and not (os.path.isfile(path) and is_below(path, folder)):
            raise ValueError("it is not a file in that folder")
        with open(path, "rb") as file:
            content = file.read(_LIMIT + 1)
        if len(content) > _LIMIT:
            raise ValueError(f"it is larger than {_LIMIT} bytes")
        choices = msgspec.json.decode(content, type=DatasetFile)
        _check(choices)
    except FileNotFoundError:
        return DatasetFile()
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"The file '{path_of(folder)}' cannot be read ({error}).",
            "Correct it, or remove it: all pictures are then included, with crops at their centers.",
            "folder",
        ) from error
    return choices


def _check(choices: DatasetFile) -> None:
    for name, center in choices.centers.items():
        if not all(0.0 <= part <= 1.0 for part in center):
            raise ValueError(f"the center of '{name}' is outside the picture")
    for name, times in choices.repeats.items():
        if not 0 <= times <= _MOST_REPEATS:
            raise ValueError(f"'{name}' is repeated {times} times")


def encode(choices: DatasetFile) -> bytes:
    """Return the content of a file with these choices."""
    import msgspec

    plain = {
        "excluded": sorted(choices.excluded),
        "centers": dict(sorted(choices.centers.items())),
        "repeats": dict(sorted(choices.repeats.items())),
    }
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"
