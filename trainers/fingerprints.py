"""Fingerprints of a host's parts, and their digest for the identity of runs and caches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .protocols import Denoiser, ImageCodec, TextEncoder


def earlier_fingerprint(part: Denoiser | TextEncoder | ImageCodec) -> str:
    """Return the fingerprint that earlier versions gave a part of a base, to find the files that they made.

    A host without earlier versions has no method `earlier_fingerprint`; then return the current fingerprint.
    """
    return getattr(part, "earlier_fingerprint", part.fingerprint)()


def embedded_digest(text: TextEncoder, texts: Sequence[str], without: Sequence[str] = ()) -> str:
    """Return `text.embedded_digest(texts, without)`; empty for a host without embedding files."""
    given = getattr(text, "embedded_digest", None)
    return given(texts, without) if given is not None else ""


def base_digest(*fingerprints: str) -> str:
    """Hash the fingerprints of a base's parts: denoiser, text encoder, codec, and the adapter to start from."""
    return hashlib.sha256("|".join(fingerprints).encode()).hexdigest()
