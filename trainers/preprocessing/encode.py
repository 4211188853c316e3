"""The latents of pictures and the conditionings of captions, each encoded once, several at a time where the host can.

What is encoded together follows from all that is wanted, and not from what of it is missing: what is interrupted and
begun again gives the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..data.examples import LeftOut
from ..data.scan import reason_of
from ..errors import DatasetError, RunError
from ..protocols import earlier_fingerprint, embedded_digest
from ..runs import earlier
from .cache import Cache, key_of
from .pixels import cut, to_array

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from ..data.buckets import Crop
    from ..data.examples import Example, Source
    from ..protocols import ImageCodec, TextEncoder

log = logging.getLogger(__name__)

Given = TypeVar("Given")
Made = TypeVar("Made")

# Captions: from 4 on the processor gains no more, and what is interrupted is lost.
_CAPTIONS = 8


class LatentCache:
    """The posterior of each example's cut, as the codec gives it: mean and log-variance, or the mean alone."""

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()
        self._earlier = earlier_base(cache, codec)
        self._together = _Together()

    def key(self, example: Example, crop: Crop) -> str:
        """What decides an example's latent: content, cut, codec with its dtype."""
        return _latent_key(self._base, example, crop)

    def fill(self, rows: Iterable[tuple[Example, list[Crop]]], tick: Callable[[str], None]) -> list[LeftOut | None]:
        """Encodes what is missing; for each example None, or why it cannot be trained on.

        Args:
            rows: each example with its cuts.
            tick: called with an example's name before it is encoded; may raise to interrupt, what was encoded is kept.

        Raises:
            DatasetError: naming the picture, when its latent is not finite.
        """
        rows = list(rows)
        owners: dict[str, list[tuple[int, Crop]]] = {}
        for place, (example, crops) in enumerate(rows):
            for crop in crops:
                owners.setdefault(self.key(example, crop), []).append((place, crop))
                if self._earlier:
                    self._cache.find_as(self.key(example, crop), _latent_key(self._earlier, example, crop))
        missing = self._cache.missing(owners)
        pictures = _Pictures([example for example, _ in rows], tick)
        try:
            for batch in self._batches(owners, missing):
                self._encode({key: owners[key][0] for key in batch}, missing, pictures)
            # Of a picture that is there twice, and could not be opened, the other one may be sound.
            for key in [key for key in owners if key in missing]:
                for owner in owners[key][1:]:
                    self._encode({key: owner}, missing, pictures)
        finally:
            self._cache.flush()
        return [pictures.problems.get(place) for place in range(len(rows))]

    def _batches(self, owners: dict[str, list[tuple[int, Crop]]], missing: set[str]) -> list[list[str]]:
        """Keys of cuts of one size, in the order of the list, as many as the codec takes; those with one missing."""
        found: list[list[str]] = []
        open_ones: dict[tuple[int, int], list[str]] = {}
        for key, ((_, crop), *_) in owners.items():
            width, height = crop.bucket
            batch = open_ones.get(crop.bucket)
            if batch is None or len(batch) >= self._codec.pixels_at_once // (width * height):
                batch = open_ones[crop.bucket] = []
                found.append(batch)
            batch.append(key)
        return [batch for batch in found if not missing.isdisjoint(batch)]

    def _encode(self, batch: dict[str, tuple[int, Crop]], missing: set[str], pictures: _Pictures) -> None:
        """Encodes a batch, and keeps what of it is missing."""
        import torch

        arrays = {key: pictures.cut(place, crop, key in missing) for key, (place, crop) in batch.items()}
        keys = [key for key, array in arrays.items() if array is not None]
        if missing.isdisjoint(keys):
            return
        for key, found in zip(keys, self._together.make([arrays[key] for key in keys], self._posteriors), strict=True):
            if key not in missing:
                continue
            if not all(torch.isfinite(value).all() for value in found.values()):
                raise DatasetError(
                    f"The VAE gives no finite latent for the picture '{pictures.name(batch[key][0])}'.",
                    "Use a VAE that runs in float32 (start ComfyUI with --fp32-vae), or take the picture out.",
                    "vae",
                )
            self._cache.put(key, found)
            missing.discard(key)

    def _posteriors(self, arrays: Sequence[np.ndarray]) -> list[dict[str, torch.Tensor]]:
        import numpy as np
        import torch

        mean, spread = self._codec.encode(torch.from_numpy(np.stack(arrays)))
        # Cloned: what is kept until a shard is full must not hold the whole batch.
        found = [{"mean": row.float().cpu().clone()} for row in mean.split(1)]
        for row, one in zip(() if spread is None else spread.split(1), found, strict=spread is not None):
            one["logvar"] = row.float().cpu().clone()
        return found

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """`mean` [1, C, ...] and, where there is a posterior, `logvar` of a key that was filled."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached latent {key} is gone.", "Queue again; it will be made anew.")
        return tensors


def _latent_key(base: str, example: Example, crop: Crop) -> str:
    return key_of("latent 2", base, example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip)


def earlier_base(cache: Cache, part: ImageCodec | TextEncoder) -> str:
    """The fingerprint by which a cache has what earlier versions encoded; empty where that was another's."""
    base, before = part.fingerprint(), earlier_fingerprint(part)
    # Beside the caches of all kinds, which are one folder to who clears them.
    is_ours = before != base and earlier.claim(os.path.dirname(cache.folder), before, base)
    return before if is_ours else ""


class _Pictures:
    """Opens the pictures of a filling, the last one kept for its next cut.

    Attributes:
        problems: by place, why a picture that is needed cannot be trained on.
    """

    def __init__(self, examples: Sequence[Example], tick: Callable[[str], None]):
        self.problems: dict[int, LeftOut] = {}
        self._examples = examples
        self._tick = tick
        self._told: set[int] = set()
        self._last: tuple[int, Image.Image] | None = None

    def name(self, place: int) -> str:
        """Of the picture's file."""
        return self._examples[place].source.name

    def cut(self, place: int, crop: Crop, is_needed: bool) -> np.ndarray | None:
        """[H, W, 3] of a picture, None where it cannot be had; what is needed is told of first."""
        if place in self.problems:
            return None
        if is_needed and place not in self._told:
            self._told.add(place)
            self._tick(self.name(place))
        try:
            return to_array(cut(self._opened(place), crop))
        except Unreadable as error:
            if is_needed:
                self.problems[place] = error.row
            return None

    def _opened(self, place: int) -> Image.Image:
        if self._last is None or self._last[0] != place:
            example = self._examples[place]
            # Let go of before the next one is decoded, or two large ones are held.
            self._last = None
            picture = opened(example.source)
            if picture.size != example.size:
                raise Unreadable(LeftOut(self.name(place), f"it is {picture.size} when decoded, not {example.size}"))
            self._last = place, picture
        return self._last[1]


class TextCache:
    """The conditioning tensors of each caption."""

    def __init__(self, cache: Cache, encoder: TextEncoder):
        self._cache = cache
        self._encoder = encoder
        self._base = encoder.fingerprint()
        self._earlier = earlier_base(cache, encoder)
        self._embedded: dict[str, str] = {}
        self._together = _Together()

    def fill(self, captions: Iterable[str], tick: Callable[[str], None]) -> None:
        """Encodes the captions that are missing.

        Raises:
            DatasetError: naming the caption, when its conditioning is not finite.
        """
        wanted = {self._key(caption): caption for caption in captions}
        for key, caption in wanted.items():
            # Earlier keys do not say which embedding files a caption was encoded with.
            if self._earlier and not self._embedded[caption]:
                self._cache.find_as(key, key_of("text 1", self._earlier, caption))
        missing = self._cache.missing(wanted)
        try:
            for batch in self._batches(wanted, missing):
                for key in batch:
                    if key in missing:
                        tick(wanted[key])
                made = self._together.make([wanted[key] for key in batch], self._encode)
                for key, tensors in zip(batch, made, strict=True):
                    if key in missing:
                        self._cache.put(key, _finite(wanted[key], tensors))
        finally:
            self._cache.flush()

    def _batches(self, wanted: dict[str, str], missing: set[str]) -> Iterator[list[str]]:
        """Keys of captions that the encoder takes together, out of so many in a row; those with one missing."""
        keys = list(wanted)
        for start in range(0, len(keys), _CAPTIONS):
            row = keys[start : start + _CAPTIONS]
            if missing.isdisjoint(row):
                # Nothing is asked of them: an encoder has to cut them into tokens to know.
                continue
            groups: dict[object, list[str]] = {}
            for key in row:
                form = self._encoder.form(wanted[key])
                groups.setdefault(key if form is None else form, []).append(key)
            yield from (group for group in groups.values() if not missing.isdisjoint(group))

    def _encode(self, captions: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        if len(captions) == 1:
            return [self._encoder.encode(captions[0])]
        return self._encoder.encode_all(captions)

    def get(self, caption: str) -> dict[str, torch.Tensor]:
        """The tensors of a caption that was filled."""
        tensors = self._cache.get(self._key(caption))
        if tensors is None:
            raise RunError(f"The cached conditioning of '{caption}' is gone.", "Queue again; it will be made anew.")
        return tensors

    def _key(self, caption: str) -> str:
        if caption not in self._embedded:
            # Once: a file that is replaced meanwhile must not change the key that was filled.
            self._embedded[caption] = embedded_digest(self._encoder, (caption,))
        embedded = self._embedded[caption]
        return key_of("text 1", self._base, caption, *([embedded] if embedded else []))


def _finite(caption: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DatasetError(
            f"The text encoder gives no finite conditioning for the caption '{caption}'.",
            "Load the text encoder in float32.",
            "clip",
        )
    return tensors


class _Together:
    """Makes several at once, and fewer where that fails, down to the one that it fails for.

    How many memory was enough for is remembered: each try that it is not enough for takes as long as one that it is.
    """

    def __init__(self):
        self._most = 0

    def make(self, given: Sequence[Given], make: Callable[[Sequence[Given]], list[Made]]) -> list[Made]:
        """What is made of each.

        Raises:
            RuntimeError, MemoryError: as it is raised for one alone.
        """
        # Not above: it takes torch along, which those that only describe datasets do not need.
        from ..memory.oom import is_out_of_memory

        found: list[Made] = []
        size = min(len(given), self._most or len(given))
        while len(found) < len(given):
            some = given[len(found) : len(found) + size]
            try:
                found += make(some)
                continue
            except (RuntimeError, MemoryError) as error:
                if len(some) == 1:
                    raise
                log.warning("Graft: %d could not be encoded at once; fewer are tried. %s", len(some), error)
                size = len(some) // 2
                if is_out_of_memory(error):
                    self._most = size
        return found


class Unreadable(Exception):
    """A picture that cannot be trained on, while the others can."""

    def __init__(self, row: LeftOut):
        super().__init__(str(row))
        self.row = row


def opened(source: Source) -> Image.Image:
    """The picture. Raises Unreadable."""
    try:
        return source.open()
    except DatasetError as error:
        raise Unreadable(LeftOut(source.name, reason_of(error, source.name))) from error
