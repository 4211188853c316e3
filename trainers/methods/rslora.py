"""rsLoRA: LoRA at the scale alpha / sqrt(rank), which keeps large ranks learning (Kalajdzievski 2023)."""

from __future__ import annotations

from .lora import LoRA


class RsLoRA(LoRA):
    """The file says alpha * sqrt(rank), since readers divide by the rank."""

    name = "rsLoRA"
    variant = {"use_rslora": True}

    def scale(self, rank: int, alpha: float) -> float:
        """alpha / sqrt(rank)."""
        return alpha / rank**0.5
