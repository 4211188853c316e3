"""Adapters in memory: a dict of tensors under the host's keys, with metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import ModelError, RunError
from . import files, json_files
from .convert import host_names, host_tensors
from .embedding import take_bundled
from .forms import file_form, native_form
from .keys import DORA, check_parts
from .kohya import as_dora, host_form
from .metadata import stamped
from .peft_format import DIFFUSERS_CONFIG, PeftAdapter, peft_files, read_native, write_diffusers, write_peft

if TYPE_CHECKING:
    import torch

    from .full_diff import FullDiff

FORMATS = ("kohya", "diffusers", "peft", "LyCORIS")
# Maximum length of a key in characters. A layer's path has about a hundred.
_LONGEST_KEY = 1000


class Adapter(dict):
    """Tensors by key. The dict has no other items, so that the host's own nodes accept it.

    Args:
        tensors: tensors under the host's keys.
        native: the adapter in peft's form, or a function that creates it on first access. Importing peft takes a
            second, and few callers need this form.
        bundled: tensors of embeddings that the file carries along, by their keys.

    Attributes:
        bundled: those tensors; they are no part of the dict.
        native: the adapter in peft's form. None if it is unknown; lost if another node copies the dict.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        metadata: dict[str, str] | None = None,
        native: PeftAdapter | Callable[[], PeftAdapter | None] | None = None,
        bundled: dict[str, torch.Tensor] | None = None,
    ):
        super().__init__(tensors)
        self.metadata = dict(metadata or {})
        self.bundled = dict(bundled or {})
        self._native = native

    def __contains__(self, key: object) -> bool:
        """Report whether there is a tensor of this name. ComfyUI's loader asks that first.

        Raises:
            ModelError: the adapter has only peft's form, of which ComfyUI's loader would use nothing.
        """
        if not len(self) and self.native is not None:
            raise ModelError(
                f"Only Graft's nodes can apply this adapter: {self.native.method} in peft's form needs the model's "
                "weights.",
                "Connect it to Graft Apply Adapter.",
                "adapter",
            )
        return super().__contains__(key)

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

    def on_meta(self) -> dict[str, torch.Tensor]:
        """Return tensors of its names and shapes without values, for checks that need no more."""
        return self._tensors.on_meta()

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
    tensors, bundled = take_bundled(tensors)
    if not tensors:
        raise ModelError(f"The file '{path}' holds embeddings only.", "Choose another adapter.", "adapter_name")
    native = read_native(path, tensors, metadata)
    check_parts(tensors, f"The file '{path}'", "adapter_name")
    named = host_names(tensors) if native is None else host_tensors(native)
    check_parts(named, f"The file '{path}'", "adapter_name")
    return Adapter(host_form(named, metadata), metadata, native, bundled)


def as_adapter(tensors: Mapping[str, torch.Tensor]) -> Adapter:
    """Return an adapter from a connection as it is, or tensors of another node with the host's keys.

    Raises:
        ModelError: it has no tensors, or values that are not finite.
    """
    if isinstance(tensors, Adapter):
        adapter = tensors
    else:
        held = host_names(dict(tensors))
        # Magnitudes in another node's dict are for ComfyUI's formula, as Apply Adapter reads them.
        is_dora = any(key.endswith(DORA) for key in held)
        adapter = Adapter(host_form(held, {}), as_dora({}) if is_dora else {})
    if not adapter and adapter.native is None:
        raise ModelError("The adapter is empty.", "Connect a trained adapter.", "adapter")
    _check_finite(adapter)
    return adapter


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
    if not adapter and getattr(adapter, "native", None) is None:
        raise ModelError("The adapter is empty.", "Connect a trained adapter.", "adapter")
    known = {name: value for name, value in getattr(adapter, "metadata", {}).items() if name != DIFFUSERS_CONFIG}
    if format in ("kohya", "LyCORIS"):
        tensors, fields = file_form(adapter, format)
        _check_finite(tensors)
        metadata = stamped({**known, **fields}, tensors, title)
        files.write_tensors(path, tensors, metadata)
        _check_written([path], len(tensors))
        return
    native = native_form(adapter, format)
    tensors = native.all_tensors()
    _check_finite(tensors)
    metadata = stamped(known, tensors, title)
    if format == "peft":
        paths = write_peft(os.path.dirname(path), native, metadata)
        _check_written(paths, sum(map(len, peft_files(native).values())))
    else:
        write_diffusers(path, native, metadata)
        _check_written([path], len(tensors))


def _check_written(paths: list[str], count: int) -> None:
    written = sum(len(files.read_header(file).keys() - {"__metadata__"}) for file in paths)
    if written != count:
        raise RunError(f"The file '{paths[0]}' holds {written} of {count} tensors.", "Save it again.")


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if not files.is_finite(tensor):
            raise ModelError(
                f"The adapter's tensor {name} is not finite.", "Train it again at a lower learning rate.", "adapter"
            )
