"""An adapter in memory: a dict of tensors in names the host reads, with metadata beside them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from ..errors import ModelError, RunError
from . import files
from .convert import host_names, host_tensors
from .keys import check_parts
from .metadata import stamped
from .peft_format import PeftAdapter, diffusers_form, read_native, write_diffusers, write_peft

if TYPE_CHECKING:
    import torch

    from .full_diff import FullDiff

# As the node offers them.
FORMATS = ("kohya", "diffusers", "peft")
# Characters; a layer's path has some hundred.
_LONGEST_KEY = 1000


class Adapter(dict):
    """Tensors by key, nothing else as items, so that the host's own nodes take it.

    Args:
        native: or what makes it when it is first asked for: peft takes a second to import, and few ask.

    Attributes:
        metadata: of the file.
        native: the same as peft has it; None where that is not known, and lost when another node copies the dict.
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
        """The adapter type that made it, None where the file does not say."""
        try:
            method = files.parse_json(self.metadata["graft_recipe"])["method"]
        except (KeyError, TypeError, ValueError):
            method = None
        if isinstance(method, str):
            return method
        return self.native.method if self.native is not None else None


class LazyAdapter(Mapping):
    """An adapter whose tensors are made one by one when they are asked for, and never lie beside one another.

    Attributes:
        metadata, native: as of an Adapter; there is no such native form.
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
        """All of it, as nodes hand it on; what it was made of is lost."""
        return Adapter(self._tensors.taken(), self.metadata)


def load_adapter(path: str) -> Adapter:
    """The adapter of a safetensors file of any layout, in the names the host reads.

    One of peft's types that the host has no form of comes without tensors, with its `native` form only.

    Raises:
        ModelError: the file holds no tensors, lacks what says how strong they are, or they do not fit each other.
        RunError: it cannot be read.
    """
    tensors, metadata = files.read_tensors(path)
    if not tensors:
        raise ModelError(f"The file '{path}' holds no tensors.", "Choose another adapter.", "adapter_name")
    longest = max(tensors, key=len)
    if len(longest) > _LONGEST_KEY:
        raise ModelError(
            f"The file '{path}' is no adapter: it holds a name of {len(longest)} characters.",
            "Choose another adapter.",
            "adapter_name",
        )
    for name, tensor in tensors.items():
        if not files.is_finite(tensor):
            raise ModelError(
                f"The file '{path}' is damaged: its {name} holds numbers that are not finite.",
                "Restore it, or choose another adapter.",
                "adapter_name",
            )
    native = read_native(path, tensors, metadata)
    named = host_names(tensors) if native is None else host_tensors(native)
    check_parts(named, f"The file '{path}'", "adapter_name")
    return Adapter(named, metadata, native)


def save_adapter(path: str, adapter: Mapping[str, torch.Tensor], title: str, format: str = "kohya") -> None:
    """Writes an adapter with `ss_*` and ModelSpec metadata.

    Adapters that carry no metadata (made by another node) are written all the same.

    Args:
        path: of the file, or with "peft" of the weights in the folder to be made.
        format: one of FORMATS.

    Raises:
        ModelError: the adapter has no such form, or is not whole.
        RunError: the file cannot be written, or is not what was written.
    """
    # Not asked for where the host's own form is wanted: it may have to be made.
    native = None if format == "kohya" else getattr(adapter, "native", None)
    if format != "kohya" and native is None:
        raise ModelError(
            f"The adapter carries nothing that could be saved as '{format}': it came from a file or another node.",
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
    written = sum(len(files.read_header(one).keys() - {"__metadata__"}) for one in paths)
    if written != len(tensors):
        raise RunError(f"The file '{path}' holds {written} of {len(tensors)} tensors.", "Save it again.")


def _check_whole(tensors: Mapping[str, torch.Tensor]) -> None:
    if not tensors:
        raise ModelError("The adapter is empty.", "Connect one that was trained.", "adapter")
    for name, tensor in tensors.items():
        if not files.is_finite(tensor):
            raise ModelError(
                f"The adapter's {name} is not finite.", "Train it again at a lower learning rate.", "adapter"
            )
