"""Dataset items, and the samples that they give for each visit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.buckets import batch_shape

if TYPE_CHECKING:
    import torch

    from ..protocols import Conditioning


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
