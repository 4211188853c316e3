"""Training methods: adapter types, full fine-tuning and none. One file per method, registered here."""

from __future__ import annotations

from .base import Method
from .dora import DoRA
from .full import FullFineTune
from .ia3 import IA3
from .loha import LoHa
from .lokr import LoKr
from .lora import LoCon, LoRA, RsLoRA
from .none import NoMethod
from .oft import BOFT, OFT
from .pissa import PiSSA
from .variants.glora import GLoRA

__all__ = ["ADAPTERS", "METHODS", "Method"]

# The adapter types that the widget offers.
ADAPTERS: dict[str, Method] = {
    method.name: method
    for method in (LoRA(), LoCon(), DoRA(), RsLoRA(), PiSSA(), LoHa(), LoKr(), OFT(), BOFT(), IA3(), GLoRA())
}

METHODS: dict[str, Method] = {**ADAPTERS, FullFineTune.name: FullFineTune(), NoMethod.name: NoMethod()}
