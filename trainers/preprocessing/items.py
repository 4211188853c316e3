"""Dataset items, the samples that they give for each visit, and the prompts of a slider without pictures as items."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.buckets import batch_shape
from ..errors import ModelError, SettingsError
from ..protocols import HOLE, Conditioning
from ..recipe.parsing import read_prompts
from ..rng import stream_seed

if TYPE_CHECKING:
    import torch

    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .dataset_caches import CacheFiller, DatasetCaches


@dataclass(frozen=True)
class Poles:
    """Prompts beside a slider's own, as samples; only their conditioning counts.

    Attributes:
        positive, negative: the ends of the slider; None for an anchor.
        unconditional: the empty prompt.
    """

    positive: Sample | None
    negative: Sample | None
    unconditional: Sample


@dataclass(frozen=True)
class Sample:
    """One visit of an example.

    Attributes:
        latent: scaled, [1, C, ...].
        conditioning: the denoiser's; has no tensors if the text encoder runs at every step.
        weight: None, or the loss weights [1, 1, ...] of the latent's positions.
        caption: the text, if the text encoder runs at every step.
        factor: factor on the sample's loss; the prior weight for a class image.
        prior_target: None, or the same latent conditioned on the class prompt. Training preserves the frozen base's
            prediction for it.
        paired: None, or the scaled latent of the worse picture, in the same crop.
        poles: None, or the prompts of a slider that is trained without pictures. Its prior target is an anchor.
    """

    latent: torch.Tensor
    conditioning: Conditioning
    weight: torch.Tensor | None = None
    caption: str | None = None
    factor: float = 1.0
    prior_target: Sample | None = None
    paired: torch.Tensor | None = None
    poles: Poles | None = None


@dataclass(frozen=True)
class DatasetItem:
    """One crop of an example; it fetches its latent and its conditioning when needed.

    Attributes:
        name: the picture's name, for errors and the loss by picture.
        bucket: (width, height) in pixels.
        repeats: visits in an epoch.
        show: returns the sample of a visit, by the number of earlier visits in the run; by None, the unvaried sample.
        prior: whether it is a class image.
        has_prior_target: whether it has a prior target.
        frames: number of frames, 1 for a still.
    """

    name: str
    bucket: tuple[int, int]
    repeats: int
    show: Callable[[int | None], Sample]
    prior: bool = False
    has_prior_target: bool = False
    frames: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Key of items that can be batched, see `Crop.shape`."""
        return batch_shape(self.bucket, self.frames)

    @property
    def volume(self) -> int:
        """Number of pixels in all frames."""
        return self.bucket[0] * self.bucket[1] * self.frames


def slider_items(recipe: Recipe, host: Host, caches: DatasetCaches, filler: CacheFiller) -> list[DatasetItem]:
    """Encode the prompts that are not cached, and return an item for each row of prompts.

    Raises:
        ModelError: the model draws only with pictures, or text encoder and model do not belong together.
        SettingsError: the prompt of a sample picture names a source picture.
    """
    denoiser = host.denoiser
    if denoiser.conditioning_kind == HOLE:
        raise ModelError(
            "This model fills masked pictures, and a slider without pictures has none.",
            "Connect a dataset of pairs, or use another model.",
            "dataset",
        )
    if any(prompt.sources for prompt in read_prompts(recipe.preview_prompts)):
        raise SettingsError(
            "A prompt of a sample picture has a --c, but a slider without pictures takes none.",
            "Remove --c.",
            "options",
        )
    filler.fill_prompts(recipe.slider_texts)
    side = denoiser.geometry(recipe.resolution).side
    latent = denoiser.empty_latent((side, side))
    denoiser.check_inputs(latent, host.text.encode("") if caches.texts is None else caches.texts.get(""))
    # The prompts are few: keep their conditionings in memory.
    read = functools.cache(lambda text: {} if caches.texts is None else caches.texts.get(text))

    def sample(text: str, poles: Poles | None = None, anchor: Sample | None = None) -> Sample:
        conditioning = Conditioning(read(text), (side, side), (0, 0), (side, side))
        caption = text if caches.texts is None else None
        return Sample(latent, conditioning, caption=caption, prior_target=anchor, poles=poles)

    return [
        DatasetItem(
            name=f"{positive or 'nothing'} - {negative or 'nothing'}",
            bucket=(side, side),
            repeats=1,
            show=functools.partial(_show, recipe, place, sample),
            has_prior_target=bool(recipe.slider_anchors),
        )
        for place, (_, positive, negative) in enumerate(recipe.slider_prompts)
    ]


def _show(recipe: Recipe, place: int, sample: Callable[..., Sample], visit: int | None) -> Sample:
    """Return the sample of a row of prompts at a visit, with one of the anchors."""
    target, positive, negative = recipe.slider_prompts[place]
    unconditional = sample("")
    anchor = None
    if recipe.slider_anchors:
        number = stream_seed("anchor", recipe.seed, place, visit or 0) % len(recipe.slider_anchors)
        anchor = sample(recipe.slider_anchors[number], Poles(None, None, unconditional))
    return sample(target, Poles(sample(positive), sample(negative), unconditional), anchor)
