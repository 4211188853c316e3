"""Captions through a CLIP in training: at once where an encoder is trained, once each where it is not.

What the host does around its encoders (chunks, joining, padding) stays its own; only the calls of the encoders inside
are answered from what was computed for all captions together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...trainers.formats.embedding import WIDTHS

if TYPE_CHECKING:
    import torch
    from comfy.sd import CLIP

    from ...trainers.data.memory import Keep


def encode_together(clip: CLIP, tokens: Sequence[dict], keep: Keep) -> list[dict[str, torch.Tensor]]:
    """What the host encodes from each of the tokens, with its graph.

    Args:
        clip: whose module is a private tree.
        tokens: as `clip.tokenize` gives them for literal captions.
        keep: for what encoders give in which nothing is trained.
    """
    together = {key: _all_rows(inner, tokens, key) for key, inner in _inner(clip, tokens) if key in WIDTHS}
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


def _all_rows(inner: torch.nn.Module, tokens: Sequence[dict], key: str):
    rows = [section for one in tokens for section in _sections(one, key)]
    same_length = len({len(row) for row in rows}) == 1
    return inner.encode(rows) if same_length and len(tokens) > 1 else None


@contextmanager
def _answered(clip: CLIP, tokens: Sequence[dict], number: int, together: dict, keep: Keep) -> Iterator[None]:
    """Lets the encoders answer caption `number` from what is computed already."""
    changed = []
    try:
        for key, inner in _inner(clip, tokens):
            answer = _answer(inner, tokens, number, key, together.get(key), keep)
            if answer is not None:
                inner.encode = answer
                changed.append(inner)
        yield
    finally:
        for inner in changed:
            del inner.encode


def _answer(inner, tokens: Sequence[dict], number: int, key: str, rows, keep: Keep):
    ask = inner.encode
    if rows is not None:
        start = sum(len(_sections(one, key)) for one in tokens[:number])
        count = len(_sections(tokens[number], key))
        # A prompt with weights would want one row more; captions have none.
        return lambda wanted: _slice(rows, start, count) if len(wanted) == count else ask(wanted)
    if key in WIDTHS or any(parameter.requires_grad for parameter in inner.parameters()):
        return None
    return lambda wanted: keep.get(f"{key} {wanted}", lambda: _Kept(ask(wanted))).value


def _slice(value, start: int, count: int):
    """Rows of whatever an encoder gives: a tuple of tensors, dicts of them, or nothing."""
    if isinstance(value, tuple):
        return tuple(_slice(part, start, count) for part in value)
    if isinstance(value, dict):
        return {name: _slice(part, start, count) for name, part in value.items()}
    return value if value is None else value[start : start + count]


class _Kept(dict):
    """What an encoder gave, as `Keep` measures it."""

    def __init__(self, value: tuple):
        import torch

        super().__init__({str(place): part for place, part in enumerate(value) if torch.is_tensor(part)})
        self.value = value
