"""The samples of one forward pass, with their draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..objective.custom import CustomDraw
    from ..preprocessing.items import Sample

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
