"""Textual-inversion embeddings: vectors for each text encoder, and their files.

Source: the layouts that ComfyUI (`comfy/sd1_clip.py:load_embed`), A1111 and diffusers read. For one encoder, a file has
a single tensor `emb_params`; for several encoders, one tensor each, `clip_l` and `clip_g`.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING

from ..errors import ModelError, RunError
from . import files

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

SINGLE = "emb_params"
# Embeddings that OneTrainer and kohya's trainers bundle with an adapter have this prefix, and these keys.
BUNDLED = "bundle_emb."
_BUNDLED_KEY = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<key>clip_[lgh]|string_to_param\.\*)")

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# A prompt has 75 tokens per chunk.
_MOST_VECTORS = 1000

WIDTHS = {"clip_l": 768, "clip_g": 1280, "clip_h": 1024}


class Embedding(dict):
    """Vectors [n, width] float32 by the encoder's key (`clip_l`, `clip_g`, `clip_h`).

    Attributes:
        name: name after `embedding:` in prompts.
    """

    def __init__(self, vectors: dict[str, torch.Tensor], name: str, metadata: dict[str, str] | None = None):
        super().__init__(vectors)
        self.name = name
        self.metadata = dict(metadata or {})

    @property
    def count(self) -> int:
        """Number of vectors in each encoder."""
        return max(len(vectors) for vectors in self.values())


def file_tensors(embedding: Embedding) -> dict[str, torch.Tensor]:
    """Return the tensors of an embedding's file, float32 on the CPU."""
    import torch

    ready = {key: value.detach().to("cpu", torch.float32).contiguous().clone() for key, value in embedding.items()}
    return {SINGLE: next(iter(ready.values()))} if len(ready) == 1 else ready


def save_embedding(path: str, embedding: Embedding, title: str) -> None:
    """Write an embedding in the host's layout with ModelSpec metadata."""
    from .metadata import stamped

    tensors = file_tensors(embedding)
    files.write_tensors(path, tensors, stamped(embedding.metadata, tensors, title))


def load_embedding(path: str, name: str) -> Embedding:
    """Load an embedding from a safetensors file.

    Raises:
        ModelError: the file's tensors are not a valid embedding for CLIP, or torch.save wrote it.
        RunError: the file cannot be read.
    """
    try:
        tensors, metadata = files.read_tensors(path)
    except RunError as error:
        if not path.lower().endswith(_PICKLES):
            raise
        # torch's weights_only runs programs before torch 2.6, corrupts memory before 2.10, and does not limit memory.
        raise ModelError(
            f"Graft does not read '{path}': a file that torch.save wrote can run a program while it is read.",
            f"Write embedding:{name} in a prompt, where ComfyUI reads it. Or convert the file as the help page of this "
            "node says.",
            "embedding_name",
        ) from error
    tensors = _without_outputs(_unbundled(tensors, path, name), path)
    by_encoder = {key: value for key, value in tensors.items() if key in WIDTHS}
    if not by_encoder and len(tensors) == 1:
        value = next(iter(tensors.values()))
        keys = [key for key, width in WIDTHS.items() if value.ndim in (1, 2) and value.shape[-1] == width]
        by_encoder = dict.fromkeys(keys, value)
    sound = by_encoder and all(value.ndim in (1, 2) and value.numel() for value in by_encoder.values())
    if not sound or any(value.shape[-1] != WIDTHS[key] for key, value in by_encoder.items()):
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(tensors.items())[:4]) or "nothing"
        raise ModelError(
            f"The file '{path}' holds no embedding for CLIP ({shapes}).",
            "Choose a textual-inversion file for SD1, SD2 or SDXL.",
            "embedding_name",
        )
    vectors = {key: value.reshape(-1, value.shape[-1]) for key, value in by_encoder.items()}
    for key, value in vectors.items():
        why = "" if len(value) <= _MOST_VECTORS else f"has {len(value)} vectors, more than {_MOST_VECTORS}"
        if not value.is_floating_point():
            why = f"has the dtype {value.dtype}, which cannot hold vectors"
        elif not files.is_finite(value):
            why = "has values that are not finite"
        if why:
            raise ModelError(
                f"The file '{path}' holds no valid embedding: its {key} {why}.",
                "Restore it, or choose another file.",
                "embedding_name",
            )
    return Embedding({key: value.float() for key, value in vectors.items()}, name, metadata)


def _unbundled(tensors: dict[str, torch.Tensor], path: str, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of an embedding that OneTrainer bundled with an adapter; a file without one as it is.

    Raises:
        ModelError: the file bundles several, and none has the name of the file.
    """
    words: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(BUNDLED):
            word, _, end = key.removeprefix(BUNDLED).rpartition(".")
            # A1111's name of the vectors has a dot itself.
            words.setdefault(word.removesuffix(".string_to_param"), {})[end] = tensor
    if not words:
        return tensors
    if len(words) > 1 and name not in words:
        raise ModelError(
            f"The file '{path}' bundles several embeddings: {', '.join(sorted(words))[:300]}.",
            "Give a copy of the file the name of one of them.",
            "embedding_name",
        )
    return words[name] if name in words else next(iter(words.values()))


def _without_outputs(tensors: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Leave out OneTrainer's vectors for the outputs of a text encoder, which ComfyUI does not use."""
    outputs = [key for key in tensors if key.endswith("_out") and key.removesuffix("_out") in tensors]
    if outputs:
        log.warning("Graft: %s is not used; ComfyUI reads no vectors for outputs of %s.", ", ".join(outputs), path)
    return {key: tensor for key, tensor in tensors.items() if key not in outputs}


def take_bundled(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (tensors of the adapter, tensors of bundled embeddings) of a file."""
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(BUNDLED)}
    return own, {key: tensor for key, tensor in tensors.items() if key.startswith(BUNDLED)}


def embeddings_of(bundled: dict[str, torch.Tensor]) -> list[Embedding]:
    """Return the embeddings for CLIP among bundled tensors, in the order of the file."""
    words: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in bundled.items():
        match = _BUNDLED_KEY.fullmatch(key)
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
