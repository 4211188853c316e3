"""Layers of an adapter: its tensors grouped by layer, with kohya's key suffixes whatever the file's layout."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
DORA = "dora_scale"
WHOLE, BIAS = "diff", "diff_b"
# LyCORIS' IA3: factors minus one, and whether they are for inputs.
IA3, ON_INPUT = "weight", "on_input"

# Key suffixes that the host's loaders know (comfy/weight_adapter, comfy/lora.py). The longest match applies.
_ENDS = {
    ".lora_up.weight": UP,
    ".lora_down.weight": DOWN,
    ".lora_mid.weight": MID,
    ".lora_B.weight": UP,
    ".lora_A.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B": UP,
    ".lora_A": DOWN,
    ".lora.up.weight": UP,
    ".lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    # LyCORIS' names for the full difference of a norm.
    ".w_norm": WHOLE,
    ".b_norm": BIAS,
}
_SAME = re.compile(
    r"\.(alpha|dora_scale|diff|diff_b|set_weight|reshape_weight|oft_blocks|rescale|on_input"
    r"|hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)|lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t2)|(?:a1|a2|b1|b2)\.weight)$"
)

_UNET, _TEXT, _SECOND, _T5 = "unet", "te1", "te2", "te3"
# Network of a layer by key prefix, for all layouts. The first match applies.
_PREFIXES = {
    "text_encoders.clip_g.transformer.": _SECOND,
    "text_encoders.t5xxl.transformer.": _T5,
    "text_encoders.clip_l.transformer.": _TEXT,
    "text_encoders.clip_h.transformer.": _TEXT,
    # Prefixes of the host's own weights.
    "clip_g.transformer.": _SECOND,
    "t5xxl.transformer.": _T5,
    "clip_l.transformer.": _TEXT,
    "clip_h.transformer.": _TEXT,
    "text_encoder_2.": _SECOND,
    "text_encoder.": _TEXT,
    "lora_te3_": _T5,
    "lora_te2_": _SECOND,
    "lora_te1_": _TEXT,
    "lora_te_": _TEXT,
    "lora_prior_te_": _TEXT,
    "diffusion_model.": _UNET,
    "base_model.model.": _UNET,
    "transformer.": _UNET,
    "unet.": _UNET,
    "lora_unet_": _UNET,
    "lora_prior_unet_": _UNET,
    "lora_transformer_": _UNET,
    "lycoris_": _UNET,
}

_T5_PATHS = ("encoder_block_", "encoder_final_layer_norm", "encoder_embed_tokens", "shared")

# Layouts by the first part of a layer's path: files name the layers of one model in different ways.
_LAYOUTS = {
    "input_blocks": "the UNet's own",
    "middle_block": "the UNet's own",
    "output_blocks": "the UNet's own",
    "down_blocks": "a UNet in diffusers",
    "mid_block": "a UNet in diffusers",
    "up_blocks": "a UNet in diffusers",
    "double_blocks": "Flux's own",
    "single_blocks": "Flux's own",
    "single_transformer_blocks": "a transformer in diffusers",
    "transformer_blocks": "a transformer in diffusers",
    "joint_blocks": "MMDiT's own",
}
_FIRST = re.compile(rf"({'|'.join(sorted(_LAYOUTS, key=len, reverse=True))})(?:_|$)")

_BLOCK = re.compile(
    r"(?:(?P<unet>(?:input|output)_blocks_\d+|middle_block|(?:down|up)_blocks_\d+|mid_block)"
    r"|(?P<dit>(?:double_blocks|single_blocks|single_transformer_blocks|transformer_blocks|joint_blocks|blocks|layers)"
    r"_\d+)|(?:\w*?_)?(?P<text>layers?_\d+|block_\d+))(?:_|$)"
)

Layers = dict[str, dict[str, "torch.Tensor"]]


def split(tensors: dict[str, torch.Tensor]) -> tuple[Layers, list[str]]:
    """Group tensors by layer.

    Returns:
        (tensors by layer name and key suffix, keys that belong to no layer).
    """
    keys, others = layer_keys(tensors)
    return {name: {end: tensors[key] for end, key in ends.items()} for name, ends in keys.items()}, others


def layer_keys(tensors: Collection[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return (keys by layer name and key suffix, keys that belong to no layer)."""
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in tensors:
        name, end = _parted(key)
        if end is None and key.endswith(f".{IA3}") and f"{key.removesuffix(IA3)}{ON_INPUT}" in tensors:
            name, end = key.removesuffix(f".{IA3}"), IA3
        if end is None:
            others.append(key)
        else:
            layers.setdefault(name, {})[end] = key
    return layers, others


# (first factor, second factor, core). Without a core, the first has as many columns as the second has rows. With a
# core [r1, r2, kh, kw], the first has r1 rows and the second r2 rows.
_FACTORS = (
    ("hada_w1_a", "hada_w1_b", "hada_t1"),
    ("hada_w2_a", "hada_w2_b", "hada_t2"),
    ("lokr_w1_a", "lokr_w1_b", ""),
    ("lokr_w2_a", "lokr_w2_b", "lokr_t2"),
)
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def check_parts(tensors: dict[str, torch.Tensor], whose: str, input: str) -> None:
    """Check that the tensors of each layer fit each other. The host would skip a wrong layer and only log a line.

    Args:
        whose: name of the adapter at the start of the error message.

    Raises:
        ModelError: the tensors of a layer do not fit.
    """
    for name, held in split(tensors)[0].items():
        why = misfit_of_parts(held)
        if why:
            raise ModelError(
                f"{whose} is not a valid adapter: in its layer {name[:200]}, {why}.", "Get another copy of it.", input
            )


def misfit_of_parts(held: dict[str, torch.Tensor]) -> str:
    """Return the reason why a layer's tensors do not fit each other, empty if they do."""
    for end, tensor in held.items():
        if end == ALPHA and tensor.numel() != 1:
            return f"alpha has the shape {list(tensor.shape)} and is not a number"
        if not tensor.numel():
            return f"{end} is empty"
    if ON_INPUT in held and (IA3 not in held or held[ON_INPUT].numel() != 1):
        return f"{IA3} is missing" if IA3 not in held else f"{ON_INPUT} has the shape {list(held[ON_INPUT].shape)}"
    if DORA in held and held[DORA].dim() < 2:
        return f"{DORA} has the shape {list(held[DORA].shape)} instead of [out, 1] or [1, in]"
    if UP in held or DOWN in held:
        return _misfit_of_lora(held)
    for first, second, core in _FACTORS:
        if (first in held) != (second in held):
            return f"{first} or {second} is missing"
        if core in held and first not in held:
            return f"{first} is missing"
        if first not in held:
            continue
        left, right, middle = held[first], held[second], held.get(core)
        if middle is not None:
            if left.dim() != 2 or right.dim() != 2 or middle.dim() != 4 or middle.shape[:2] != (len(left), len(right)):
                return (
                    f"{first} {list(left.shape)}, {second} {list(right.shape)} and {core} {list(middle.shape)} do not "
                    "fit each other"
                )
        elif left.dim() != 2 or right.dim() < 2 or left.shape[1] != right.shape[0]:
            return f"{first} {list(left.shape)} and {second} {list(right.shape)} do not fit each other"
    return _misfit_of_pairs(held)


def _misfit_of_pairs(held: dict[str, torch.Tensor]) -> str:
    if any(end.startswith("hada_") for end in held):
        if not {"hada_w1_a", "hada_w2_a"} <= held.keys():
            return f"{'hada_w2_a' if 'hada_w1_a' in held else 'hada_w1_a'} is missing"
        if ("hada_t1" in held) != ("hada_t2" in held):
            return f"{'hada_t2' if 'hada_t1' in held else 'hada_t1'} is missing"
        first, second = (_product_shape(held, *names) for names in _FACTORS[:2])
        if first != second:
            return f"the products {list(first)} and {list(second)} do not fit each other"
    if any(end.startswith("lokr_") for end in held):
        for whole, factor in (("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")):
            if whole not in held and factor not in held:
                return f"{whole} is missing"
            if whole in held and held[whole].dim() < 2:
                return f"{whole} has the shape {list(held[whole].shape)} and is not a matrix"
        if "lokr_w1" in held and held["lokr_w1"].dim() != 2:
            return f"lokr_w1 has the shape {list(held['lokr_w1'].shape)} and is not a matrix"
    if "oft_blocks" in held:
        shape = held["oft_blocks"].shape
        if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
            return f"oft_blocks has the shape {list(shape)}, but its blocks must be square"
    elif "rescale" in held:
        return "oft_blocks is missing"
    missing = [name for name in _GLORA if name not in held]
    if missing and len(missing) < len(_GLORA):
        return f"{missing[0]} is missing"
    if not missing and any(held[name].dim() < 2 for name in _GLORA):
        return "a factor is not a matrix"
    return ""


def _product_shape(held: dict[str, torch.Tensor], first: str, second: str, core: str) -> tuple[int, ...]:
    if core in held:
        return (held[first].shape[1], held[second].shape[1], *held[core].shape[2:])
    return (held[first].shape[0], held[second][0].numel())


def shape_of(held: dict[str, torch.Tensor]) -> tuple[int, ...] | None:
    """Return the shape of the difference that a layer's tensors add to a weight, None if they do not add one.

    The shape is flat, [out, in * kernel], if the tensors do not hold the kernel's size.

    Args:
        held: tensors of the layer by key suffix, which fit each other.
    """
    if UP in held and DOWN in held:
        middle = held.get(MID)
        if middle is not None:
            return (held[UP].shape[0], held[DOWN][0].numel(), *middle.shape[2:])
        return (held[UP].shape[0], *held[DOWN].shape[1:])
    if "hada_w1_a" in held and "hada_w1_b" in held:
        return _product_shape(held, *_FACTORS[0])
    if "lokr_w1" in held or "lokr_w1_a" in held:
        pairs = []
        for whole, names in (("lokr_w1", _FACTORS[2]), ("lokr_w2", _FACTORS[3])):
            pairs.append(tuple(held[whole].shape) if whole in held else _product_shape(held, *names))
        (rows, columns), (more_rows, more_columns, *kernel) = pairs[0][:2], pairs[1]
        return (rows * more_rows, columns * more_columns, *kernel)
    return tuple(held[WHOLE].shape) if WHOLE in held else None


def misfit_of_layer(held: dict[str, torch.Tensor], shape: tuple[int, ...]) -> str:
    """Return the reason why a layer's tensors do not fit a weight, empty if they do.

    ComfyUI multiplies the factors and reshapes the product, or rotates the weight, and only logs a failure.

    Args:
        held: tensors of the layer by kohya's key suffix.
        shape: shape of the weight, [out, in, ...].
    """
    layer = f"the layer {list(shape)}"
    if "reshape_weight" in held:
        return ""
    if "set_weight" in held:
        # ComfyUI copies the values into the weight, which would also spread a single number over it.
        is_alike = tuple(held["set_weight"].shape) == tuple(shape)
        return "" if is_alike else f"set_weight {list(held['set_weight'].shape)}, {layer}"
    own_shape = shape_of(held)
    if own_shape is not None and WHOLE in held:
        if own_shape != tuple(shape):
            return f"the shape {list(own_shape)}, {layer}"
    elif own_shape is not None and (own_shape[0] != shape[0] or math.prod(own_shape[1:]) != math.prod(shape[1:])):
        return f"the shape {list(own_shape)}, {layer}"
    if "oft_blocks" in held and (reason := _misfit_of_rotation(held, shape[0])):
        return f"{reason}, {layer}"
    if all(name in held for name in _GLORA) and not _is_glora_of(held, shape):
        sizes = (str(list(held[name].flatten(1).shape)) for name in _GLORA)
        return f"the factors {', '.join(sizes)}, {layer}"
    if ON_INPUT in held and (len(shape) < 2 or held[IA3].numel() != shape[1 if held[ON_INPUT] else 0]):
        return f"{held[IA3].numel()} factors, {layer}"
    if DORA in held:
        ones = [1] * (len(shape) - 2)
        if len(shape) < 2 or list(held[DORA].shape) not in ([shape[0], 1, *ones], [1, shape[1], *ones]):
            return f"{DORA} {list(held[DORA].shape)}, {layer}"
    return ""


def _misfit_of_rotation(held: dict[str, torch.Tensor], rows: int) -> str:
    *steps, count, size, _ = held["oft_blocks"].shape
    # Each step of BOFT combines rows that lie twice as far apart as in the step before.
    is_misaligned = steps and (size % 2 or rows % (size * 2 ** (min(steps[0], 32) - 1)))
    if count * size != rows or is_misaligned:
        return f"oft_blocks {list(held['oft_blocks'].shape)} for {count * size} rows"
    if "rescale" in held and held["rescale"].numel() not in (1, rows):
        return f"rescale {list(held['rescale'].shape)}"
    return ""


def _is_glora_of(held: dict[str, torch.Tensor], shape: tuple[int, ...]) -> bool:
    a1, a2, b1, b2 = (held[name].flatten(1).shape for name in _GLORA)
    inner, inputs = math.prod(shape[1:]), shape[1] if len(shape) > 1 else 1
    if a2[1] == a1[0] and b2[1] == b1[0] and (b2[0], b1[1], a2[0], a1[1]) == (shape[0], inner, inner, inner):
        return True
    return a1[1] == a2[0] and b1[1] == b2[0] and (a1[0], a2[1], b1[0], b2[1]) == (inputs, inputs, shape[0], inner)


def _misfit_of_lora(held: dict[str, torch.Tensor]) -> str:
    if UP not in held or DOWN not in held:
        return "one of its two factors is missing"
    up, down, middle = held[UP], held[DOWN], held.get(MID)
    inner = down.shape[:1]
    if middle is not None and middle.dim() >= 2 and middle.shape[1:2] == inner:
        inner = middle.shape[:1]
    if up.dim() < 2 or down.dim() < 2 or up.flatten(1).shape[1:] != inner:
        return f"the factors {list(up.shape)} and {list(down.shape)} do not fit each other"
    return ""


def _parted(key: str) -> tuple[str, str | None]:
    match = _SAME.search(key)
    if match is not None:
        return key[: match.start()], match[1]
    fitting = [end for end in _ENDS if key.endswith(end)]
    if not fitting:
        return key, None
    longest = max(fitting, key=len)
    return key[: -len(longest)], _ENDS[longest]


def common_name(name: str) -> tuple[str, str]:
    """Return (network, path with underscores) of a layer. All names of a layer within one layout give the same."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    path = name[len(prefix) :]
    if ".processor." in path:
        path = path.replace(".processor.", ".")
        # The oldest files of diffusers name an attention's output without its index.
        path += ".0" if path.endswith(".to_out") else ""
    network, path = _PREFIXES.get(prefix, ""), path.replace(".", "_")
    # OneTrainer numbers T5 by its place among the text encoders of the model.
    return _T5 if network in (_TEXT, _SECOND) and path.startswith(_T5_PATHS) else network, path


def common_place(name: str) -> tuple[str, str]:
    """Return `common_name` of a layer. A name without a known prefix is the denoiser's."""
    network, path = common_name(name)
    return network or _UNET, path


def is_text(name: str) -> bool:
    """Report whether a layer belongs to a text encoder."""
    return common_name(name)[0] in (_TEXT, _SECOND, _T5) or name.startswith("text_encoders.")


def layouts(names) -> set[str]:
    """Return the layouts that the names of a diffusion model's layers follow."""
    matches = (_FIRST.match(path) for network, path in map(common_name, names) if network in (_UNET, ""))
    return {_LAYOUTS[match[1]] for match in matches if match is not None}


def block_of(name: str) -> str:
    """Return the name of a layer's block: `input_blocks.4`, `double_blocks.7`, `te1 layers.3`."""
    network, path = common_name(name)
    match = _BLOCK.match(path)
    if match is None:
        block = "_".join(path.split("_")[:2])
    else:
        block = re.sub(r"_(\d+)$", r".\1", next(part for part in match.groups() if part))
    return block if network in (_UNET, "") else f"{network} {block}"


_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "a1.": "GLoRA", "on_": "IA3", "set_": "weights"}


def type_of(tensors: dict[str, torch.Tensor]) -> str:
    """Return the adapter type of a layer, derived from the key suffixes of its tensors."""
    ends = tensors.keys()
    if DORA in ends:
        return "DoRA"
    if UP in ends:
        return "LoRA" if tensors[DOWN].dim() < 4 else "LoRA on convolutions"
    for start, kind in _KINDS.items():
        if any(end.startswith(start) for end in ends):
            return kind
    return "whole difference"
