"""Paths of UNet layers in Stability's checkpoints and in diffusers: SD1, SD2 and SDXL.

Source: diffusers (scripts/convert_original_stable_diffusion_to_diffusers.py).
"""

from __future__ import annotations

import re

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
