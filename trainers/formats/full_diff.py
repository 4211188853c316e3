"""Whole differences: what changed of each weight, in the names the host reads, made one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def difference_key(name: str, names: Collection[str], name_of: Callable[[str], str]) -> str:
    """The host's key for the difference of a parameter.

    The host finds a layer by its `.weight`; `.diff` is then of the weight and `.diff_b` of the bias beside it. All
    other parameters, such as the scale of a norm, it finds by their whole names.

    Args:
        name: of the parameter in its tree.
        names: of all parameters of the tree.
        name_of: a path's name in the file.
    """
    path, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return f"{name_of(path)}.diff"
    if leaf == "bias" and f"{path}.weight" in names:
        return f"{name_of(path)}.diff_b"
    return f"{name_of(name)}.diff"


class FullDiff(Mapping):
    """Trained minus base by the host's key, float32 on the CPU.

    Each is made when it is asked for: together they weigh as much as the model.
    """

    def __init__(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        self._pairs = pairs

    @classmethod
    def joined(cls, parts: Iterable[FullDiff]) -> FullDiff:
        """Those of several trees together."""
        return cls({key: pair for part in parts for key, pair in part._pairs.items()})

    def __getitem__(self, key: str) -> torch.Tensor:
        trained, base = (_plain(tensor) for tensor in self._pairs[key])
        return (trained - base).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def taken(self) -> dict[str, torch.Tensor]:
        """All of them, each in the place of its trained values wherever these can become it; those are lost."""
        made: dict[str, torch.Tensor] = {}
        first: dict[int, str] = {}
        for key, (trained, base) in self._pairs.items():
            if id(trained) in first:
                # A weight that two layers share: files hold it under both names.
                made[key] = made[first[id(trained)]].clone()
                continue
            first[id(trained)] = key
            values = _plain(trained)
            if not values.is_contiguous():
                values = values.contiguous()
            made[key] = values.sub_(_plain(base))
        return made


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, float32 on the CPU; itself where it is that already."""
    import torch

    return tensor.detach().to("cpu", torch.float32)
