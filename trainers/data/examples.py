"""What a dataset is: pictures by reference, captions, repeats; no pixels are held."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from ..errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """How pictures and captions are varied from one showing to the next; the defaults vary nothing.

    Attributes:
        shuffle_tags: puts the comma-separated parts of a caption into another order.
        keep_tokens: so many parts at the beginning are neither moved nor dropped, besides the trigger.
        tag_dropout: chance of each other part to be left out, 0..1.
        caption_dropout: chance of the whole caption to be empty, 0..1.
        wildcards: `{a|b}` in a caption becomes `a` or `b`.
        caption_variants: how many versions of a varying caption are encoded, 0 for a number by the dataset's size.
        flip: half of the showings are mirrored.
        upscale: small pictures are enlarged to the resolution.
        resolutions: further ones, pixels, besides the dataset's own.
        mask_minimum: least loss weight where the mask is black, 0..1.
    """

    shuffle_tags: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    wildcards: bool = False
    caption_variants: int = 0
    flip: bool = False
    upscale: bool = False
    resolutions: tuple[int, ...] = ()
    mask_minimum: float = 0.0

    def __post_init__(self):
        for name in ("tag_dropout", "caption_dropout", "mask_minimum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise DatasetError(f"{name} is {getattr(self, name)}.", "It must lie between 0 and 1.", name)
        for name in ("keep_tokens", "caption_variants"):
            if not 0 <= getattr(self, name) <= 100_000:
                raise DatasetError(f"{name} is {getattr(self, name)}.", "It must be 0 or more.", name)


def read_resolutions(text: str) -> tuple[int, ...]:
    """The numbers in a text such as "512, 768"; rising, none twice.

    Raises:
        DatasetError: something else in it, or a number that is no resolution.
    """
    found = set()
    for part in text.replace(",", " ").split():
        if not part.isdecimal() or not 8 <= int(part) <= 16384:
            raise DatasetError(
                f"'{part}' is no resolution.", "Write numbers of pixels between commas: 512, 768.", "more_resolutions"
            )
        found.add(int(part))
    return tuple(sorted(found))


@dataclass(frozen=True)
class Anchor:
    """What the model must go on predicting for a subject's class, learnt beside an example without class images.

    Attributes:
        prompt: the class prompt, literal; the frozen base's own prediction for it is the target.
        weight: of that loss, beside 1 for the example's own.
    """

    prompt: str
    weight: float


@dataclass(frozen=True)
class Example:
    """One picture and its captions.

    Attributes:
        source: where the pixels come from; `.name`, `.open()` -> PIL RGB upright.
        captions: literal texts without the trigger, variants of each other; at least one, which may be empty.
        size: (width, height) upright, pixels.
        digest: hash of the picture's content.
        trigger: the word that stands for what is learnt; empty for none.
        repeats: how often it is shown in an epoch.
        mask: None, or a source whose picture is the loss weight (white counts, black does not), with a `.digest`.
        handling: how it is varied.
        held_out: whether it serves validation alone.
        weight: factor on its loss.
        prior: whether it is a class image, drawn one to one with those that are none.
        anchor: None, or what is to be preserved beside it.
        control: None, or the source picture that it is made of, as an example without words.
        left_out: None, or why it is not trained on, where that is known before anything is opened. It keeps its place,
            and the dataset its fingerprint.
    """

    source: Source
    captions: tuple[str, ...]
    size: tuple[int, int]
    digest: str
    trigger: str = ""
    repeats: int = 1
    mask: Source | None = None
    handling: Augmentation = field(default_factory=Augmentation)
    held_out: bool = False
    weight: float = 1.0
    prior: bool = False
    anchor: Anchor | None = None
    control: Example | None = None
    left_out: LeftOut | None = None


class Source:
    """Where a picture comes from.

    Attributes:
        name: for reports and errors.
        digest: hash of its content.
    """

    name: str
    digest: str

    def open(self) -> Image.Image:
        """The picture, upright, RGB."""
        raise NotImplementedError


@dataclass(frozen=True)
class LeftOut:
    """A file that is not trained on, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Dataset:
    """Examples and how to show them.

    Attributes:
        examples: in a stable order.
        trigger: the one word of all examples, for the records; empty when there is none or more than one.
        resolution: side of the training square in pixels, 0 for the model's own.
        name: for file names and reports.
        left_out: files that could have been examples and are not.
        warnings: sentences about what is used but may not be meant so.
    """

    examples: tuple[Example, ...]
    trigger: str
    resolution: int
    name: str
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Hash of everything here that decides what is learnt."""
        ways: dict[Augmentation, str] = {}
        rows = []
        for example in self.examples:
            way = ways.get(example.handling)
            if way is None:
                way = ways[example.handling] = json.dumps(asdict(example.handling), sort_keys=True)
            mask = example.mask.digest if example.mask else ""
            row = [example.digest, example.captions, example.trigger, example.repeats, mask, way, example.held_out]
            rows.append(row + _later_marks(example))
        text = json.dumps([rows, self.resolution])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _later_marks(example: Example) -> list:
    """What came later to an example's row: nothing where it is not used, so that runs made before are found."""
    marks = []
    if example.prior or example.weight != 1.0:
        marks.append(["prior" if example.prior else "weight", example.weight])
    if example.anchor is not None:
        marks.append(["anchor", example.anchor.prompt, example.anchor.weight])
    if example.control is not None:
        marks.append(["control", example.control.digest])
    return marks


def combine(a: Dataset, b: Dataset) -> Dataset:
    """Both datasets as one; each example keeps its own trigger, repeats and handling.

    Raises:
        DatasetError: when both name a resolution and the two differ.
    """
    if a.resolution and b.resolution and a.resolution != b.resolution:
        raise DatasetError(
            f"The datasets '{a.name}' and '{b.name}' want different resolutions, {a.resolution} and {b.resolution}.",
            "Give both the same resolution, or 0.",
            "dataset_b",
        )
    trigger = a.trigger if a.trigger == b.trigger else ""
    name = f"{a.name}+{b.name}"
    left_out, warnings = a.left_out + b.left_out, a.warnings + b.warnings
    return Dataset(a.examples + b.examples, trigger, a.resolution or b.resolution, name, left_out, warnings)
