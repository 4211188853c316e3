"""Datasets: sources of pictures, captions and repeats; they hold no decoded pixels."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Augmentation:
    """Variation of pictures and captions between visits; the defaults vary nothing.

    Attributes:
        shuffle_tags: shuffle the comma-separated parts of a caption.
        keep_tokens: number of first parts, besides the trigger, that are neither moved nor dropped.
        tag_dropout: probability of dropping each other part, 0..1.
        caption_dropout: probability of an empty caption, 0..1.
        wildcards: replace `{a|b}` in a caption by `a` or `b`.
        caption_variants: number of encoded versions of a varying caption, 0 to derive it from the dataset's size.
        flip: mirror half of the visits.
        upscale: enlarge small pictures to the resolution.
        resolutions: additional resolutions, pixels, besides the dataset's own.
        mask_minimum: lowest loss weight where the mask is black, 0..1.
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
    """Parse a text such as "512, 768" into ascending numbers without duplicates.

    Raises:
        DatasetError: a part is not a number, or the number is not a resolution.
    """
    resolutions = set()
    for part in text.replace(",", " ").split():
        if not part.isdecimal() or not 8 <= int(part) <= 16384:
            raise DatasetError(
                f"'{part}' is not a resolution.",
                "Write numbers of pixels, separated by commas: 512, 768.",
                "more_resolutions",
            )
        resolutions.add(int(part))
    return tuple(sorted(resolutions))


@dataclass(frozen=True)
class PriorTarget:
    """Prior target of an example: the frozen base's own prediction for a class prompt. It needs no class images.

    Attributes:
        prompt: the class prompt, literal; the frozen base's own prediction for it is the target.
        weight: of the prior loss; the example's own loss has weight 1.
        others: further class prompts; each visit draws one of all.
        replaced: words of a caption; with the prompt in their place it is the class prompt. Empty for the prompt alone.
    """

    prompt: str
    weight: float
    others: tuple[str, ...] = ()
    replaced: str = ""

    def __str__(self):
        prompts = "', '".join((self.prompt, *self.others))
        return f"'{prompts}'" + (f" in place of '{self.replaced}'" if self.replaced else "")


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Prompt that arrives encoded. It trains in place of captions.

    Attributes:
        digest: hash of its content.
        tensors: conditioning by the host's own names, on the CPU; None in a job, whose cache holds it.
        holds_pictures: whether latents of pictures are part of it, such as reference latents.
    """

    digest: str
    tensors: dict[str, Any] | None = None
    holds_pictures: bool = False

    def __str__(self) -> str:
        return "encoded prompt"


@dataclass(frozen=True)
class Clip:
    """Length of a moving picture, and the pieces of it that are trained on.

    Attributes:
        count: number of frames at `rate`.
        rate: frames per second, 0 for all frames that the file holds.
        frames: requested frames of a piece.
        pieces: one of `video.PIECES`.
        shown: frames per second of the file, for reports; 0 if unknown.
    """

    count: int
    rate: float = 0.0
    frames: int = 1
    pieces: str = "first"
    shown: float = 0.0


@dataclass(frozen=True)
class Example:
    """One picture or clip, and its captions.

    Attributes:
        source: source of the pixels; `.name`, `.open()` -> PIL RGB upright; of a clip, a `clips.ClipSource`.
        captions: literal texts without the trigger, variants of each other; at least one, which may be empty.
        size: (width, height) upright, pixels.
        digest: hash of the picture's content.
        trigger: the word for the subject; empty for none.
        repeats: visits in an epoch.
        mask: None, or a source whose picture is the loss weight (white counts, black does not), with a `.digest`.
        handling: variation between visits.
        held_out: whether the example serves only validation.
        weight: factor on its loss.
        prior: whether it is a class image; batches draw class images one to one with the others.
        anchor: None, or its prior target.
        control: None, or the source picture that it is made of, as an example with an empty caption.
        more_controls: its second and third source pictures, likewise.
        center: None, or the (x, y) that the crop is centered on, in fractions of width and height.
        left_out: None, or the reason for not training on it, if known before any file is opened. The example keeps its
            place, and the dataset keeps its fingerprint.
        encoded: None, or the prompt that trains in place of the captions.
        paired: None, or the worse picture for the same caption, as an example with an empty caption.
        clip: None for a still.
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
    anchor: PriorTarget | None = None
    control: Example | None = None
    center: tuple[float, float] | None = None
    left_out: LeftOut | None = None
    encoded: EncodedPrompt | None = None
    more_controls: tuple[Example, ...] = ()
    paired: Example | None = None
    clip: Clip | None = None

    @property
    def sources(self) -> tuple[Example, ...]:
        """Return all its source pictures, in their order."""
        return () if self.control is None else (self.control, *self.more_controls)


class Source:
    """Source of a picture.

    Attributes:
        name: for reports and errors.
        digest: hash of its content.
    """

    name: str
    digest: str

    def open(self) -> Image.Image:
        """Return the picture, upright, RGB."""
        raise NotImplementedError


@dataclass(frozen=True)
class LeftOut:
    """File that is not trained on, with the reason."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def shortened(left_out: Iterable[LeftOut], most: int = 5) -> str:
    """Join the first `most` files in one line, and add the number of the others."""
    rows = [str(row) for row in left_out]
    return "; ".join(rows[:most]) + (f"; and {len(rows) - most} more" if len(rows) > most else "")


def reason_of(error: DatasetError, name: str) -> str:
    """Return an error's message without the file's name, for a list whose rows begin with that name."""
    for opening in (f"The picture '{name}' ", f"The clip '{name}' ", f"The caption file '{name}' "):
        if error.message.startswith(opening):
            return error.message[len(opening) :].rstrip(".")
    return error.message.rstrip(".")


@dataclass(frozen=True)
class Dataset:
    """Examples with their trigger and resolution.

    Attributes:
        examples: in a stable order.
        trigger: the trigger of all examples, for the records; empty if there is none or more than one.
        resolution: side of the training square in pixels, 0 for the model's own.
        name: for file names and reports.
        left_out: files that look like examples but cannot be used.
        warnings: sentences about content that is used but may not be intended.
    """

    examples: tuple[Example, ...]
    trigger: str
    resolution: int
    name: str
    left_out: tuple[LeftOut, ...] = ()
    warnings: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a hash of everything in the dataset that affects training."""
        serialized: dict[Augmentation, str] = {}
        rows = []
        for example in self.examples:
            augmentation = serialized.get(example.handling)
            if augmentation is None:
                augmentation = serialized[example.handling] = json.dumps(asdict(example.handling), sort_keys=True)
            mask = example.mask.digest if example.mask else ""
            row = [
                example.digest,
                example.captions,
                example.trigger,
                example.repeats,
                mask,
                augmentation,
                example.held_out,
            ]
            rows.append(row + _later_marks(example))
        text = json.dumps([rows, self.resolution])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _later_marks(example: Example) -> list:
    """Return the later additions to an example's row; none if unused, so that runs of earlier versions are found."""
    marks = []
    if example.prior or example.weight != 1.0:
        marks.append(["prior" if example.prior else "weight", example.weight])
    if example.anchor is not None:
        anchor = example.anchor
        later = [anchor.others, anchor.replaced] if anchor.others or anchor.replaced else []
        marks.append(["anchor", anchor.prompt, anchor.weight, *later])
    if example.control is not None:
        marks.append(["control", *(source.digest for source in example.sources)])
    if example.center is not None:
        marks.append(["center", *example.center])
    if example.encoded is not None:
        marks.append(["encoded", example.encoded.digest])
    if example.paired is not None:
        marks.append(["paired", example.paired.digest])
    if example.clip is not None:
        marks.append(["clip", example.clip.count, example.clip.rate, example.clip.frames, example.clip.pieces])
    return marks


def combine(a: Dataset, b: Dataset) -> Dataset:
    """Join two datasets; each example keeps its own trigger, repeats and handling.

    Raises:
        DatasetError: both have a resolution, and the two differ.
    """
    if a.resolution and b.resolution and a.resolution != b.resolution:
        raise DatasetError(
            f"The datasets '{a.name}' and '{b.name}' have different resolutions, {a.resolution} and {b.resolution}.",
            "Give both the same resolution, or 0.",
            "dataset_b",
        )
    trigger = a.trigger if a.trigger == b.trigger else ""
    name = f"{a.name}+{b.name}"
    left_out, warnings = a.left_out + b.left_out, a.warnings + b.warnings
    return Dataset(a.examples + b.examples, trigger, a.resolution or b.resolution, name, left_out, warnings)


def count_tags(dataset: Dataset) -> dict[str, dict[str, int]]:
    """Return {dataset's name: {tag: captions with it}} of the trained pictures, as sd-scripts writes it to metadata."""
    tags: Counter[str] = Counter()
    for example in dataset.examples:
        if not example.prior and not example.held_out:
            for caption in example.captions:
                parts = (part.strip().lower() for part in f"{example.trigger},{caption}".split(","))
                tags.update(part for part in parts if part)
    return {dataset.name: dict(tags)}
