"""Full differences: trained minus base weights under the host's keys, computed one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def difference_key(name: str, names: Collection[str], name_of: Callable[[str], str]) -> str:
    """Return the host's key for the difference of a parameter.

    The host finds a layer by its `.weight`: `.diff` belongs to the weight and `.diff_b` to the bias of the same layer.
    It finds all other parameters, such as the scale of a norm, by their full names.

    Args:
        name: name of the parameter in its module tree.
        name_of: returns the name of a path in the file.
    """
    path, _, leaf = name.rpartition(".")
    if leaf == "weight":
        return f"{name_of(path)}.diff"
    if leaf == "bias" and f"{path}.weight" in names:
        return f"{name_of(path)}.diff_b"
    return f"{name_of(name)}.diff"


class FullDiff(Mapping):
    """Mapping from the host's keys to trained minus base weights, float32 on the CPU.

    It computes each difference on access, because together they are as large as the model.
    """

    def __init__(self, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]):
        self._pairs = pairs

    @classmethod
    def joined(cls, parts: Iterable[FullDiff]) -> FullDiff:
        """Merge the differences of several module trees."""
        return cls({key: pair for part in parts for key, pair in part._pairs.items()})

    def __getitem__(self, key: str) -> torch.Tensor:
        trained, base = (_plain(tensor) for tensor in self._pairs[key])
        return (trained - base).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def on_meta(self) -> dict[str, torch.Tensor]:
        """Return tensors of the differences' shapes without values."""
        import torch

        return {
            key: torch.empty(base.shape, dtype=torch.float32, device="meta") for key, (_, base) in self._pairs.items()
        }

    def taken(self) -> dict[str, torch.Tensor]:
        """Compute all differences. They overwrite the trained values, except where those need a copy first."""
        differences: dict[str, torch.Tensor] = {}
        first: dict[int, str] = {}
        for key, (trained, base) in self._pairs.items():
            if id(trained) in first:
                # Two layers share this weight. The file holds it under both names.
                differences[key] = differences[first[id(trained)]].clone()
                continue
            first[id(trained)] = key
            values = _plain(trained)
            if not values.is_contiguous():
                values = values.contiguous()
            differences[key] = values.sub_(_plain(base))
        return differences


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values as float32 on the CPU. A tensor that is float32 on the CPU keeps its memory."""
    import torch

    return tensor.detach().to("cpu", torch.float32)
