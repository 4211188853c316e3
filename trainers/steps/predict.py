"""Micro-batches, the predictions for their samples, and the weights and factors of their losses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..memory.autograd import OutOfPlace
from ..memory.transfer import upload

if TYPE_CHECKING:
    from ..objective.custom import CustomDraw
    from ..preprocessing.items import Sample
    from ..protocols import Host

# Called with sigma [B] and the native losses [B] without factors, both on the device.
Watch = Callable[[tuple[torch.Tensor, torch.Tensor]], None]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass, with their draws.

    Attributes:
        x0, noise: [B, C, ...].
        sigma: [B].
        custom: the draws of a custom objective, which then replaces the model's native loss; None for the native loss.
        is_padding: a repeated sample with loss factor 0, which only keeps the processes in lockstep.
        is_last: no other micro-batch of the batch follows; in a window, none of the window.
    """

    samples: list[Sample]
    x0: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    custom: CustomDraw | None = None
    is_padding: bool = False
    is_last: bool = False


def predict(host: Host, x_t: torch.Tensor, sigma: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    """Return the network's output for samples. Text encoders always add in place; their output is encoded here."""
    conditionings = [sample.conditioning for sample in encode_live(host, samples)]
    # Every operation passes through the mode: networks that do not need it compute without it.
    with OutOfPlace() if host.denoiser.adds_in_place else nullcontext():
        return host.denoiser.predict(x_t, sigma, conditionings)


def encode_live(host: Host, samples: list[Sample]) -> list[Sample]:
    """Return the samples with encoded captions. Encode each distinct caption once if the text encoder runs live."""
    captions = list(dict.fromkeys(sample.caption for sample in samples if sample.caption is not None))
    if not captions:
        return samples
    with OutOfPlace():
        encoded = dict(zip(captions, host.text.encode_live(captions), strict=True))
    return [
        sample
        if sample.caption is None
        else replace(sample, conditioning=replace(sample.conditioning, tensors=encoded[sample.caption]), caption=None)
        for sample in samples
    ]


def weights_of(samples: list[Sample], x0: torch.Tensor, outside: bool = False) -> torch.Tensor | None:
    """Return the loss weights [B, 1, ...] of the samples' positions; None if no sample has any.

    Args:
        outside: return 1 - the weights of the masks. Either way, frames without noise weigh nothing.
    """
    if all(sample.weight is None and sample.conditioning.first_frame is None for sample in samples):
        return None
    ones = torch.ones_like(x0[:1, :1])
    rows = []
    for sample in samples:
        row = ones if sample.weight is None else upload(sample.weight, ones.device).to(ones.dtype).expand_as(ones)
        row = 1 - row if outside else row
        if sample.conditioning.first_frame is not None:
            row = torch.cat([torch.zeros_like(row[:, :, :1]), row[:, :, 1:]], dim=2)
        rows.append(row)
    return torch.cat(rows)


def factors_of(samples: list[Sample], x0: torch.Tensor) -> torch.Tensor | float:
    """Return the factors of the samples' losses, [B] or 1."""
    if all(sample.factor == 1.0 for sample in samples):
        return 1.0
    return upload(torch.tensor([sample.factor for sample in samples]), x0.device)
