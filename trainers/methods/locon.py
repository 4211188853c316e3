"""LoRA with conv, the field's LoCon: the same difference on convolutions too (Yeh et al. 2023)."""

from __future__ import annotations

from .lora import LoRA


class LoCon(LoRA):
    """LoRA on every Linear and every convolution, unless the targets say otherwise."""

    name = "LoRA with conv"
    default_targets = "linear + conv"
