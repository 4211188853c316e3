"""An adapter as peft has it, beside the form the host reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Native:
    """An adapter in peft's own terms.

    Attributes:
        method: key into the methods.
        config: what `adapter_config.json` holds.
        tensors: by `<module path>.<peft's name>`, float32 on the CPU.
        published: whether paths are those of the model as diffusers publishes it; otherwise the checkpoint's own.
        scales: by module path, the effective scale of the low-rank product; empty where there is none.
    """

    method: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    published: bool
    scales: dict[str, float]
