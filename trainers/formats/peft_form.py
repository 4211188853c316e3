"""Adapters in peft's form from tensors with the host's names, for files that come without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..families import LayerSplit
from .keys import ALPHA, BIAS, DORA, DOWN, MID, UP, split
from .kohya import plain_factors
from .layer_paths import LayerPath, family_of_layers, place_of
from .peft_format import PeftAdapter
from .published_layers import diffusers_path, has_layer, is_swapped, joint_path, splits_of

if TYPE_CHECKING:
    import torch

_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_METHODS = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr"}
_BY_OUTPUT = ("lora_B.weight", "lora_B.bias", "lora_magnitude_vector.weight", "hada_w1_a", "hada_w2_a")
_WRAPPER = "text_model."


@dataclass(frozen=True)
class _Layer:
    """A layer in peft's form.

    Attributes:
        kind: peft's name of the adapter type.
        values: tensors by peft's name.
        rank: peft's rank of the layer.
        scale: effective scale of the difference.
        shape: (outputs, inputs).
        factor: LoKr's `decompose_factor`, else 0.
    """

    kind: str
    values: dict[str, torch.Tensor]
    rank: int
    scale: float
    shape: tuple[int, int]
    factor: int = 0


def peft_form(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], format: str) -> PeftAdapter:
    """Convert an adapter to peft's form, with diffusers' names of the layers where they are known.

    Args:
        tensors: tensors with the host's names. A `dora_scale` has its maker's own value.
        format: the format to save, for errors and for the names: "diffusers" has no others.

    Raises:
        ModelError: peft or diffusers has no form for a layer.
    """
    held, others = split(dict(tensors))
    if others:
        raise _refusal(format, others[0], "belongs to no layer that Graft knows")
    places = {name: place_of(name) for name in held}
    family = family_of_layers(held, metadata)
    layers = {place: _layer(name, held[name], format) for name, place in places.items()}
    if len(layers) < len(held):
        raise _refusal(
            format,
            next(name for name in held if [*places.values()].count(places[name]) > 1),
            "is in the file twice, under two names",
        )
    _check_alike(layers, format)
    splits = {place: _splits(family, place, layer) for place, layer in layers.items()}
    unknown = next((place for place, names in splits.items() if not names and not place.component), None)
    if unknown and format == "diffusers":
        raise _refusal(format, unknown.path, "has no counterpart in diffusers that Graft knows")
    if unknown:
        invented = next((name for name, place in places.items() if not _has_path(family, name, place)), None)
        if invented:
            raise _refusal(format, invented, "belongs to no model that Graft knows, so its path is uncertain")
        splits = {place: (LayerSplit(place.path, _same),) for place in splits}
    parts = {}
    for component in dict.fromkeys(place.component for place in layers):
        own = {place.path: layer for place, layer in layers.items() if place.component == component}
        names = {path: splits[LayerPath(component, path)] for path in own}
        parts[component] = _adapter(own, names, published=bool(component) or family in ("SD1", "SDXL"))
    if "" not in parts:
        raise ModelError(
            f"The adapter has layers of text encoders only, which Graft does not save as '{format}'.",
            "Choose 'kohya' or 'LyCORIS'.",
            "format",
        )
    denoiser = parts.pop("")
    is_split = not unknown and not denoiser.published
    return PeftAdapter(**{**vars(denoiser), "text": parts, "is_split": is_split, "published": denoiser.published})


def _refusal(format: str, name: str, why: str) -> ModelError:
    return ModelError(
        f"Graft cannot save this adapter as '{format}': {name[:200]} {why}.",
        "Choose 'LyCORIS' or 'kohya', or connect the training node itself.",
        "format",
    )


def _layer(name: str, held: dict[str, torch.Tensor], format: str) -> _Layer:
    ends = held.keys() - {ALPHA}
    if {UP, DOWN} <= ends <= {UP, DOWN, MID, DORA, BIAS}:
        layer = _lora(name, held, format)
    elif ends == {*_LOHA}:
        rank = held["hada_w1_b"].shape[0]
        shape = (held["hada_w1_a"].shape[0], held["hada_w1_b"].shape[1])
        layer = _Layer("LOHA", {end: held[end] for end in _LOHA}, rank, _alpha(held, rank) / rank, shape)
    elif ends <= {*_LOKR}:
        layer = _lokr(name, held, format)
    else:
        raise _refusal(format, name, f"holds {', '.join(sorted(ends))}, which peft has no form for")
    return layer


def _alpha(held: dict[str, torch.Tensor], rank: int) -> float:
    return float(held[ALPHA]) if ALPHA in held else float(rank)


def _lora(name: str, held: dict[str, torch.Tensor], format: str) -> _Layer:
    down, up, scale = plain_factors(held)
    if down.dim() == 4 and up.dim() == 2:
        up = up[:, :, None, None]
    values = {"lora_A.weight": down, "lora_B.weight": up}
    if DORA in held:
        magnitude = held[DORA].float()
        if magnitude.numel() != up.shape[0] or magnitude.shape[0] != up.shape[0]:
            raise _refusal(format, name, "is a DoRA with magnitudes of its inputs, and peft's are of outputs")
        values["lora_magnitude_vector.weight"] = magnitude.view(1, -1, 1, 1) if down.dim() == 4 else magnitude.flatten()
    if BIAS in held:
        # peft multiplies the bias by the scale as well.
        values["lora_B.bias"] = held[BIAS].float() / scale
    return _Layer("LORA", values, down.shape[0], scale, (up.shape[0], down.shape[1]))


def _lokr(name: str, held: dict[str, torch.Tensor], format: str) -> _Layer:
    """Convert a LoKr. peft derives the shapes of the factors from `decompose_factor`, and has one for all layers."""
    values = {end: held[end] for end in _LOKR if end in held}
    ranked = next((values[end] for end in ("lokr_w2_b", "lokr_w1_b") if end in values), None)
    first, second = (
        (held[whole].shape[:2] if whole in held else (held[f"{whole}_a"].shape[0], held[f"{whole}_b"].shape[1]))
        for whole in ("lokr_w1", "lokr_w2")
    )
    shape = (first[0] * second[0], first[1] * second[1])
    # Without a rank, peft keeps the second factor whole from half of its size on, and its scale has to be one.
    rank = max(second) if ranked is None else ranked.shape[0]
    scale = 1.0 if ranked is None else _alpha(held, rank) / rank
    factors = [factor for factor in (-1, max(first), max(second)) if _factorized(shape, factor) == tuple(first)]
    if not factors:
        raise _refusal(format, name, f"has a first factor {list(first)}, which peft does not make")
    return _Layer("LOKR", values, rank, scale, shape, factors[0])


def _factorized(shape: tuple[int, int], factor: int) -> tuple[int, ...]:
    from peft.tuners.lokr.layer import factorization

    return tuple(factorization(size, factor)[0] for size in shape)


def _check_alike(layers: dict[LayerPath, _Layer], format: str) -> None:
    """Refuse layers that one configuration of peft cannot describe together."""
    first_place, first = next(iter(layers.items()))
    for place, layer in layers.items():
        is_alike = (layer.kind, layer.factor) == (first.kind, first.factor)
        has_magnitude = ["lora_magnitude_vector.weight" in each.values for each in (first, layer)]
        if not is_alike or has_magnitude[0] != has_magnitude[1]:
            raise _refusal(format, place.path, f"has another type than {first_place.path}, and peft has one for all")
        if ("lora_B.bias" in first.values) != ("lora_B.bias" in layer.values):
            raise _refusal(
                format, place.path, f"or {first_place.path} changes a bias, and peft has one for all or none"
            )
        if place.component not in ("", "text_encoder", "text_encoder_2"):
            raise _refusal(format, place.path, "belongs to a text encoder that the format has no place for")


def _splits(family: str, place: LayerPath, layer: _Layer) -> tuple[LayerSplit, ...]:
    if place.component:
        inner = place.path.removeprefix(_WRAPPER)
        return (LayerSplit(inner if place.component == "text_encoder" else _WRAPPER + inner, _same),)
    if family in ("SD1", "SDXL"):
        path = diffusers_path(place.path)
        return (LayerSplit(path, _same),) if path else ()
    splits = splits_of(family, place.path, *layer.shape)
    if not splits and joint_path(family, place.path) is not None:
        return (LayerSplit(place.path, _same),)
    # The rows of a LoKr are products of two factors' rows, so that nothing short of all keeps their form.
    is_whole = len(splits) == 1 and not is_swapped(family, place.path, *layer.shape)
    return splits if layer.kind != "LOKR" or is_whole else ()


def _has_path(family: str, name: str, place: LayerPath) -> bool:
    """Report whether the path of a layer is certain. Names without dots have one only in networks that are known."""
    if place.component or "." in name:
        return True
    if family in ("SD1", "SDXL"):
        return diffusers_path(place.path) is not None
    return has_layer(family, place.path)


def _same(values: torch.Tensor) -> torch.Tensor:
    return values


def _adapter(layers: dict[str, _Layer], splits: dict[str, tuple[LayerSplit, ...]], published: bool) -> PeftAdapter:
    tensors, ranks, scales = {}, {}, {}
    for path, layer in layers.items():
        for part in splits[path]:
            for end, tensor in layer.values.items():
                rows = _rows(end, tensor, part)
                tensors[f"{part.name}.{end}"] = rows.float().contiguous().clone()
            ranks[part.name], scales[part.name] = layer.rank, layer.scale
    first = next(iter(layers.values()))
    is_dora = "lora_magnitude_vector.weight" in first.values
    method = "DoRA" if is_dora else _METHODS[first.kind]
    return PeftAdapter(method, _config(layers, ranks, scales), tensors, published, scales)


def _rows(end: str, tensor: torch.Tensor, part: LayerSplit) -> torch.Tensor:
    if end not in _BY_OUTPUT:
        return tensor
    is_spatial_magnitude = end == "lora_magnitude_vector.weight" and tensor.dim() == 4
    return tensor if is_spatial_magnitude else part.rows(tensor)


def _config(layers: dict[str, _Layer], ranks: dict[str, int], scales: dict[str, float]) -> dict[str, Any]:
    import peft

    first = next(iter(layers.values()))
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {name: scales[name] * ranks[name] for name in ranks}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    patterns = {
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
    if first.kind == "LORA":
        values = [layer.values for layer in layers.values()]
        more = {
            "use_dora": "lora_magnitude_vector.weight" in first.values,
            "lora_bias": any("lora_B.bias" in held for held in values),
        }
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, **patterns, **more)
    elif first.kind == "LOHA":
        config = peft.LoHaConfig(r=rank, alpha=alpha, **patterns)
    else:
        is_decomposed = any("lokr_w1_a" in layer.values for layer in layers.values())
        factor = {"decompose_both": is_decomposed, "decompose_factor": first.factor}
        config = peft.LoKrConfig(r=rank, alpha=alpha, **patterns, **factor)
    fields = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {**fields, "inference_mode": True}
