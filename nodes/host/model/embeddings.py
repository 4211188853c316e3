"""Trained embeddings on a CLIP in the graph: `embedding:<name>` is read from memory, all other names by ComfyUI.

The tokenizer is copied, so only the returned CLIP knows the new name.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ....trainers.errors import ModelError
from ....trainers.formats.embedding import WIDTHS
from ....trainers.text import SPACED, ends_word

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP

    from ....trainers.formats.embedding import Embedding

_ATTACHED = "graft_words"
_IDENTIFIER = "embedding:"
_PUNCTUATION = re.compile(r"[\s,|{}()\[\]<>:;]+")
# ComfyUI tries these endings in this order.
_ENDINGS = ("", ".safetensors", ".pt", ".bin")
_LONGEST_NAME = 256
_MOST_NAMES = 256

# Embedding files that trainings of this server have used. ComfyUI checks nodes for changes before they run.
_CALLED: set[str] = set()


def encoders(clip: CLIP) -> list[str]:
    """Return the keys of a CLIP's encoders that can take embeddings.

    Raises:
        ModelError: no encoder can.
    """
    keys = [key for key in WIDTHS if hasattr(clip.tokenizer, key) and hasattr(clip.cond_stage_model, key)]
    if not keys:
        raise ModelError(
            f"The text encoder ({type(clip.cond_stage_model).__name__}) has no CLIP part, which an embedding needs.",
            "Embeddings work for SD1, SD2, SDXL, SD3 and Flux. Train a LoRA for this model instead.",
            "clip",
        )
    return keys


def apply_embedding(clip: CLIP, embedding: Embedding) -> CLIP:
    """Return a clone of the CLIP that reads `embedding:<name>` in prompts.

    Raises:
        ModelError: the embedding was made for other text encoders.
    """
    for key in encoders(clip):
        width = getattr(clip.cond_stage_model, key).transformer.get_input_embeddings().weight.shape[1]
        if key not in embedding or embedding[key].shape[-1] != width:
            widths = ", ".join(f"{name} ({value.shape[-1]} wide)" for name, value in embedding.items())
            raise ModelError(
                f"The embedding '{embedding.name}' is for other text encoders: it contains {widths}, and this CLIP "
                f"needs {key} ({width} wide).",
                "Connect the CLIP of the model family it was trained on, or choose another embedding.",
                "embedding",
            )
    other = clip.clone()
    other.tokenizer = with_embedding(clip.tokenizer, embedding.name, dict(embedding))
    return other


def with_embedding(tokenizer, name: str, vectors: dict[str, torch.Tensor]):
    """Return a copy of a CLIP's tokenizer that reads `embedding:<name>` as vectors, [n, width] by encoder."""
    other = copy.copy(tokenizer)
    for key, inner in vars(tokenizer).items():
        if hasattr(inner, "_try_get_embedding"):
            setattr(other, key, _with_embedding(inner, name, vectors.get(key)))
    setattr(other, _ATTACHED, {**getattr(tokenizer, _ATTACHED, {}), name: vectors})
    return other


def _with_embedding(inner, name: str, vectors: torch.Tensor | None):
    other = copy.copy(inner)
    if other.embedding_directory is None:
        # ComfyUI looks up embeddings only if the tokenizer has a directory.
        other.embedding_directory = []
    other._try_get_embedding = _answering(other._try_get_embedding, name, vectors, inner.embedding_size)
    return other


def _answering(ask: Callable, name: str, vectors: torch.Tensor | None, width: int) -> Callable:
    """Return ComfyUI's look-up with one more name. An encoder without vectors for the name reads no tokens there."""
    import torch

    rows = vectors if vectors is not None else torch.zeros(0, width)
    # Newer ComfyUI versions return the name too. An unknown name shows how many values this version returns.
    named = len(ask("graft-is-asking-for-nothing")) == 3

    def answer(wanted: str) -> tuple:
        # As ComfyUI reads file names: up to the first space, with trailing commas left over.
        word, *rest = wanted.split() or [""]
        stripped = word.rstrip(",")
        if stripped != name:
            return ask(wanted)
        leftover = " ".join([word[len(stripped) :], *rest]).strip()
        return (rows, name, leftover) if named else (rows, leftover)

    return answer


def spaced(caption: str, names: Iterable[str]) -> str:
    """Put spaces around each known `embedding:<name>` in a caption, since ComfyUI finds names only between spaces."""
    spread = re.sub(r"(?<!\s)(embedding:)", r" \1", caption)
    for name in names:
        spread = re.sub(rf"(embedding:{re.escape(name)}){ends_word(name)}(?!-|\.{SPACED})(?=\S)", r"\1 ", spread)
    return spread.strip()


def called_names(text: str) -> set[str]:
    """Return all names that a text may use for embeddings.

    The result holds more names than ComfyUI would read, because wildcards and weights change the caption. It holds the
    text after `embedding:` up to a space, and each part of it between commas, brackets, bars and colons.
    """
    runs = dict.fromkeys(re.findall(rf"{_IDENTIFIER}(\S+)", text))
    # Newer ComfyUI versions end a name at < or [.
    parts = [part for run in runs for part in (re.split(r"[<\[]", run)[0], *_PUNCTUATION.split(run))]
    if any(run.startswith("{") for run in runs):
        # A run that begins with alternatives may go on after spaces.
        parts += _PUNCTUATION.split(text)
    # All versions also try a name without its commas.
    names = dict.fromkeys(part.strip(",") for part in parts)
    return set([name for name in names if name and len(name) <= _LONGEST_NAME][:_MOST_NAMES])


def file_digest(tokenizer, name: str) -> str:
    """Return a hash of the vectors in ComfyUI's files of a name, for all encoders of a tokenizer; empty for no file."""
    total = hashlib.sha256()
    is_there = False
    for key, inner in sorted(vars(tokenizer).items()):
        if not hasattr(inner, "_try_get_embedding") or inner.embedding_directory is None:
            continue
        vectors = inner._try_get_embedding(name)[0]
        if vectors is not None:
            is_there = True
            total.update(f"{key}|{vectors.dtype}|{tuple(vectors.shape)}".encode())
            total.update(vectors.detach().to("cpu").float().contiguous().numpy().tobytes())
    if is_there:
        _CALLED.add(name)
    return total.hexdigest() if is_there else ""


def file_states() -> list[tuple]:
    """Return the state on disk of each embedding file that a training has used. It changes if a file is replaced."""
    if not _CALLED:
        return []
    import folder_paths
    from comfy.sd1_clip import expand_directory_list

    states = []
    folders = expand_directory_list(folder_paths.get_folder_paths("embeddings"))
    for name in sorted(_CALLED):
        paths = (os.path.join(folder, name.strip(",") + ending) for folder in sorted(folders) for ending in _ENDINGS)
        path = next((path for path in paths if os.path.isfile(path)), None)
        if path is not None:
            status = os.stat(path)
            states.append((name, path, status.st_size, status.st_mtime_ns, status.st_ino))
    return states


def names_of(tokenizer) -> list[str]:
    """Return the names of the embeddings attached to a tokenizer."""
    return list(getattr(tokenizer, _ATTACHED, {}))


def attached_digest(tokenizer) -> str:
    """Return a hash of the embeddings attached to a tokenizer; empty without any."""
    attached = getattr(tokenizer, _ATTACHED, {})
    if not attached:
        return ""
    total = hashlib.sha256()
    for name in sorted(attached):
        for key, vectors in sorted(attached[name].items()):
            total.update(f"{name}|{key}|{tuple(vectors.shape)}".encode())
            total.update(vectors.detach().to("cpu").float().contiguous().numpy().tobytes())
    return total.hexdigest()
