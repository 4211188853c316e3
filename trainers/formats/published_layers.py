"""diffusers' layers for the layers of checkpoints, by model family, for files that come without a model.

UNets (SD1, SD2, SDXL) have their own functions. Sources: diffusers (scripts/convert_*_to_diffusers.py,
loaders/lora_conversion_utils.py) for names and order of rows.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from ..families import LayerSplit

if TYPE_CHECKING:
    import torch

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_LINEARS = ("linear_1", "linear_2")


def _blocks(ours: str, theirs: str, layers: dict[str, str | tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return the table of one kind of block; `{}` stands for its number."""
    table = {}
    for own, names in layers.items():
        names = (names,) if isinstance(names, str) else names
        table[f"{ours}.{{}}.{own}"] = tuple(f"{theirs}.{{}}.{name}" for name in names)
    return table


def _pair(ours: str, theirs: str, ends: tuple[str, str] = ("mlp.0", "mlp.2")) -> dict[str, tuple[str, ...]]:
    return {f"{ours}.{end}": (f"{theirs}.{linear}",) for end, linear in zip(ends, _LINEARS, strict=True)}


_EMBEDDER = "time_text_embed.{}_embedder"
_LAYER_PAIR = ("in_layer", "out_layer")
_OUTPUT = {"final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",)}
_REFINED = {"attention.qkv": tuple(f"attention.to_{end}" for end in "qkv"), "attention.out": "attention.to_out.0"} | {
    name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
}
_TO = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}

# By family: path in the checkpoint, and the paths of diffusers' layers in the order of the checkpoint's rows.
_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "Flux": {
        **_blocks(
            "double_blocks",
            "transformer_blocks",
            {
                "img_attn.qkv": _QKV,
                "txt_attn.qkv": _ADDED,
                "img_attn.proj": "attn.to_out.0",
                "txt_attn.proj": "attn.to_add_out",
                "img_mod.lin": "norm1.linear",
                "txt_mod.lin": "norm1_context.linear",
                "img_mlp.0": "ff.net.0.proj",
                "img_mlp.2": "ff.net.2",
                "txt_mlp.0": "ff_context.net.0.proj",
                "txt_mlp.2": "ff_context.net.2",
            },
        ),
        **_blocks(
            "single_blocks",
            "single_transformer_blocks",
            {"linear1": (*_QKV, "proj_mlp"), "linear2": "proj_out", "modulation.lin": "norm.linear"},
        ),
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        **_pair("time_in", _EMBEDDER.format("timestep"), _LAYER_PAIR),
        **_pair("vector_in", _EMBEDDER.format("text"), _LAYER_PAIR),
        **_pair("guidance_in", _EMBEDDER.format("guidance"), _LAYER_PAIR),
        **_OUTPUT,
    },
    "SD3": {
        **_blocks(
            "joint_blocks",
            "transformer_blocks",
            {
                "x_block.attn.qkv": _QKV,
                "x_block.attn2.qkv": tuple(name.replace("attn", "attn2") for name in _QKV),
                "context_block.attn.qkv": _ADDED,
                "x_block.attn.proj": "attn.to_out.0",
                "x_block.attn2.proj": "attn2.to_out.0",
                "context_block.attn.proj": "attn.to_add_out",
                "x_block.mlp.fc1": "ff.net.0.proj",
                "x_block.mlp.fc2": "ff.net.2",
                "context_block.mlp.fc1": "ff_context.net.0.proj",
                "context_block.mlp.fc2": "ff_context.net.2",
                "x_block.adaLN_modulation.1": "norm1.linear",
                "context_block.adaLN_modulation.1": "norm1_context.linear",
            },
        ),
        "x_embedder.proj": ("pos_embed.proj",),
        "context_embedder": ("context_embedder",),
        **_pair("t_embedder", _EMBEDDER.format("timestep")),
        **_pair("y_embedder", _EMBEDDER.format("text")),
        **_OUTPUT,
    },
    "Z-Image": {
        **{
            own: theirs
            for block in ("layers", "noise_refiner", "context_refiner")
            for own, theirs in _blocks(block, block, _REFINED).items()
        },
        "x_embedder": ("all_x_embedder.2-1",),
        "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        **{name: (name,) for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    },
    "Wan": {
        **_blocks(
            "blocks",
            "blocks",
            {
                **{f"self_attn.{own}": f"attn1.{theirs}" for own, theirs in _TO.items()},
                **{f"cross_attn.{own}": f"attn2.{theirs}" for own, theirs in _TO.items()},
                "cross_attn.k_img": "attn2.add_k_proj",
                "cross_attn.v_img": "attn2.add_v_proj",
                "ffn.0": "ffn.net.0.proj",
                "ffn.2": "ffn.net.2",
            },
        ),
        **_pair("text_embedding", "condition_embedder.text_embedder", ("0", "2")),
        **_pair("time_embedding", "condition_embedder.time_embedder", ("0", "2")),
        "time_projection.1": ("condition_embedder.time_proj",),
        "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
        "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
        "head.head": ("proj_out",),
    },
}
_LISTS = {path.partition(".{}")[0] for table in _TABLES.values() for own in table for path in (own, *table[own])}
# The blocks that only checkpoints have: diffusers' layers never stand beside them in an adapter.
CHECKPOINT_BLOCKS = {"double_blocks", "single_blocks", "joint_blocks"}
# Layers whose halves, shift and scale, diffusers stores in the other order.
_SWAPPED = re.compile(r"final_layer\.adaLN_modulation\.1|joint_blocks\.\d+\.context_block\.adaLN_modulation\.1")
# The first number of a path, which counts blocks.
_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def splits_of(family: str, path: str, rows: int, inputs: int) -> tuple[LayerSplit, ...]:
    """Return diffusers' layers for a checkpoint's layer, empty if they are unknown.

    Args:
        rows, inputs: numbers of the layer's outputs and inputs.
    """
    if family == "Qwen-Image":
        return (LayerSplit(path, _all_rows),)
    names = _TABLES.get(family, {}).get(_template(path))
    if names is None:
        return ()
    number = _NUMBER.search(path)
    names = tuple(name.format(number[1]) if number else name for name in names)
    if len(names) == 1:
        # Of the blocks, only SD3's last has two parts instead of six, and swaps them.
        is_swapped = _SWAPPED.fullmatch(path) and rows == 2 * inputs and family != "Z-Image"
        return (LayerSplit(names[0], _swap_halves if is_swapped else _all_rows),)
    # Query, key and value have as many rows as the layer has inputs. Other models with the same names do not.
    sizes = [inputs] * 3 + [rows - 3 * inputs] * (len(names) - 3)
    if sum(sizes) != rows or min(sizes) <= 0:
        return ()
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return tuple(
        LayerSplit(name, functools.partial(_narrow, start, size))
        for name, start, size in zip(names, starts, sizes, strict=True)
    )


def joint_path(family: str, path: str) -> tuple[str, tuple[str, ...]] | None:
    """Return (the checkpoint's layer that holds a layer of diffusers, all of its parts in the order of its rows).

    None if the checkpoint's layer is unknown.
    """
    if family == "Qwen-Image":
        return path, (path,)
    number = _NUMBER.search(path)
    for own, names in _TABLES.get(family, {}).items():
        if _template(path) in names:
            block = number[1] if number else ""
            return own.format(block), tuple(name.format(block) for name in names)
    return None


def has_layer(family: str, path: str) -> bool:
    """Report whether a family's checkpoint, or its network in diffusers, is known to have a layer."""
    return joint_path(family, path) is not None or _template(path) in _TABLES.get(family, {})


def is_swapped(family: str, path: str, rows: int, inputs: int) -> bool:
    """Report whether diffusers stores the halves of a checkpoint's layer in the other order."""
    splits = splits_of(family, path, rows, inputs)
    return bool(splits) and splits[0].rows is _swap_halves


def _template(path: str) -> str:
    return _NUMBER.sub("{}", path, count=1) if path.partition(".")[0] in _LISTS else path


def _all_rows(values: torch.Tensor) -> torch.Tensor:
    return values


def _narrow(start: int, size: int, values: torch.Tensor) -> torch.Tensor:
    return values.narrow(0, start, size)


def _swap_halves(values: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(values.chunk(2)[::-1])


# Residual blocks per level of these UNets. A level of the decoder has one more.
_DEPTH = 2
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESIDUAL = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OURS = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|middle_block\.([012])\.(.+)")
_THEIRS = re.compile(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.([01])\.(.+)")
_PUBLISHED = re.compile(r"((down|up)_blocks|mid_block|conv_in|conv_out|time_embedding|add_embedding)\b")


def diffusers_path(path: str) -> str | None:
    """Return a layer's path in diffusers, None if these UNets have no such layer."""
    if _PUBLISHED.match(path) or path in _OUTSIDE:
        return _OUTSIDE.get(path, path)
    match = _OURS.fullmatch(path)
    if match is None:
        return None
    side, number, kind, rest, middle, middle_rest = match.groups()
    if middle is not None:
        inner = middle_rest if middle == "1" else _RESIDUAL.get(middle_rest)
        return inner and f"mid_block.{'attentions.0' if middle == '1' else f'resnets.{int(middle) // 2}'}.{inner}"
    level, index = divmod(int(number) - (side == "input_blocks"), _DEPTH + 1)
    if side == "input_blocks" and index == _DEPTH:
        return f"down_blocks.{level}.downsamplers.0.conv" if (kind, rest) == ("0", "op") else None
    block = f"{'down' if side == 'input_blocks' else 'up'}_blocks.{level}"
    if side == "output_blocks" and rest == "conv":
        return f"{block}.upsamplers.0.conv" if index == _DEPTH else None
    inner = _RESIDUAL.get(rest) if kind == "0" else rest
    # The second layer of a block is an attention, the first a residual block.
    return f"{block}.{'resnets' if kind == '0' else 'attentions'}.{index}.{inner}" if inner and kind < "2" else None


def original_path(path: str) -> str | None:
    """Return a layer's path in SDXL's checkpoint, None if it has no such layer."""
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    residual = {theirs: ours for ours, theirs in _RESIDUAL.items()}
    if path in outside:
        return outside[path]
    match = _MIDDLE.fullmatch(path)
    if match is not None:
        kind, number, rest = match.groups()
        inner = residual.get(rest) if kind == "resnets" else rest
        return inner and f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{inner}"
    match = _THEIRS.fullmatch(path)
    if match is None:
        return path if _OURS.fullmatch(path) else None
    side, level, kind, index, rest = match.groups()
    first = int(level) * (_DEPTH + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + _DEPTH + 1}.0.op"
    if kind == "upsamplers":
        # All levels of SDXL's decoder that enlarge have attentions.
        return f"output_blocks.{first + _DEPTH}.2.conv"
    inner = residual.get(rest) if kind == "resnets" else rest
    block = f"input_blocks.{first + int(index) + 1}" if side == "down" else f"output_blocks.{first + int(index)}"
    return inner and f"{block}.{0 if kind == 'resnets' else 1}.{inner}"
