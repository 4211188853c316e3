"""Dataset items: examples that give a sample for each visit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..protocols import Conditioning


@dataclass(frozen=True)
class Sample:
    """One showing of an example.

    Attributes:
        latent: scaled, [1, C, ...].
        conditioning: what it is conditioned on; without tensors where the text is encoded at every step.
        weight: None, or the loss weights [1, 1, ...] of the latent's positions.
        caption: the text, where it is encoded at every step.
        factor: on its loss; the prior weight for a class image.
        anchor: None, or the same latent conditioned on its class prompt, what the frozen base predicts for which is to
            be preserved.
    """

    latent: torch.Tensor
    conditioning: Conditioning
    weight: torch.Tensor | None = None
    caption: str | None = None
    factor: float = 1.0
    anchor: Sample | None = None


@dataclass(frozen=True)
class DatasetItem:
    """One example, ready: everything but its latent and text, which are fetched when needed.

    Attributes:
        name: for errors.
        bucket: (width, height) in pixels; items of one bucket can be batched.
        repeats: how often an epoch shows it.
        show: gives a showing by its turn, how often the run showed the item before; by None the one that never varies.
        prior: whether it is a class image.
        anchored: whether what the frozen base predicts for a prompt of its own is preserved beside it.
    """

    name: str
    bucket: tuple[int, int]
    repeats: int
    show: Callable[[int | None], Sample]
    prior: bool = False
    anchored: bool = False
