"""Embeddings that an adapter file carries along, as OneTrainer and kohya's trainers write them.

The keys are `bundle_emb.NAME.clip_l`, `bundle_emb.NAME.clip_g` and `bundle_emb.NAME.string_to_param.*`.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from .embedding import BUNDLED, WIDTHS, Embedding

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_KEY = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<key>clip_[lgh]|string_to_param\.\*)")


def take_bundled(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (tensors of the adapter, tensors of bundled embeddings) of a file."""
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}
    return own, {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}


def embeddings_of(bundled: dict[str, torch.Tensor]) -> list[Embedding]:
    """Return the embeddings for CLIP among bundled tensors, in the order of the file."""
    words: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in bundled.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.dim() not in (1, 2) or not tensor.is_floating_point():
            continue
        vectors = tensor.float().reshape(-1, tensor.shape[-1])
        is_one = match["key"].startswith("string_to_param")
        encoders = [match["key"]] if not is_one else [name for name, width in WIDTHS.items() if width == len(vectors.T)]
        fitting = {name: vectors for name in encoders if WIDTHS[name] == vectors.shape[1]}
        if fitting:
            words.setdefault(match["name"], {}).update(fitting)
    return [Embedding(vectors, name) for name, vectors in words.items()]


def first_embedding(bundled: dict[str, torch.Tensor]) -> Embedding | None:
    """Return the first bundled embedding, None if there is none. Log the names of any others."""
    words = embeddings_of(bundled)
    for other in words[1:]:
        log.warning("Graft: the adapter file also holds the embedding %s. Only the first is put out.", other.name)
    return words[0] if words else None
