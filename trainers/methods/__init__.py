"""Training methods: adapter types, full fine-tuning and none. All are registered here."""

from .base import Method, NoMethod
from .dora import DoRA
from .full import FullFineTune
from .glora import GLoRA
from .ia3 import IA3
from .lora import LoCon, LoRA, RsLoRA
from .lycoris import LoHa, LoKr
from .oft import BOFT, OFT
from .pissa import PiSSA

__all__ = ["ADAPTERS", "METHODS", "Method"]

# The adapter types that the widget offers.
ADAPTERS: dict[str, Method] = {
    method.name: method
    for method in (LoRA(), LoCon(), DoRA(), RsLoRA(), PiSSA(), LoHa(), LoKr(), OFT(), BOFT(), IA3(), GLoRA())
}

METHODS: dict[str, Method] = {**ADAPTERS, FullFineTune.name: FullFineTune(), NoMethod.name: NoMethod()}
