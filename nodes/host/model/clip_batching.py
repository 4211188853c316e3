"""Batched CLIP encoding in training: one pass for all captions if an encoder is trained, cached outputs if not.

ComfyUI's own code around its encoders (chunks, joining, padding) still runs. Only the calls of the inner encoders
return results that were computed for all captions together.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ....trainers.formats.embedding import WIDTHS

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP

    from ....trainers.preprocessing.prefetch import LRUCache

# Encoders whose rows do not depend on the rest of the batch; tests check it.
_ROW_BY_ROW = (*WIDTHS, "t5xxl")


def encode_together(clip: CLIP, tokens: Sequence[dict], keep: LRUCache) -> list[dict[str, torch.Tensor]]:
    """Return ComfyUI's encoding of each set of tokens, with its autograd graph.

    Args:
        clip: a CLIP whose module is a private tree.
        tokens: results of `clip.tokenize` for literal captions.
        keep: cache for the outputs of encoders without trained parameters.
    """
    return _each(clip, tokens, WIDTHS, keep)


def encode_alike(clip: CLIP, tokens: Sequence[dict]) -> list[dict[str, torch.Tensor]]:
    """Return ComfyUI's encoding of each set of tokens, all of one form."""
    return _each(clip, tokens, _ROW_BY_ROW, None)


def form_of(clip: CLIP, tokens: dict) -> Hashable:
    """Return number and lengths of the chunks for each encoder; None for tokens that must be encoded alone.

    That is so if a place holds vectors instead of a number, or if no encoder is known to compute row by row.
    """
    form = []
    for key, _ in _inner(clip, [tokens]):
        sections = _sections(tokens, key)
        if not all(isinstance(place, numbers.Integral) for section in sections for place in section):
            return None
        form.append((key, *(len(section) for section in sections)))
    return tuple(form) if any(key in _ROW_BY_ROW for key, *_ in form) else None


def _each(clip: CLIP, tokens: Sequence[dict], keys: Collection[str], keep: LRUCache | None) -> list[dict]:
    together = {key: _Rows(inner, tokens, key) for key, inner in _inner(clip, tokens) if key in keys}
    encodings = []
    for number, token_set in enumerate(tokens):
        with _answered(clip, tokens, number, together, keep):
            encodings.append(encoded(clip, token_set))
    return encodings


def encoded(clip: CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    """Return ComfyUI's encoding of tokens, under the names that its conditioning nodes use."""
    import torch

    encoding = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    encoding["cross_attn"] = encoding.pop("cond")
    return {name: value for name, value in encoding.items() if torch.is_tensor(value)}


def _inner(clip: CLIP, tokens: Sequence[dict]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name in tokens[0]:
        for key in (name, f"clip_{name}"):
            inner = getattr(clip.cond_stage_model, key, None)
            if hasattr(inner, "encode"):
                yield key, inner


def _name(key: str, tokens: dict) -> str:
    return key if key in tokens else key[len("clip_") :]


def _sections(tokens: dict, key: str) -> list[list]:
    return [[place[0] for place in chunk] for chunk in tokens[_name(key, tokens)]]


class _Rows:
    """An encoder's outputs for the chunks of all captions, computed at ComfyUI's first call.

    Not earlier: ComfyUI places the weights and sets the output layer just before that call.
    """

    def __init__(self, inner: torch.nn.Module, tokens: Sequence[dict], key: str):
        self._encode = inner.encode
        sections = [_sections(token_set, key) for token_set in tokens]
        self._rows = [section for rows in sections for section in rows]
        self._spans = list(itertools.pairwise([0, *itertools.accumulate(len(rows) for rows in sections)]))
        self._together = len({len(row) for row in self._rows}) == 1 and len(tokens) > 1
        self._found: tuple | None = None

    def answer(self, number: int, wanted: list[list]):
        """Return the outputs for caption `number`."""
        start, stop = self._spans[number]
        # ComfyUI asks for one more row for a prompt with weights; captions have none.
        if not self._together or len(wanted) != stop - start:
            return self._encode(wanted)
        if self._found is None:
            self._found = self._encode(self._rows)
        return _slice(self._found, start, stop)


@contextmanager
def _answered(
    clip: CLIP, tokens: Sequence[dict], number: int, together: dict[str, _Rows], keep: LRUCache | None
) -> Iterator[None]:
    """Let the encoders answer caption `number` with results that are computed already."""
    changed = []
    try:
        for key, inner in _inner(clip, tokens):
            answer = _answer(inner, key, number, together.get(key), keep)
            if answer is not None:
                inner.encode = answer
                changed.append(inner)
        yield
    finally:
        for inner in changed:
            del inner.encode


def _answer(inner, key: str, number: int, rows: _Rows | None, keep: LRUCache | None):
    if rows is not None:
        return functools.partial(rows.answer, number)
    if keep is None or any(parameter.requires_grad for parameter in inner.parameters()):
        return None
    encode = inner.encode
    return lambda wanted: keep.get(f"{key} {wanted}", lambda: _Kept(encode(wanted))).value


def _slice(value, start: int, stop: int):
    if isinstance(value, tuple):
        return tuple(_slice(part, start, stop) for part in value)
    if isinstance(value, dict):
        return {name: _slice(part, start, stop) for name, part in value.items()}
    return value if value is None else value[start:stop]


class _Kept(dict):
    """An encoder's output in a form that `LRUCache` can measure."""

    def __init__(self, value: tuple):
        import torch

        super().__init__({str(place): part for place, part in enumerate(value) if torch.is_tensor(part)})
        self.value = value
