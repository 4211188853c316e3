"""ComfyUI's own nodes that encode a prompt together with source pictures, called as a graph calls them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ....trainers.errors import ModelError

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP, VAE

# The module of each node of `PROMPT_NODES`, the names of its picture inputs, and whether they form one growing input.
_QWEN, _BOOGU, _JOY, _MAGE = (f"comfy_extras.nodes_{name}" for name in ("qwen", "boogu", "joyimage", "mage"))
_NODES = {
    "TextEncodeQwenImageEdit": (_QWEN, "image", False),
    "TextEncodeQwenImageEditPlus": (_QWEN, "image{}", False),
    "TextEncodeBooguEdit": (_BOOGU, "image_{}", True),
    "TextEncodeJoyImageEdit": (_JOY, "image{}", True),
    "TextEncodeMageFlowEdit": (_MAGE, "image_{}", True),
}


def check(name: str, clip: CLIP) -> None:
    """Raise ModelError if this ComfyUI lacks a node, or if a text encoder does not see pictures."""
    _find(name)
    if not sees_pictures(clip):
        raise ModelError(
            f"prompt_node is {name}, but this text encoder ({type(clip.tokenizer).__name__}) does not see pictures.",
            "Connect the text encoder that belongs to the model, or leave prompt_node in Graft Run Options unset.",
            "clip",
        )


def sees_pictures(clip: CLIP) -> bool:
    """Report whether a text encoder reads pictures beside the text."""
    return "images" in inspect.signature(clip.tokenizer.tokenize_with_weights).parameters


def encode_text(
    name: str, clip: CLIP, text: str, pictures: Sequence[torch.Tensor], negative: bool = False
) -> dict[str, torch.Tensor]:
    """Return the tensors that a node makes of a prompt and source pictures, without their latents.

    Args:
        pictures: each [1, H, W, 3] in 0..1.
        negative: return the conditioning of a negative prompt, if the node encodes it otherwise.
    """
    import torch

    conditioning = _call(name, clip, text, None, pictures, negative)
    cross_attn, values = conditioning[0]
    return {"cross_attn": cross_attn, **{key: value for key, value in values.items() if torch.is_tensor(value)}}


def encode_sources(name: str, vae: VAE, pictures: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
    """Return the unscaled latents that a node makes of source pictures, without encoding a text.

    Args:
        size: (width, height) of the picture to draw, for nodes that scale the source pictures to it.
    """
    return _call(name, _NoText(), "", vae, pictures, size=size)[0][1]["reference_latents"]


class _NoText:
    """A text encoder that gives no text, for a call that needs a node's latents alone."""

    def tokenize(self, text: str, **options: Any) -> None:
        return None

    def encode_from_tokens_scheduled(self, tokens: None) -> list:
        return [[None, {}]]


def _find(name: str) -> type:
    module = _NODES[name][0]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"This ComfyUI has no node {name}.",
            "Update ComfyUI, or choose another prompt_node in Graft Run Options.",
            "prompt_node",
        ) from error


def _call(
    name: str,
    clip: CLIP | _NoText,
    text: str,
    vae: VAE | None,
    pictures: Sequence[torch.Tensor],
    negative: bool = False,
    size: tuple[int, int] = (0, 0),
) -> list:
    node = _find(name)
    _, pattern, grows = _NODES[name]
    given: dict[str, Any] = {pattern.format(place): picture for place, picture in enumerate(pictures, 1)}
    given = {"images": given} if grows else given
    takes = inspect.signature(node.execute).parameters
    has_negative = "negative_prompt" in takes
    if has_negative:
        given["negative_prompt"] = text if negative else ""
    if "width" in takes:
        given.update(width=size[0], height=size[1])
    output = node.execute(clip=clip, prompt="" if has_negative and negative else text, vae=vae, **given)
    return output.result[1 if has_negative and negative else 0]
