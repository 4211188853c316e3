"""Class images on disk: drawn once by the base itself, found again by what decides them.

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
from ..formats import files
from ..text import safe_name
from .examples import Dataset, Example
from .pictures import FileSource, measure_file, reading

if TYPE_CHECKING:
    from PIL import Image

# Sampling steps where nothing is said.
STEPS = 20

_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Drawing:
    """What decides what a class image shows, besides its number.

    Attributes:
        prompt: the class prompt, literal.
        negative: the negative prompt.
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
        """Hash of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


class ClassImages:
    """The class images of one drawing, numbered PNG files in a folder of their own.

    A file appears whole or not at all, so that whatever interrupts the drawing, what is there stays good.

    Attributes:
        folder: absolute path.

    Args:
        root: the folder that holds the folders of all drawings.
        earlier: the same as versions before describe it; their folder is used where there is no newer one.
    """

    def __init__(self, root: str, drawing: Drawing, earlier: Drawing | None = None):
        self.drawing = drawing
        described = [drawing] if earlier is None else [drawing, earlier]
        folders = [os.path.join(root, f"{safe_name(one.prompt)}-{one.digest()[:16]}") for one in described]
        self.folder = next((folder for folder in folders if os.path.isdir(folder)), folders[0])

    def path(self, number: int) -> str:
        """Of an image's file."""
        return os.path.join(self.folder, f"{number:05}.png")

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Those of the numbers of which there is no sound picture of the right size."""
        # The folder of all class images lies in the output folder, which may be a link itself.
        files.refuse_links(os.path.dirname(os.path.dirname(self.folder)), self.folder)
        files.sweep(self.folder)
        return [number for number in numbers if self._measured(number) is None]

    def _measured(self, number: int) -> str | None:
        """The content hash of an image; None when it is not there, damaged or of another size."""
        from PIL import Image

        path = self.path(number)
        name = os.path.basename(path)
        try:
            size, digest, _ = measure_file(path, name)
            with reading(name), Image.open(path) as image:
                # By the file's own checksums; decoding hundreds of pictures at every queueing would take too long.
                image.verify()
        except DatasetError:
            return None
        return digest if size == self.drawing.size else None

    def write(self, number: int, picture: Image.Image) -> None:
        """Keeps an image.

        Raises:
            RunError: the folder cannot be written.
        """
        settings = os.path.join(self.folder, _SETTINGS)
        if not os.path.exists(settings):
            files.write_json(settings, asdict(self.drawing))
        with files.replacing(self.path(number)) as temporary:
            picture.save(temporary, format="PNG")

    def dataset(self, numbers: Sequence[int], resolution: int) -> Dataset:
        """Images as a dataset; each has the class prompt as its caption.

        Raises:
            RunError: one is gone.
        """
        name = os.path.basename(self.folder)
        examples = []
        for number in numbers:
            digest = self._measured(number)
            if digest is None:
                raise RunError(f"The class image '{self.path(number)}' is gone.", "Queue again; it will be drawn anew.")
            source = FileSource(self.path(number), f"{name}/{number:05}.png", self.folder, digest)
            examples.append(Example(source, (self.drawing.prompt,), self.drawing.size, digest))
        return Dataset(tuple(examples), "", resolution, safe_name(self.drawing.prompt))
