"""Class images on disk: drawn once by the base itself, found again by a hash of their settings.

Source: Ruiz et al. 2022, "DreamBooth": samples of the frozen model for the class prompt supervise its own prior.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..errors import DatasetError, RunError
from ..formats import atomic, json_files
from ..text import safe_name
from .examples import Dataset, Example
from .pictures import FileSource, measure_file, reading

if TYPE_CHECKING:
    from PIL import Image

STEPS = 20

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Drawing:
    """Settings that determine, with an image's number, the content of a class image.

    Attributes:
        prompt: the class prompt, literal.
        base: hash of model, text encoder and VAE.
        size: (width, height) in pixels.
        seed: of image 0; image i has seed + i.
    """

    prompt: str
    negative: str
    base: str
    size: tuple[int, int]
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    seed: int

    def digest(self) -> str:
        """Return the hash of all settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


class ClassImages:
    """Class images of one drawing: numbered PNG files in a folder of their own.

    A file appears whole or not at all, so an interruption leaves only sound files.

    Attributes:
        folder: absolute path.

    Args:
        root: the folder that holds the folders of all drawings.
        earlier: the same drawing as earlier versions describe it; its folder is used if there is no newer one.
    """

    def __init__(self, root: str, drawing: Drawing, earlier: Drawing | None = None):
        self.drawing = drawing
        drawings = [drawing] if earlier is None else [drawing, earlier]
        folders = [
            os.path.join(root, f"{safe_name(described.prompt)}-{described.digest()[:16]}") for described in drawings
        ]
        self.folder = next((folder for folder in folders if os.path.isdir(folder)), folders[0])

    def path(self, number: int) -> str:
        """Return the path of an image's file."""
        return os.path.join(self.folder, f"{number:05}.png")

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Return the numbers that have no sound picture of the right size."""
        # Start at the output folder, which holds the folder of all class images and may itself be a link.
        atomic.refuse_links(os.path.dirname(os.path.dirname(self.folder)), self.folder)
        atomic.sweep(self.folder)
        return [number for number in numbers if self._measured(number) is None]

    def _measured(self, number: int) -> str | None:
        """Return the content hash of an image; None if the image is missing, damaged or of another size."""
        from PIL import Image

        path = self.path(number)
        name = os.path.basename(path)
        try:
            size, digest, _ = measure_file(path, name)
            with reading(name), Image.open(path) as image:
                # verify() uses the file's own checksums; decoding hundreds at every queueing would be too slow.
                image.verify()
        except DatasetError:
            return None
        return digest if size == self.drawing.size else None

    def write(self, number: int, picture: Image.Image) -> None:
        """Write an image.

        Raises:
            RunError: the folder cannot be written.
        """
        settings = os.path.join(self.folder, _SETTINGS)
        if not os.path.exists(settings):
            json_files.write_json(settings, asdict(self.drawing))
        with atomic.replacing(self.path(number)) as temporary:
            picture.save(temporary, format="PNG")

    def dataset(self, numbers: Sequence[int], resolution: int) -> Dataset:
        """Return images as a dataset; each has the class prompt as its caption.

        Raises:
            RunError: an image is missing, damaged or of another size.
        """
        name = os.path.basename(self.folder)
        examples = []
        for number in numbers:
            digest = self._measured(number)
            if digest is None:
                raise RunError(
                    f"The class image '{self.path(number)}' is missing.", "Queue the graph again to draw it."
                )
            source = FileSource(self.path(number), f"{name}/{number:05}.png", self.folder, digest)
            examples.append(Example(source, (self.drawing.prompt,), self.drawing.size, digest))
        return Dataset(tuple(examples), "", resolution, safe_name(self.drawing.prompt))
