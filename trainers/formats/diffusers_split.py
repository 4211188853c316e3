"""Conversion between a checkpoint's layers and diffusers', which may split a layer or order its rows differently."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..families import LayerSplit, SplitsOf

if TYPE_CHECKING:
    from .peft_format import PeftAdapter

# peft's tensors with one row per output. A is not among them.
_BY_OUTPUT = ("lora_B.", "lora_magnitude_vector")
_LISTS = ("target_modules",)
_PATTERNS = ("rank_pattern", "alpha_pattern")


def with_splits(native: PeftAdapter, splits_of: SplitsOf) -> PeftAdapter:
    """Add diffusers' layers to an adapter. Return it unchanged if diffusers has no match for one of its layers.

    Args:
        native: the adapter, on the checkpoint's layers.
        splits_of: returns diffusers' layers for a path in the checkpoint, an empty tuple if there are none.
    """
    if native.published:
        return native
    splits = {place: splits_of(place) for place in {_split(name)[0] for name in native.tensors}}
    return replace(native, splits=splits) if all(splits.values()) else native


def split_layers(native: PeftAdapter) -> PeftAdapter:
    """Convert an adapter to diffusers' layers. Each part gets a copy of A and its own rows of B, which is exact."""
    tensors, scales = {}, {}
    for name, tensor in native.tensors.items():
        place, end = _split(name)
        for part in native.splits[place]:
            own = part.rows(tensor) if end.startswith(_BY_OUTPUT) else tensor
            tensors[f"{part.name}.{end}"] = own.contiguous().clone()
            if place in native.scales:
                scales[part.name] = native.scales[place]
    return replace(native, config=_renamed(native.config, native.splits), tensors=tensors, scales=scales, is_split=True)


def joined(native: PeftAdapter, paths: Iterable[str], splits_of: SplitsOf) -> PeftAdapter:
    """Convert an adapter from diffusers' layers to a checkpoint's layers: the inverse of `split`.

    Args:
        native: the adapter, on diffusers' layers.
        paths: paths of the checkpoint's layers to convert to. Tensors of other layers stay as they are.
        splits_of: returns diffusers' layers for a path in the checkpoint.

    Raises:
        ModelError: the parts of a layer were trained separately, each with its own A or scale.
    """
    import torch

    left = dict(native.tensors)
    tensors, scales = {}, dict(native.scales)
    for path in paths:
        splits = splits_of(path)
        names = [[name for name in left if _split(name)[0] == part.name] for part in splits]
        if not splits or not all(names):
            continue
        _refuse_separate_factors(path, splits, native)
        for name in names[0]:
            end = _split(name)[1]
            parts = [left.pop(f"{part.name}.{end}") for part in splits]
            if not end.startswith(_BY_OUTPUT):
                tensors[f"{path}.{end}"] = parts[0]
                continue
            whole = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype)
            for part, values in zip(splits, parts, strict=True):
                whole[part.rows(torch.arange(len(whole)))] = values
            tensors[f"{path}.{end}"] = whole
        scales[path] = native.scales.get(splits[0].name)
    return replace(native, tensors={**left, **tensors}, scales=scales, is_split=False)


def _refuse_separate_factors(path: str, splits: tuple[LayerSplit, ...], native: PeftAdapter) -> None:
    firsts = [native.tensors.get(f"{part.name}.lora_A.weight") for part in splits]
    alike = all(
        factor is not None and factor.shape == firsts[0].shape and bool((factor == firsts[0]).all())
        for factor in firsts
    )
    if not alike or len({native.scales.get(part.name) for part in splits}) > 1:
        raise ModelError(
            f"The adapter to start from has separate parts for {path}, which is one layer in this model.",
            "It was trained in diffusers. Apply it with Graft Apply Adapter before the training node instead.",
            "start_from",
        )


def _split(name: str) -> tuple[str, str]:
    """Split a tensor's name into (layer, rest): `a.b.lora_A.weight` gives (`a.b`, `lora_A.weight`)."""
    place, _, end = name.partition(".lora_")
    return place, f"lora_{end}"


def _renamed(config: dict[str, Any], splits: dict[str, tuple[LayerSplit, ...]]) -> dict[str, Any]:
    """Return peft's configuration with diffusers' names of the layers."""
    renamed = dict(config)
    for name in _LISTS:
        renamed[name] = sorted(part.name for path in config[name] for part in splits[path])
    for name in _PATTERNS:
        if config.get(name):
            renamed[name] = {part.name: value for path, value in config[name].items() for part in splits[path]}
    return renamed
