"""Layers of two adapters under one naming, by the weights of the model that they change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..formats.keys import layouts
from .difference import Difference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightSlice:
    """The rows of a weight that a layer of an adapter changes.

    Attributes:
        key: of the weight in the model.
        rows: number of its rows.
        start: first row of the part, None for the whole weight.
        reorder: returns the difference in the weight's order of rows, None if it has that order.
    """

    key: str
    rows: int
    start: int | None
    reorder: Callable[[torch.Tensor], torch.Tensor] | None


class Places(Protocol):
    """The places of layers in a model, and the names that its weights have in adapters."""

    def place(self, name: str) -> WeightSlice | None:
        """Return the place of a layer by its name in an adapter, None if the model has none."""

    def names(self, key: str) -> list[str]:
        """Return the names of layers that are a whole weight."""


def on_one_naming(given: list[dict[str, Difference]], places: Places) -> list[dict[str, Difference]]:
    """Return the layers of adapters with the names of the first that changes whole weights only."""
    by_key = [_by_key(layers, places) for layers in given]
    whole = next((index for index, layers in enumerate(given) if _is_whole(layers, places)), 0)
    own = {place.key: name for name in given[whole] if (place := places.place(name)) is not None}
    sample = next(iter(own.values()), "")
    return [{_name(key, own, sample, places): layer for key, layer in layers.items()} for layers in by_key]


def _is_whole(layers: dict[str, Difference], places: Places) -> bool:
    slices = [places.place(name) for name in layers]
    return all(place is not None and place.start is None for place in slices)


def _name(key: str, own: dict[str, str], sample: str, places: Places) -> str:
    if key in own:
        return own[key]
    names = places.names(key) or [key]
    start, layout = sample[:5], layouts([sample])
    alike = (name for name in names if name.startswith(start) and layouts([name]) == layout)
    return next(alike, names[0])


def _by_key(layers: dict[str, Difference], places: Places) -> dict[str, Difference]:
    parts: dict[str, list[Difference]] = {}
    for name, layer in layers.items():
        place = places.place(name)
        parts.setdefault(name if place is None else place.key, []).append(
            layer if place is None else _in_whole(layer, place)
        )
    return {key: _summed(pieces) for key, pieces in parts.items()}


def _in_whole(layer: Difference, place: WeightSlice) -> Difference:
    def placed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if place.reorder is not None:
            tensor = place.reorder(tensor)
        if place.start is None:
            return tensor
        full = tensor.new_zeros(place.rows, *tensor.shape[1:])
        full[place.start : place.start + len(tensor)] = tensor
        return full

    return Difference(placed(layer.up), layer.down, placed(layer.whole), placed(layer.bias), layer.certain)


def _summed(layers: list[Difference]) -> Difference:
    import torch

    if len(layers) == 1:
        return layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    held = [layer for layer in layers if layer.shape is not None]
    if all(layer.up is not None for layer in held):
        up, down = torch.cat([layer.up for layer in held], 1), torch.cat([layer.down for layer in held])
        return Difference(up, down, bias=bias)
    return Difference(whole=torch.stack([layer.value() for layer in held]).sum(0), bias=bias)
