"""Captions through a CLIP in training: at once where an encoder is trained, once each where it is not.

What the host does around its encoders (chunks, joining, padding) stays its own; only the calls of the encoders inside
are answered from what was computed for all captions together.
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

    from ....trainers.preprocessing.lru_cache import LRUCache

# Encoders of which each row of a batch is known to be what it is alone: tests hold it.
_ROW_BY_ROW = (*WIDTHS, "t5xxl")


def encode_together(clip: CLIP, tokens: Sequence[dict], keep: LRUCache) -> list[dict[str, torch.Tensor]]:
    """What the host encodes from each of the tokens, with its graph.

    Args:
        clip: whose module is a private tree.
        tokens: as `clip.tokenize` gives them for literal captions.
        keep: for what encoders give in which nothing is trained.
    """
    return _each(clip, tokens, WIDTHS, keep)


def encode_alike(clip: CLIP, tokens: Sequence[dict]) -> list[dict[str, torch.Tensor]]:
    """What the host encodes from each of the tokens, all of one form."""
    return _each(clip, tokens, _ROW_BY_ROW, None)


def form_of(clip: CLIP, tokens: dict) -> Hashable:
    """Number and lengths of the chunks for each encoder; None where one is to be encoded alone.

    That is where a place holds no number but vectors, and where no encoder is known to answer row by row.
    """
    found = []
    for key, _ in _inner(clip, [tokens]):
        sections = _sections(tokens, key)
        if not all(isinstance(place, numbers.Integral) for section in sections for place in section):
            return None
        found.append((key, *(len(section) for section in sections)))
    return tuple(found) if any(key in _ROW_BY_ROW for key, *_ in found) else None


def _each(clip: CLIP, tokens: Sequence[dict], keys: Collection[str], keep: LRUCache | None) -> list[dict]:
    """Args: keys: of the encoders that are asked once for all."""
    together = {key: _Rows(inner, tokens, key) for key, inner in _inner(clip, tokens) if key in keys}
    found = []
    for number, one in enumerate(tokens):
        with _answered(clip, tokens, number, together, keep):
            found.append(encoded(clip, one))
    return found


def encoded(clip: CLIP, tokens: dict) -> dict[str, torch.Tensor]:
    """What the host encodes from tokens, under the names that its conditioning nodes use."""
    import torch

    found = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    found["cross_attn"] = found.pop("cond")
    return {name: value for name, value in found.items() if torch.is_tensor(value)}


def _inner(clip: CLIP, tokens: Sequence[dict]) -> Iterator[tuple[str, torch.nn.Module]]:
    """(key, encoder) of each part of a CLIP that tokens are made for."""
    for name in tokens[0]:
        for key in (name, f"clip_{name}"):
            inner = getattr(clip.cond_stage_model, key, None)
            if hasattr(inner, "encode"):
                yield key, inner


def _name(key: str, tokens: dict) -> str:
    return key if key in tokens else key[len("clip_") :]


def _sections(tokens: dict, key: str) -> list[list]:
    """Lists of what stands for each place of each chunk, as the host passes them to an encoder."""
    return [[place[0] for place in chunk] for chunk in tokens[_name(key, tokens)]]


class _Rows:
    """What an encoder gives for the chunks of all captions, computed when the host first asks for one's.

    Not before: only then has the host placed the weights and set from which layer it takes what it gives.
    """

    def __init__(self, inner: torch.nn.Module, tokens: Sequence[dict], key: str):
        self._ask = inner.encode
        sections = [_sections(one, key) for one in tokens]
        self._rows = [section for one in sections for section in one]
        self._spans = list(itertools.pairwise([0, *itertools.accumulate(len(one) for one in sections)]))
        self._together = len({len(row) for row in self._rows}) == 1 and len(tokens) > 1
        self._found: tuple | None = None

    def answer(self, number: int, wanted: list[list]):
        """Of caption `number`."""
        start, stop = self._spans[number]
        # A prompt with weights would want one row more; captions have none.
        if not self._together or len(wanted) != stop - start:
            return self._ask(wanted)
        if self._found is None:
            self._found = self._ask(self._rows)
        return _slice(self._found, start, stop)


@contextmanager
def _answered(
    clip: CLIP, tokens: Sequence[dict], number: int, together: dict[str, _Rows], keep: LRUCache | None
) -> Iterator[None]:
    """Lets the encoders answer caption `number` from what is computed already."""
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
    ask = inner.encode
    return lambda wanted: keep.get(f"{key} {wanted}", lambda: _Kept(ask(wanted))).value


def _slice(value, start: int, stop: int):
    """Rows of whatever an encoder gives: a tuple of tensors, dicts of them, or nothing."""
    if isinstance(value, tuple):
        return tuple(_slice(part, start, stop) for part in value)
    if isinstance(value, dict):
        return {name: _slice(part, start, stop) for name, part in value.items()}
    return value if value is None else value[start:stop]


class _Kept(dict):
    """What an encoder gave, as `Keep` measures it."""

    def __init__(self, value: tuple):
        import torch

        super().__init__({str(place): part for place, part in enumerate(value) if torch.is_tensor(part)})
        self.value = value
