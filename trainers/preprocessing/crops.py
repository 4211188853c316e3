"""Crops of a dataset's pictures, and the split into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..data import captions
from ..data.buckets import Crop, choose_crop, choose_crops
from ..data.clips import with_pieces
from ..data.examples import LeftOut, reason_of
from ..data.source_images import is_alike
from ..errors import DatasetError, SettingsError
from ..protocols import Geometry
from ..rng import stream_seed

if TYPE_CHECKING:
    from ..data.examples import Dataset, EncodedPrompt, Example
    from ..recipe.recipe import Recipe
    from ..video import Piece


@dataclass(frozen=True)
class CroppedExample:
    """Example with its place in the dataset and its crops, one for each resolution and each piece of a clip.

    Attributes:
        drawn: pieces of a clip that take turns at random in the place of its one piece; empty for none.
    """

    place: int
    example: Example
    crops: tuple[Crop, ...]
    drawn: tuple[Piece, ...] = ()

    def all_crops(self) -> list[Crop]:
        """Return the crops, and their mirror images if the example is flipped."""
        crops = [replace(crop, piece=piece) for crop in self.crops for piece in self.drawn or (crop.piece,)]
        mirrored = [crop.mirrored() for crop in crops] if self.example.handling.flip else []
        return [*crops, *mirrored]

    def crop_of_visit(self, crop: Crop, seed: int, visit: int) -> Crop:
        """Return a crop as a visit shows it: with a random one of the pieces that take turns, mirrored or not."""
        stream = self.stream(crop)
        if self.drawn:
            crop = replace(crop, piece=self.drawn[stream_seed("piece", seed, stream, visit) % len(self.drawn)])
        is_flipped = self.example.handling.flip and stream_seed("flip", seed, stream, visit) % 2 == 1
        return crop.mirrored() if is_flipped else crop

    def unvaried_prompt(self) -> str | EncodedPrompt:
        """Return the encoded prompt, or the unvaried caption without one."""
        return self.example.encoded or captions.unvaried_caption(self.example)

    def stream(self, crop: Crop) -> str:
        """Name the stream of random numbers of one of the crops."""
        piece = "" if crop.piece is None else f"/{crop.piece[0]}+{crop.piece[1]}"
        return f"{self.place}/{crop.bucket[0]}x{crop.bucket[1]}{piece}"

    def caption_number(self, crop: Crop, count: int, seed: int, visit: int) -> int | None:
        """Return the number of the caption version for a visit of a crop, or None if the caption is dropped.

        Args:
            count: number of versions, from `captions.variant_count`.
            visit: number of earlier visits of the crop.
        """
        return captions.variant_of_visit(self.example, count, seed, self.stream(crop), visit)


def crop_examples(
    dataset: Dataset, geometries: dict[int, Geometry], snap: Callable[[int], int] = lambda frames: frames, seed: int = 0
) -> tuple[list[CroppedExample], list[LeftOut]]:
    """Crop each example; return the cropped examples, and the examples that cannot be cropped.

    Args:
        geometries: by resolution; 0 is the dataset's own.
        snap: returns the largest number of frames, up to a number, that the codec takes.
        seed: for the random pieces of clips.
    """
    examples = []
    left_out = []
    for place, example in enumerate(dataset.examples):
        if example.left_out is not None:
            left_out.append(example.left_out)
            continue
        sizes = [geometries[resolution] for resolution in (0, *example.handling.resolutions)]
        try:
            name, upscale = example.source.name, example.handling.upscale
            crops = choose_crops(example.size, sizes, name, upscale, example.center)
        except DatasetError as error:
            left_out.append(LeftOut(example.source.name, reason_of(error, example.source.name)))
            continue
        examples.append(CroppedExample(place, example, *with_pieces(example, crops, snap, seed)))
    return examples, left_out


def all_resolutions(dataset: Dataset) -> list[int]:
    """List the additional resolutions of a dataset's examples, and 0 for its own."""
    return sorted({0, *(side for example in dataset.examples for side in example.handling.resolutions)})


def held_out(examples: list[CroppedExample], recipe: Recipe) -> set[int]:
    """Return the places of the validation examples: the marked ones, and a fraction of the rest.

    Only content and seed decide which of the rest are held out.

    Raises:
        SettingsError: nothing is left to train on.
    """
    marked = {cropped.place for cropped in examples if cropped.example.held_out}
    # Validation measures how well the subject is learned, so all class images are trained on.
    rest = [cropped for cropped in examples if cropped.place not in marked and not cropped.example.prior]
    count = round(recipe.validation_fraction * len(rest))
    if recipe.validation_fraction > 0:
        count = max(1, count)
    if count >= len(rest):
        raise SettingsError(
            f"validation_fraction {recipe.validation_fraction} leaves none of {len(rest)} pictures to train on.",
            "Lower it in Graft Run Options, or add pictures.",
            "validation_fraction",
        )

    def rank(cropped: CroppedExample) -> str:
        return hashlib.sha256(f"{recipe.seed}{cropped.example.digest}".encode()).hexdigest()

    return marked | {cropped.place for cropped in sorted(rest, key=rank)[:count]}


def source_crop(source: Example, size: tuple[int, int], crop: Crop, step: int) -> Crop:
    """Choose the crop of a source image for a crop of the picture that it becomes.

    A source image of the same shape gets the same crop, so that positions match. Any other keeps as much as possible
    of its own shape, at about as many pixels.

    Args:
        size: (width, height) of the picture that it becomes.
        step: both sides of the crop are multiples of it, pixels.
    """
    if is_alike(source.size, size):
        return crop
    side = max(step, round((crop.bucket[0] * crop.bucket[1]) ** 0.5))
    own = choose_crop(source.size, Geometry(side, step), source.source.name, upscale=True)
    return own.mirrored() if crop.flip else own
