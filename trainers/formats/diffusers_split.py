"""Conversion between a checkpoint's layers and diffusers', which may split a layer or order its rows differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..families import LayerSplit, SplitsOf
from .peft_config import place_of

if TYPE_CHECKING:
    import torch

    from .peft_format import PeftAdapter

_SAVED_MAGNITUDE = "lora_magnitude_vector"
_DOWN, _UP, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector.weight"

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


def joined(native: PeftAdapter, rows: Mapping[str, int], splits_of: SplitsOf) -> PeftAdapter:
    """Convert an adapter from diffusers' layers to a checkpoint's layers: the inverse of `split_layers`.

    Parts of a layer with one A give a LoRA of their rank, others one of the sum of their ranks. Both are exact.

    Args:
        native: the adapter, on diffusers' layers.
        rows: numbers of outputs of the checkpoint's layers to convert to, by path. Tensors of other layers stay.
        splits_of: returns diffusers' layers for a path in the checkpoint.

    Raises:
        ModelError: the parts of a layer have no such form together.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in native.tensors.items():
        place = place_of(name)
        end = name[len(place) + 1 :]
        # peft's files have another name for it than its modules.
        layers.setdefault(place, {})[_MAGNITUDE if end == _SAVED_MAGNITUDE else end] = tensor
    scales = dict(native.scales)
    for path, count in rows.items():
        splits = splits_of(path)
        parts = [(part, layers.pop(part.name)) for part in splits if part.name in layers]
        if parts:
            joint = _joint(path, count, len(splits), parts, native.scales)
            layers[path], scales[path] = joint if joint is not None else _renamed_part(path, count, parts, scales)
    tensors = {f"{place}.{end}": tensor for place, held in layers.items() for end, tensor in held.items()}
    return replace(native, tensors=tensors, scales=scales, is_split=False)


_Part = tuple[LayerSplit, "dict[str, torch.Tensor]"]


def _joint(
    path: str, count: int, whole: int, parts: list[_Part], scales: dict[str, float]
) -> tuple[dict[str, torch.Tensor], float] | None:
    """Return (tensors of a layer, its scale) from LoRAs of its parts, None if the only part is of another type.

    Args:
        count: number of the layer's outputs.
        whole: number of all of its parts.
    """
    import torch

    ends = {end for _, held in parts for end in held}
    is_lora = {_DOWN, _UP} <= ends <= {_DOWN, _UP, _MAGNITUDE} and all(held.keys() == ends for _, held in parts)
    if not is_lora and whole == 1:
        return None
    if not is_lora or (_MAGNITUDE in ends and len(parts) < whole):
        raise refuse_parts(path)
    held = [values for _, values in parts]
    factors = [scales[part.name] for part, _ in parts]
    shares_a = len(set(factors)) == 1 and all(torch.equal(values[_DOWN], held[0][_DOWN]) for values in held)
    if not shares_a:
        held = [{**values, _UP: values[_UP] * factor} for values, factor in zip(held, factors, strict=True)]
    ranks = [0 if shares_a else len(values[_DOWN]) for values in held]
    down = held[0][_DOWN] if shares_a else torch.cat([values[_DOWN] for values in held])
    joint = {_DOWN: down, _UP: held[0][_UP].new_zeros(count, len(down), *held[0][_UP].shape[2:])}
    if _MAGNITUDE in ends:
        joint[_MAGNITUDE] = held[0][_MAGNITUDE].new_zeros(count)
    for index, ((part, _), values) in enumerate(zip(parts, held, strict=True)):
        own = part.rows(torch.arange(count))
        if len(own) != len(values[_UP]):
            raise ModelError(
                f"The adapter to start from has {len(values[_UP])} rows for {part.name}, not {len(own)}.",
                "Choose an adapter for this model.",
                "start_from",
            )
        start = sum(ranks[:index])
        joint[_UP][own, start : start + values[_UP].shape[1]] = values[_UP]
        if _MAGNITUDE in ends:
            joint[_MAGNITUDE][own] = values[_MAGNITUDE].flatten()
    return joint, factors[0] if shares_a else 1.0


def _renamed_part(
    path: str, count: int, parts: list[_Part], scales: dict[str, float]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """Return (tensors of a layer, its scale) from its only part of any type, if it has the same order of rows."""
    import torch

    part, held = parts[0]
    if not torch.equal(part.rows(torch.arange(count)), torch.arange(count)):
        raise refuse_parts(path)
    return held, scales.get(part.name)


def refuse_parts(path: str) -> ModelError:
    """Return the error about parts of a layer that no adapter of the whole layer equals."""
    return ModelError(
        f"The adapter to start from has separate parts for {path}, which is one layer in this model. Graft can join "
        "LoRAs without biases, and DoRAs of all parts.",
        "Apply it with Graft Apply Adapter before the training node instead.",
        "start_from",
    )


def _split(name: str) -> tuple[str, str]:
    place, _, end = name.partition(".lora_")
    return place, f"lora_{end}"


def _renamed(config: dict[str, Any], splits: dict[str, tuple[LayerSplit, ...]]) -> dict[str, Any]:
    renamed = dict(config)
    for name in _LISTS:
        renamed[name] = sorted(part.name for path in config[name] for part in splits[path])
    for name in _PATTERNS:
        if config.get(name):
            renamed[name] = {part.name: value for path, value in config[name].items() for part in splits[path]}
    return renamed
