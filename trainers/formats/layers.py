"""The layers of an adapter: its tensors by layer, their ends in kohya's words whatever the file's own are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    import torch

UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"
DORA = "dora_scale"
WHOLE, BIAS = "diff", "diff_b"

# What a key may end with, as the host's loaders know it (comfy/weight_adapter, comfy/lora.py); the longest that fits.
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
    # A norm's difference in the words of LyCORIS.
    ".w_norm": WHOLE,
    ".b_norm": BIAS,
}
_SAME = re.compile(
    r"\.(alpha|dora_scale|diff|diff_b|set_weight|reshape_weight|oft_blocks|rescale"
    r"|hada_(?:w1_a|w1_b|w2_a|w2_b|t1|t2)|lokr_(?:w1|w2|w1_a|w1_b|w2_a|w2_b|t2)|(?:a1|a2|b1|b2)\.weight)$"
)

_UNET, _TEXT, _SECOND, _T5 = "unet", "te1", "te2", "te3"
# Where a layer is, whatever the layout calls it; what comes first wins.
_PREFIXES = {
    "text_encoders.clip_g.transformer.": _SECOND,
    "text_encoders.t5xxl.transformer.": _T5,
    "text_encoders.clip_l.transformer.": _TEXT,
    "text_encoders.clip_h.transformer.": _TEXT,
    # The host's own weights.
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

# Files name one model's layers in different ways; the first part of a path tells which.
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
    """(tensors by layer's name and end, keys that are no layer's)."""
    found: Layers = {}
    others = []
    for key, tensor in tensors.items():
        name, end = _parted(key)
        if end is None:
            others.append(key)
        else:
            found.setdefault(name, {})[end] = tensor
    return found, others


# Pairs of factors, of which the columns of the first are as many as the rows of the second.
_FACTORS = {
    "hada_w1_b": "hada_w1_a",
    "hada_w2_b": "hada_w2_a",
    "lokr_w1_b": "lokr_w1_a",
    "lokr_w2_b": "lokr_w2_a",
}
# Cores between two factors, which decide by themselves what fits.
_CORES = {"hada_w1_b": "hada_t1", "hada_w2_b": "hada_t2", "lokr_w2_b": "lokr_t2"}


def check_parts(tensors: dict[str, torch.Tensor], whose: str, input: str) -> None:
    """Refuses an adapter whose parts do not fit each other: the host would leave out a layer with a line in its log.

    Args:
        whose: what it is called in the error, at a sentence's beginning.
        input: of the node.

    Raises:
        ModelError: naming the layer.
    """
    for name, held in split(tensors)[0].items():
        why = _misfit(held)
        if why:
            raise ModelError(
                f"{whose} is no sound adapter: of its layer {name[:200]} {why}.", "Take another copy of it.", input
            )


def _misfit(held: dict[str, torch.Tensor]) -> str:
    """Why a layer's tensors do not fit each other; empty when they do."""
    for end, tensor in held.items():
        if end == ALPHA and tensor.numel() != 1:
            return f"alpha is {list(tensor.shape)} and no number"
        if not tensor.numel():
            return f"{end} is empty"
    if UP in held or DOWN in held:
        return _misfit_of_lora(held)
    for second, first in _FACTORS.items():
        if (first in held) != (second in held):
            return f"{first} or {second} is missing"
        if first in held and _CORES.get(second) not in held:
            left, right = held[first], held[second]
            if left.dim() != 2 or right.dim() < 2 or left.shape[1] != right.shape[0]:
                return f"{first} {list(left.shape)} and {second} {list(right.shape)} do not fit each other"
    return ""


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
    """(which network, the layer's path with low lines): the same for a layer under all names of one layout."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    path = name[len(prefix) :]
    if ".processor." in path:
        path = path.replace(".processor.", ".")
        # As the oldest files of diffusers call an attention's output.
        path += ".0" if path.endswith(".to_out") else ""
    return _PREFIXES.get(prefix, ""), path.replace(".", "_")


def is_text(name: str) -> bool:
    """Whether a layer is a text encoder's."""
    return common_name(name)[0] in (_TEXT, _SECOND, _T5) or name.startswith("text_encoders.")


def layouts(names) -> set[str]:
    """The ways in which layers of a diffusion model are named."""
    matches = (_FIRST.match(path) for network, path in map(common_name, names) if network in (_UNET, ""))
    return {_LAYOUTS[match[1]] for match in matches if match is not None}


def block_of(name: str) -> str:
    """The block a layer is in, as one says it: `input_blocks.4`, `double_blocks.7`, `te1 layers.3`."""
    network, path = common_name(name)
    match = _BLOCK.match(path)
    if match is None:
        block = "_".join(path.split("_")[:2])
    else:
        block = re.sub(r"_(\d+)$", r".\1", next(part for part in match.groups() if part))
    return block if network in (_UNET, "") else f"{network} {block}"


def type_of(tensors: dict[str, torch.Tensor]) -> str:
    """The adapter type of a layer, from what there is of it."""
    ends = tensors.keys()
    if DORA in ends:
        return "DoRA"
    if UP in ends:
        return "LoRA" if tensors[DOWN].dim() < 4 else "LoRA on convolutions"
    for start, kind in (("hada_", "LoHa"), ("lokr_", "LoKr"), ("oft_", "OFT"), ("a1.", "GLoRA"), ("set_", "weights")):
        if any(end.startswith(start) for end in ends):
            return kind
    return "whole difference"
