"""What is trainable: one file a method, registered here."""

from __future__ import annotations

from .all_weights import AllWeights
from .base import Method
from .boft import BOFT
from .dora import DoRA
from .frozen import Frozen
from .ia3 import IA3
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .oft import OFT
from .pissa import PiSSA
from .rslora import RsLoRA

__all__ = ["ADAPTERS", "METHODS", "Method"]

# The adapter types, as the widget offers them.
ADAPTERS: dict[str, Method] = {
    method.name: method for method in (LoRA(), LoCon(), DoRA(), RsLoRA(), PiSSA(), LoHa(), LoKr(), OFT(), BOFT(), IA3())
}

METHODS: dict[str, Method] = {**ADAPTERS, AllWeights.name: AllWeights(), Frozen.name: Frozen()}
