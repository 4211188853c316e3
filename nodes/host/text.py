"""ComfyUI's CLIP as a text encoder for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .digest import patcher_digest

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP


class ComfyText:
    """The graph's CLIP, unchanged; captions are literal text."""

    def __init__(self, clip: CLIP):
        self._clip = clip

    def encode(self, caption: str) -> dict[str, torch.Tensor]:
        """The host's own conditioning of a literal caption: `cross_attn`, `pooled_output` and what else it gives."""
        return conditioning_tensors(self._clip, _literal_tokens(self._clip, caption))

    def encode_for_sampling(self, caption: str) -> list:
        """The conditioning of a literal caption as the host's sampler takes it."""
        return self._clip.encode_from_tokens_scheduled(_literal_tokens(self._clip, caption))

    def count_tokens(self, caption: str) -> int:
        """Tokens of the longest encoder, without start, end and padding."""
        tokens = _literal_tokens(self._clip, caption, return_word_ids=True)
        counts = [sum(1 for chunk in chunks for token in chunk if token[2] > 0) for chunks in tokens.values()]
        return max(counts, default=0)

    def fingerprint(self) -> str:
        """Changes with weights, patches, clip skip and tokenizer options."""
        clip = self._clip
        return f"{patcher_digest(clip.patcher)}|{clip.layer_idx}|{sorted(clip.tokenizer_options.items())}"


def _literal_tokens(clip: CLIP, text: str, **options) -> dict:
    try:
        return clip.tokenize(text, disable_weights=True, **options)
    except TypeError:
        # Encoders that never weight their words pass that argument on themselves, and it would arrive twice.
        return clip.tokenize(text, **options)


def conditioning_tensors(clip: CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    """What the host encodes from tokens, as ordinary tensors on the CPU."""
    import torch

    with torch.no_grad():
        found = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    found["cross_attn"] = found.pop("cond")
    return {name: value.detach().to("cpu").clone() for name, value in found.items() if torch.is_tensor(value)}
