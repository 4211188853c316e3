"""What is trainable: one file a method, registered here."""

from __future__ import annotations

from .base import Method
from .frozen import Frozen
from .lora import LoRA

METHODS: dict[str, Method] = {method.name: method for method in (LoRA(), Frozen())}
