"""An adapter in memory: a dict of tensors in names the host reads, with metadata beside them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..errors import ModelError
from . import files

if TYPE_CHECKING:
    import torch

    from .native import Native


class Adapter(dict):
    """Tensors by key, nothing else as items, so that the host's own nodes take it.

    Attributes:
        metadata: of the file.
        native: the same as peft has it; None where that is not known, and lost when another node copies the dict.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
        native: Native | None = None,
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.native = native

    def made_by(self) -> str | None:
        """The adapter type that made it, None where the file does not say."""
        if self.native is not None:
            return self.native.method
        try:
            return json.loads(self.metadata["graft_recipe"])["method"]
        except (KeyError, TypeError, ValueError):
            return None


def load_adapter(path: str) -> Adapter:
    """The adapter of a safetensors file.

    Raises:
        ModelError: the file holds no tensors.
        RunError: it cannot be read.
    """
    tensors, metadata = files.read_tensors(path)
    if not tensors:
        raise ModelError(f"The file '{path}' holds no tensors.", "Choose another adapter.", "adapter_name")
    return Adapter(tensors, metadata)


def save_adapter(path: str, adapter: dict[str, torch.Tensor], title: str) -> None:
    """Writes an adapter in kohya's layout with `ss_*` and ModelSpec metadata.

    Adapters that carry no metadata (made by another node) are written all the same.
    """
    from .metadata import stamped

    metadata = stamped(getattr(adapter, "metadata", {}), dict(adapter), title)
    files.write_tensors(path, dict(adapter), metadata)
