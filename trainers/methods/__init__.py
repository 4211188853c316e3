"""What is trainable: one file a method, registered here."""

from __future__ import annotations

from .base import Method
from .boft import BOFT
from .dora import DoRA
from .ia3 import IA3
from .locon import LoCon
from .loha import LoHa
from .lokr import LoKr
from .lora import LoRA
from .oft import OFT
from .pissa import PiSSA
from .rslora import RsLoRA

METHODS: dict[str, Method] = {
    method.name: method for method in (LoRA(), LoCon(), DoRA(), RsLoRA(), PiSSA(), LoHa(), LoKr(), OFT(), BOFT(), IA3())
}
