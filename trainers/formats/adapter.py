"""Adapters in memory: a dict of tensors under the host's keys, with metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import ModelError, RunError
from . import files, json_files
from .convert import host_names, host_tensors
from .keys import check_parts
from .metadata import stamped
from .peft_format import PeftAdapter, diffusers_form, read_native, write_diffusers, write_peft

if TYPE_CHECKING:
    import torch

    from .full_diff import FullDiff

# Values of the node's `format` input.
FORMATS = ("kohya", "diffusers", "peft")
# Maximum length of a key in characters. A layer's path has about a hundred.
_LONGEST_KEY = 1000


class Adapter(dict):
    """Tensors by key. The dict has no other items, so that the host's own nodes accept it.

    Args:
        tensors: tensors under the host's keys.
        metadata: metadata of the file.
        native: the adapter in peft's form, or a function that creates it on first access. Importing peft takes a
            second, and few callers need this form.

    Attributes:
        metadata: metadata of the file.
        native: the adapter in peft's form. None if it is unknown; lost if another node copies the dict.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
        native: PeftAdapter | Callable[[], PeftAdapter | None] | None = None,
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self._native = native

    @property
    def native(self) -> PeftAdapter | None:
        if callable(self._native):
            self._native = self._native()
        return self._native

    def made_by(self) -> str | None:
        """Return the training method that made the adapter, None if the file does not name it."""
        try:
            method = json_files.parse_json(self.metadata["graft_recipe"])["method"]
        except (KeyError, TypeError, ValueError):
            method = None
        if isinstance(method, str):
            return method
        return self.native.method if self.native is not None else None


class LazyAdapter(Mapping):
    """Adapter that computes each tensor on access and never holds two of them at once.

    Attributes:
        metadata: metadata of the file.
        native: always None, because it has no peft form.
    """

    native = None

    def __init__(self, tensors: FullDiff, metadata: dict[str, str]):
        self._tensors = tensors
        self.metadata = metadata

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def taken(self) -> Adapter:
        """Compute all tensors and return them as an Adapter. The trained weights are overwritten."""
        return Adapter(self._tensors.taken(), self.metadata)


def load_adapter(path: str) -> Adapter:
    """Load an adapter from a safetensors file of any layout and convert it to the host's keys.

    If the host has no form for an adapter type of peft's, the result has no tensors, only its `native` form.

    Raises:
        ModelError: the file holds no tensors, has no scale for a layer, or has tensors that do not fit each other.
        RunError: the file cannot be read.
    """
    tensors, metadata = files.read_tensors(path)
    if not tensors:
        raise ModelError(f"The file '{path}' holds no tensors.", "Choose another adapter.", "adapter_name")
    longest = max(tensors, key=len)
    if len(longest) > _LONGEST_KEY:
        raise ModelError(
            f"The file '{path}' is not an adapter: it has a key of {len(longest)} characters.",
            "Choose another adapter.",
            "adapter_name",
        )
    for name, tensor in tensors.items():
        if not files.is_finite(tensor):
            raise ModelError(
                f"The file '{path}' is damaged: its tensor {name} has values that are not finite.",
                "Restore it, or choose another adapter.",
                "adapter_name",
            )
    native = read_native(path, tensors, metadata)
    named = host_names(tensors) if native is None else host_tensors(native)
    check_parts(named, f"The file '{path}'", "adapter_name")
    return Adapter(named, metadata, native)


def save_adapter(path: str, adapter: Mapping[str, torch.Tensor], title: str, format: str = "kohya") -> None:
    """Write an adapter with `ss_*` and ModelSpec metadata.

    Accepts adapters without metadata too, which other nodes make.

    Args:
        path: path of the file; for "peft", of the weight file in the folder to create.
        adapter: tensors under the host's keys.
        title: title for the metadata.
        format: one of FORMATS.

    Raises:
        ModelError: the adapter has no such form, is empty or is not finite.
        RunError: the file cannot be written, or does not hold all tensors afterwards.
    """
    # Do not access `native` for "kohya": the access may have to create it.
    native = None if format == "kohya" else getattr(adapter, "native", None)
    if format != "kohya" and native is None:
        raise ModelError(
            f"Graft cannot save this adapter as '{format}': it came from a file or another node.",
            "Connect the training node itself, or choose 'kohya'.",
            "format",
        )
    if format == "diffusers":
        native = diffusers_form(native)
    tensors = adapter if format == "kohya" else native.all_tensors()
    _check_whole(tensors)
    metadata = stamped(getattr(adapter, "metadata", {}), tensors, title)
    paths = [path]
    if format == "peft":
        paths = write_peft(os.path.dirname(path), native, metadata)
    elif format == "diffusers":
        write_diffusers(path, native, metadata)
    else:
        files.write_tensors(path, tensors, metadata)
    written = sum(len(files.read_header(file).keys() - {"__metadata__"}) for file in paths)
    if written != len(tensors):
        raise RunError(f"The file '{path}' holds {written} of {len(tensors)} tensors.", "Save it again.")


def _check_whole(tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise ModelError("The adapter is empty.", "Connect a trained adapter.", "adapter")
    for name, tensor in tensors.items():
        if not files.is_finite(tensor):
            raise ModelError(
                f"The adapter's tensor {name} is not finite.", "Train it again at a lower learning rate.", "adapter"
            )
