"""How each picture of a dataset is cut, and which of them are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.buckets import Crop, choose_crop, choose_crops
from ..data.examples import Example, LeftOut
from ..data.scan import reason_of
from ..data.source_images import is_alike
from ..errors import DatasetError, SettingsError
from ..protocols import Geometry

if TYPE_CHECKING:
    from ..data.examples import Dataset, Example
    from ..protocols import Geometry
    from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class CroppedDataset:
    """An example, its place in the dataset, and its cuts, one for each resolution."""

    place: int
    example: Example
    crops: tuple[Crop, ...]

    def all_crops(self) -> list[Crop]:
        """The cuts, and the mirrored ones where it is flipped."""
        mirrored = [crop.mirrored() for crop in self.crops] if self.example.handling.flip else []
        return [*self.crops, *mirrored]

    def stream(self, crop: Crop) -> str:
        """Names the stream of random numbers of one of its cuts."""
        return f"{self.place}/{crop.bucket[0]}x{crop.bucket[1]}"


def cut_dataset(dataset: Dataset, geometries: dict[int, Geometry]) -> tuple[list[CroppedDataset], list[LeftOut]]:
    """The cuts of each example, and the examples that have none.

    Args:
        geometries: by resolution; 0 is the dataset's own.
    """
    found = []
    left_out = []
    for place, example in enumerate(dataset.examples):
        if example.left_out is not None:
            left_out.append(example.left_out)
            continue
        wanted = [geometries[resolution] for resolution in (0, *example.handling.resolutions)]
        try:
            crops = choose_crops(example.size, wanted, example.source.name, example.handling.upscale)
        except DatasetError as error:
            left_out.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
            continue
        found.append(CroppedDataset(place, example, tuple(crops)))
    return found, left_out


def all_resolutions(dataset: Dataset) -> list[int]:
    """The further resolutions of a dataset's examples, and 0 for its own."""
    return sorted({0, *(side for example in dataset.examples for side in example.handling.resolutions)})


def held_out(cuts: list[CroppedDataset], recipe: Recipe) -> set[int]:
    """Places of the examples that serve validation: those marked, and a share of the rest by content and seed alone.

    Raises:
        SettingsError: nothing would be left to train on.
    """
    marked = {cut.place for cut in cuts if cut.example.held_out}
    # Validation measures how well the subject is learnt; class images are all trained on.
    rest = [cut for cut in cuts if cut.place not in marked and not cut.example.prior]
    count = round(recipe.validation_fraction * len(rest))
    if recipe.validation_fraction > 0:
        count = max(1, count)
    if count >= len(rest):
        raise SettingsError(
            f"validation_fraction {recipe.validation_fraction} leaves none of {len(rest)} pictures to train on.",
            "Lower it in Graft Run Options, or add pictures.",
            "validation_fraction",
        )

    def rank(cut: CroppedDataset) -> str:
        return hashlib.sha256(f"{recipe.seed}{cut.example.digest}".encode()).hexdigest()

    return marked | {cut.place for cut in sorted(rest, key=rank)[:count]}


def control_crop(control: Example, size: tuple[int, int], crop: Crop, step: int) -> Crop:
    """How a source picture is cut beside a cut of the picture it becomes.

    One of the same shape is cut alike, so that each place stays over itself; any other keeps what it can of its own
    shape, at as many pixels.

    Args:
        size: (width, height) of the picture it becomes.
        step: of both sides, pixels.
    """
    if is_alike(control.size, size):
        return crop
    side = max(step, round((crop.bucket[0] * crop.bucket[1]) ** 0.5))
    own = choose_crop(control.size, Geometry(side, step), control.source.name, upscale=True)
    return own.mirrored() if crop.flip else own
