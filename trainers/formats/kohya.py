"""Adapter tensors with kohya's names, such as `<module>.lora_down.weight`, and kohya's metadata of their network.

Sources: sd-scripts (networks/lora.py, train_network.py) and LyCORIS (lycoris/kohya.py) for names and arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .json_files import parse_json
from .keys import (
    ALPHA,
    BIAS,
    DORA,
    DOWN,
    MID,
    UP,
    WHOLE,
    common_name,
    is_text,
    layer_keys,
    misfit_of_parts,
    shape_of,
    split,
)
from .layer_paths import LayerPath, family_of_layers, place_of
from .published_layers import CHECKPOINT_BLOCKS, is_swapped, joint_path, original_path

if TYPE_CHECKING:
    import torch

    from .adapter import Adapter
    from .keys import Layers

_KOHYA = ("lora_unet_", "lora_te")
# Prefixes of files that name the layers of transformers as diffusers does.
_PUBLISHED = ("transformer.", "lora_transformer_", "lycoris_", "base_model.model.", "lora_unet_", "unet.")
_PUBLISHED += ("diffusion_model.",)
_WRAPPER = "text_model."
_ATTENTION = 3
# Rows per input of the part with Flux's feed-forward layer.
_MLP_RATIO = 4

_SD_SCRIPTS, _LYCORIS = "networks.lora", "lycoris.kohya"
LYCORIS_NETWORK = {"ss_network_module": _LYCORIS}
_ALGORITHMS = {"hada_": "loha", "lokr_": "lokr", "oft_": "diag-oft", "a1.": "glora"}
RANKED = (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "b2.weight")
# Layers outside the blocks, which sd-scripts' networks.lora has no place for.
_OUTSIDE = re.compile(
    r"(conv_in|conv_out|time_embedding|add_embedding|input_blocks_0_0|time_embed|label_emb|out_\d|final_layer)(_|$)"
)


def to_kohya(layers: dict[str, dict[str, torch.Tensor]], name_of: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter file.

    Args:
        layers: tensors by module path and key suffix: {path: {"lora_down.weight": tensor, "alpha": tensor, ...}}.
        name_of: returns the name of a module path in the file.

    Returns:
        Contiguous float32 tensors on the CPU that share no memory.
    """
    tensors = {}
    for path in sorted(layers):
        name = name_of(path)
        for end, tensor in layers[path].items():
            tensors[f"{name}.{end}"] = own(tensor)
    return tensors


def lora_tensors(down: torch.Tensor, up: torch.Tensor, alpha: float) -> dict[str, torch.Tensor]:
    """Return the tensors of a LoRA layer by key suffix.

    Args:
        down: [r, in, ...].
        up: [out, r, ...].
        alpha: the layer's effective scale is alpha / r.
    """
    import torch

    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))}


def plain_factors(held: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return (A, B, scale) of a LoRA layer, float32. A Tucker core becomes a part of A, which keeps the rank.

    Args:
        held: tensors of the layer by kohya's key suffix.
    """
    import torch

    down, up = held[DOWN].float(), held[UP].float()
    scale = float(held[ALPHA]) / len(down) if ALPHA in held else 1.0
    if MID in held:
        down = torch.einsum("mn...,ni->mi...", held[MID].float(), down.flatten(1))
    return down, up, scale


def own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous float32 copy on the CPU that shares no memory with the tensor."""
    import torch

    return tensor.detach().to("cpu", torch.float32).contiguous().clone()


def kohya_form(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return an adapter under kohya's names, and diffusers' parts of a checkpoint's layer as one layer.

    Keeps names that kohya's trainers have no other name for. LoRA parts with one A give a layer of their rank, others
    a layer of the sum of their ranks; both are exact.

    Args:
        tensors: tensors with the host's names.
    """
    keys, others = layer_keys(tensors)
    layers = {name: {end: tensors[key] for end, key in ends.items()} for name, ends in keys.items()}
    renamed, kept = _renamed(layers, family_of_layers(layers, metadata))
    flat = {f"{name}.{end}": tensor for name, held in renamed.items() for end, tensor in held.items()}
    # Kept layers keep their suffixes, too: LyCORIS has its own for norms.
    same = [*others, *(key for name in kept for key in keys[name].values())]
    return {**{key: tensors[key] for key in same}, **flat}


def _renamed(layers: Layers, family: str) -> tuple[Layers, Iterable[str]]:
    places = {name: place_of(name) for name in layers}
    if len({*places.values()}) < len(places):
        # Two layers would get one name.
        return {}, layers
    wholes = {}
    # JoyImage has Flux's double_blocks, and a proj_out of its own.
    if not any(place.path.partition(".")[0] in CHECKPOINT_BLOCKS for place in places.values()):
        wholes = {name: joint_path(family, places[name].path) for name in layers if _is_published(name, places[name])}
    renamed: Layers = {}
    kept: list[str] = []
    parts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, held in layers.items():
        whole = wholes.get(name)
        if whole is not None and len(whole[1]) > 1:
            parts.setdefault(whole, []).append(name)
        elif whole is not None and (unswapped := _unswapped(family, whole[0], held)):
            renamed[_kohya_name(LayerPath("", whole[0]), family)] = unswapped
        elif whole is not None or _keeps_name(name, held, family) or _other_name(name, places[name], family) == name:
            kept.append(name)
        else:
            renamed[_other_name(name, places[name], family)] = held
    for (path, rows), names in parts.items():
        joint = _joined(rows, {places[name].path: layers[name] for name in names})
        if joint is None:
            kept += names
        else:
            renamed[_kohya_name(LayerPath("", path), family)] = joint
    published = [name for name, whole in wholes.items() if whole is not None]
    has_parts = any(name in kept for names in parts.values() for name in names)
    if has_parts and not any(UP in layers[name] for name in published):
        # Only LyCORIS has a name for a part that is no LoRA: that of its own wrapper, for diffusers' layers.
        renamed = {f"lycoris_{places[name].path.replace('.', '_')}": layers[name] for name in published}
        kept = [name for name in layers if name not in published]
    return renamed, kept


def host_form(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return an adapter under names that the host reads. It has none for diffusers' layers of Wan and Z-Image."""
    layers = split(tensors)[0]
    family = family_of_layers(layers, metadata)
    paths = [place_of(name).path for name in layers]
    if family not in ("Wan", "Z-Image") or all((joint_path(family, path) or (path,))[0] == path for path in paths):
        return tensors
    named = kohya_form(tensors, metadata)
    # The host has no such name for all of these layers.
    has_wrapper = any(name.startswith("lycoris_") for name in named.keys() - tensors.keys())
    return tensors if has_wrapper else named


def with_alphas(tensors: dict[str, torch.Tensor], ends: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Add the alphas that a file leaves out because they are the ranks. LyCORIS cannot load a layer without one.

    Args:
        tensors: tensors with kohya's key suffixes.
        ends: suffixes of the factors whose first dimension is the rank; the first that a layer has counts.
    """
    import torch

    complete = dict(tensors)
    for name, held in split(tensors)[0].items():
        rank = next((len(held[end]) for end in ends if end in held), None)
        if rank is not None and ALPHA not in held:
            complete[f"{name}.{ALPHA}"] = torch.tensor(float(rank))
    return complete


def with_unit_scales(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Move the scales of LoHa and LoKr into their first factors. LyCORIS 4.1 applies them twice when it merges."""
    import torch

    scaled = dict(tensors)
    for name, held in split(tensors)[0].items():
        rank = next((len(held[end]) for end in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if end in held), None)
        if rank is None or float(held.get(ALPHA, rank)) == rank:
            continue
        first = next(end for end in ("hada_w1_a", "lokr_w1", "lokr_w1_a") if end in held)
        scaled[f"{name}.{first}"] = held[first].float() * (float(held[ALPHA]) / rank)
        scaled[f"{name}.{ALPHA}"] = torch.tensor(float(rank))
    return scaled


def _is_published(name: str, place: LayerPath) -> bool:
    return not place.component and name.startswith(_PUBLISHED)


def _keeps_name(name: str, held: dict[str, torch.Tensor], family: str) -> bool:
    """Report whether a layer's name is kohya's already, or the host's own of a difference of bare parameters."""
    if {WHOLE, "set_weight"} & held.keys():
        return True
    # Trainers of these families number the first text encoder, and those of SDXL name the checkpoint's layers.
    is_other = name.startswith("lora_te_") if family in ("Flux", "SD3") else family == "SDXL"
    return name.startswith(_KOHYA) and not is_other


def _other_name(name: str, place: LayerPath, family: str) -> str:
    """Return kohya's name of a layer that a file of another layout names, or that name if kohya has none."""
    is_known = place.component or family in ("SD1", "SDXL") or (family and name.startswith("diffusion_model."))
    return _kohya_name(place, family) if is_known and not name.startswith("text_encoders.") else name


def _kohya_name(place: LayerPath, family: str) -> str:
    path = place.path
    if place.component:
        number = {"text_encoder": "" if family == "SD1" else "1"}.get(place.component, place.component[-1:])
        is_clip = path.startswith(("encoder.layers.", _WRAPPER))
        path = _WRAPPER + path.removeprefix(_WRAPPER) if is_clip else path
        return f"lora_te{number}_" + path.replace(".", "_")
    if family == "SDXL":
        path = original_path(path) or path
    return "lora_unet_" + path.replace(".", "_")


def _unswapped(family: str, path: str, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Return a layer with the halves of its rows in the checkpoint's order, None if it is no LoRA and has another."""
    import torch

    is_lora = UP in held and not misfit_of_parts(held)
    # A layer without a shape counts as one with two halves.
    rows, inputs = shape_of(held)[:2] if is_lora else (2, 1)
    if not is_swapped(family, path, rows, inputs):
        return held
    if not is_lora:
        return None
    return {end: torch.cat(value.chunk(2)[::-1]) if end in (UP, DORA, BIAS) else value for end, value in held.items()}


def _joined(names: tuple[str, ...], parts: Layers) -> dict[str, torch.Tensor] | None:
    """Return the LoRA of a checkpoint's layer from those of its parts, None if they do not determine it.

    Args:
        names: all parts in the order of the layer's rows.
        parts: tensors of the present parts by kohya's key suffix.
    """
    import torch

    if not _can_join(names, parts):
        return None
    held = list(parts.values())
    inputs = held[0][DOWN].shape[1]
    ranks = [part[DOWN].shape[0] for part in held]
    scales = [float(part.get(ALPHA, torch.tensor(float(rank)))) / rank for part, rank in zip(held, ranks, strict=True)]
    shares_a = len(set(scales)) == 1 and all(torch.equal(part[DOWN], held[0][DOWN]) for part in held)
    down = held[0][DOWN] if shares_a else torch.cat([part[DOWN] for part in held])
    starts = {name: 0 if shares_a else sum(ranks[:index]) for index, name in enumerate(parts)}
    blocks = []
    for index, name in enumerate(names):
        part = parts.get(name)
        rows = inputs * (1 if index < _ATTENTION else _MLP_RATIO)
        block = torch.zeros(rows if part is None else part[UP].shape[0], down.shape[0])
        if part is not None:
            values = part[UP] if shares_a else part[UP] * scales[list(parts).index(name)]
            block[:, starts[name] : starts[name] + values.shape[1]] = values
        blocks.append(block)
    alpha = scales[0] * ranks[0] if shares_a else float(sum(ranks))
    joint = lora_tensors(down, torch.cat(blocks), alpha)
    return {**joint, DORA: torch.cat([parts[name][DORA] for name in names])} if DORA in held[0] else joint


def _can_join(names: tuple[str, ...], parts: Layers) -> bool:
    held = list(parts.values())
    if not all({UP, DOWN} <= part.keys() <= {UP, DOWN, ALPHA, DORA} for part in held):
        return False
    if any(misfit_of_parts(part) or part[UP].dim() != 2 or part[DOWN].dim() != 2 for part in held):
        return False
    inputs = held[0][DOWN].shape[1]
    for name, part in parts.items():
        rows = len(part[UP])
        # Query, key and value have as many rows as inputs. A limit on the others keeps the joint layer small.
        fits = rows == inputs if name in names[:_ATTENTION] else rows <= _MLP_RATIO * inputs
        if not fits or part[DOWN].shape[1] != inputs or (DORA in part and part[DORA].shape != (rows, 1)):
            return False
    magnitudes = sum(DORA in part for part in held)
    return magnitudes in (0, len(names))


def network_fields(tensors: Mapping[str, torch.Tensor], by_lycoris: bool = False) -> dict:
    """Return `network_module`, `network_args`, `network_dim` and `network_alpha` without kohya's prefix `ss_`.

    Rank and alpha are the most common of the denoiser's layers, and absent if no layer has them.

    Args:
        tensors: tensors of an adapter with kohya's key suffixes.
        by_lycoris: whether the file is for LyCORIS, whose formula for a DoRA's magnitudes is not ComfyUI's.
    """
    layers = split(tensors)[0]
    algorithm = _algorithm_of(layers)
    args = {"algo": algorithm}
    module = _LYCORIS
    has_magnitudes = any(DORA in held for held in layers.values())
    if has_magnitudes and not by_lycoris and algorithm in ("loha", "lokr"):
        # LyCORIS would read them by its own formula.
        module = _SD_SCRIPTS
    if algorithm == "lora":
        # Neither has it a place for norms.
        is_beyond = any(_OUTSIDE.match(common_name(name)[1]) or WHOLE in layers[name] for name in layers)
        is_beyond = is_beyond and not has_magnitudes
        if not (by_lycoris or is_beyond):
            module, args = _SD_SCRIPTS, {}
        args |= {"dora_wd": "True"} if has_magnitudes else {}
    own = {name: held for name, held in layers.items() if not is_text(name)} or layers
    flat = _common_rank(held for held in own.values() if not _is_spatial(held))
    spatial = _common_rank(held for held in own.values() if _is_spatial(held))
    if spatial:
        args |= {"conv_dim": str(spatial[0]), "conv_alpha": str(spatial[1])}
    rank, alpha = flat or spatial or (None, None)
    return {"network_module": module, "network_args": args, "network_dim": rank, "network_alpha": alpha}


def ranks_of(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's `rank`, `alpha` and `block_ranks` as options have them; empty if it has no rank.

    Those of a run with a text encoder have its `text_encoder_rank`, too.
    """
    more = {}
    try:
        recipe = parse_json(adapter.metadata["graft_recipe"])
        blocks = "\n".join(f"{pattern}={rank}" for pattern, rank in recipe["block_ranks"])
        rank, alpha = int(recipe["rank"]), float(recipe["alpha"])
        if recipe.get("text_encoder_rank"):
            more = {"text_encoder_rank": int(recipe["text_encoder_rank"])}
    except (KeyError, TypeError, ValueError, OverflowError):
        # Another program made it, or a tool of Graft.
        config, fields = {} if adapter.native is None else adapter.native.config, network_fields(adapter)
        rank = config.get("r") or fields["network_dim"]
        alpha = config.get("lora_alpha", config.get("alpha")) or fields["network_alpha"]
        blocks = ""
    is_ranked = rank and alpha and math.isfinite(alpha)
    return {"rank": rank, "alpha": float(alpha), "block_ranks": blocks, **more} if is_ranked else {}


def has_host_magnitudes(adapter: Mapping[str, torch.Tensor]) -> bool:
    """Report whether magnitudes are for ComfyUI's formula: in Graft's kohya files, and in dicts of other nodes."""
    if not hasattr(adapter, "made_by"):
        return True
    return (
        adapter.made_by() in ("DoRA", "IA3", "LoHa", "LoKr") and adapter.metadata.get("ss_network_module") != _LYCORIS
    )


def as_dora(metadata: dict[str, str]) -> dict[str, str]:
    """Return the metadata of a DoRA whose magnitudes are for ComfyUI's formula."""
    return {"graft_recipe": json.dumps({"method": "DoRA"}), **metadata, "ss_network_module": _SD_SCRIPTS}


def _algorithm_of(layers) -> str:
    """Return LyCORIS' name of the algorithm. Full differences count only if the file holds nothing else."""
    ends = {end for held in layers.values() for end in held}
    if "oft_blocks" in ends and any("oft_blocks" in held and held["oft_blocks"].dim() == 4 for held in layers.values()):
        return "boft"
    named = next((name for start, name in _ALGORITHMS.items() if any(end.startswith(start) for end in ends)), None)
    return named or ("lora" if DOWN in ends else "full")


def _is_spatial(held: dict[str, torch.Tensor]) -> bool:
    down = held.get(DOWN)
    return down is not None and ("lora_mid.weight" in held or (down.dim() == 4 and down.shape[2:].numel() > 1))


def _common_rank(layers) -> tuple[int, float] | None:
    pairs: Counter = Counter()
    for held in layers:
        factor = next((held[end] for end in RANKED if end in held), None)
        if factor is not None:
            alpha = float(held[ALPHA]) if ALPHA in held else float(factor.shape[0])
            pairs[factor.shape[0], alpha] += 1
    return pairs.most_common(1)[0][0] if pairs else None
