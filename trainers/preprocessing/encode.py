"""Latents of pictures and conditionings of captions, each encoded once, in batches if the host can.

A batch depends on all requested entries, not on the missing ones alone. An encoding that is interrupted and started
again therefore gives the same bits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from ..data.examples import EncodedPrompt, LeftOut, reason_of
from ..errors import DatasetError, RunError
from ..fingerprints import earlier_fingerprint, embedded_digest
from ..runs import earlier
from .cache import Cache, key_of
from .pixels import clip_array, cut, to_array

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from ..data.buckets import Crop
    from ..data.examples import Example, Source
    from ..protocols import ImageCodec, TextEncoder

log = logging.getLogger(__name__)

Item = TypeVar("Item")
Encoded = TypeVar("Encoded")

# Captions per batch. The CPU gains nothing above 4, and an interruption loses the batch.
_CAPTIONS = 8


class LatentCache:
    """Posterior of each example's crop, as the codec gives it: mean and log-variance, or the mean alone.

    Each piece of a clip is an entry of its own.
    """

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()
        self._earlier = earlier_base(cache, codec)
        self._together = _Together()

    def key(self, example: Example, crop: Crop) -> str:
        """Return the key of an example's latent: content, crop, codec with its dtype."""
        return _latent_key(self._base, example, crop)

    def fill(self, rows: Iterable[tuple[Example, list[Crop]]], tick: Callable[[str], None]) -> list[LeftOut | None]:
        """Encode missing latents; return for each example None, or the reason for not training on it.

        Args:
            rows: each example with its crops.
            tick: called with an example's name before it is encoded; may raise to interrupt. The cache keeps
                finished entries.

        Raises:
            DatasetError: a latent is not finite.
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
            # If a picture could not be opened, its duplicate in another file may be sound.
            for key in [key for key in owners if key in missing]:
                for owner in owners[key][1:]:
                    self._encode({key: owner}, missing, pictures)
        finally:
            self._cache.flush()
        return [pictures.problems.get(place) for place in range(len(rows))]

    def _batches(self, owners: dict[str, list[tuple[int, Crop]]], missing: set[str]) -> list[list[str]]:
        """Group keys of crops of one size, in list order, up to the codec's limit; return groups with a missing key."""
        batches: list[list[str]] = []
        open_batches: dict[tuple[int, int], list[str]] = {}
        for key, ((_, crop), *_) in owners.items():
            width, height = crop.bucket
            batch = open_batches.get(crop.bucket)
            if crop.piece is not None:
                # Alone, so that one piece of a clip is decoded at a time.
                batches.append([key])
                continue
            if batch is None or len(batch) >= self._codec.pixels_at_once // (width * height):
                batch = open_batches[crop.bucket] = []
                batches.append(batch)
            batch.append(key)
        return [batch for batch in batches if not missing.isdisjoint(batch)]

    def _encode(self, batch: dict[str, tuple[int, Crop]], missing: set[str], pictures: _Pictures) -> None:
        import torch

        arrays = {key: pictures.cut(place, crop, key in missing) for key, (place, crop) in batch.items()}
        keys = [key for key, array in arrays.items() if array is not None]
        if missing.isdisjoint(keys):
            return
        for key, tensors in zip(
            keys, self._together.make([arrays[key] for key in keys], self._posteriors), strict=True
        ):
            if key not in missing:
                continue
            if not all(torch.isfinite(value).all() for value in tensors.values()):
                raise DatasetError(
                    f"The VAE gives no finite latent for the picture '{pictures.name(batch[key][0])}'.",
                    "Use a VAE that runs in float32 (start ComfyUI with --fp32-vae), or remove the picture.",
                    "vae",
                )
            self._cache.put(key, tensors)
            missing.discard(key)

    def _posteriors(self, arrays: Sequence[np.ndarray]) -> list[dict[str, torch.Tensor]]:
        import numpy as np
        import torch

        if arrays[0].ndim == 4:
            mean, spread = self._codec.encode_clip(torch.from_numpy(arrays[0]))
        else:
            mean, spread = self._codec.encode(torch.from_numpy(np.stack(arrays)))
        # Clone: an entry waits in memory until a shard is full, and must not keep the whole batch alive.
        posteriors = [{"mean": row.float().cpu().clone()} for row in mean.split(1)]
        for row, posterior in zip(() if spread is None else spread.split(1), posteriors, strict=spread is not None):
            posterior["logvar"] = row.float().cpu().clone()
        return posteriors

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """Return `mean` [1, C, ...] and, if there is a posterior, `logvar` of a key that was filled."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached latent {key} is missing.", "Queue the graph again to compute it.")
        return tensors


def _latent_key(base: str, example: Example, crop: Crop) -> str:
    cut_out = base, example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip
    if crop.piece is None:
        return key_of("latent 2", *cut_out)
    return key_of("clip 1", *cut_out, crop.piece, example.clip.rate)


def earlier_base(cache: Cache, part: ImageCodec | TextEncoder) -> str:
    """Return the fingerprint of earlier versions' cache entries; empty if another model used that fingerprint first."""
    base, before = part.fingerprint(), earlier_fingerprint(part)
    # Keep the claim in the folder of all kinds of caches, since users clear that folder as a whole.
    is_ours = before != base and earlier.claim(os.path.dirname(cache.folder), before, base)
    return before if is_ours else ""


class _Pictures:
    """Pictures of one `fill`; keeps the last opened one for its next crop, and problems by place."""

    def __init__(self, examples: Sequence[Example], tick: Callable[[str], None]):
        self.problems: dict[int, LeftOut] = {}
        self._examples = examples
        self._tick = tick
        self._reported: set[int] = set()
        self._last: tuple[int, Image.Image] | None = None

    def name(self, place: int) -> str:
        return self._examples[place].source.name

    def cut(self, place: int, crop: Crop, is_needed: bool) -> np.ndarray | None:
        """Return [(frames,) H, W, 3] of a picture or clip, None if it cannot be read.

        Call `tick` before the first needed crop.
        """
        if place in self.problems:
            return None
        if is_needed and place not in self._reported:
            self._reported.add(place)
            self._tick(self.name(place))
        example = self._examples[place]
        try:
            return _clip(example, crop) if crop.piece else to_array(cut(self._opened(place), crop))
        except Unreadable as error:
            if is_needed:
                self.problems[place] = error.row
            return None

    def _opened(self, place: int) -> Image.Image:
        if self._last is None or self._last[0] != place:
            # Release it before decoding the next one, so that two large pictures are never held at once.
            self._last = None
            self._last = place, open_picture(self._examples[place])
        return self._last[1]


class TextCache:
    """Conditioning tensors of each caption and of each prompt that arrived encoded."""

    def __init__(self, cache: Cache, encoder: TextEncoder):
        self._cache = cache
        self._encoder = encoder
        self._base = encoder.fingerprint()
        self._earlier = earlier_base(cache, encoder)
        self._embedded: dict[str, str] = {}
        self._together = _Together()

    def fill(self, prompts: Iterable[str | EncodedPrompt], tick: Callable[[str], None]) -> None:
        """Encode the missing captions, and store the missing encoded prompts.

        Raises:
            DatasetError: a conditioning is not finite.
            RunError: an encoded prompt of a job is missing.
        """
        prompts = list(prompts)
        self._store([prompt for prompt in prompts if isinstance(prompt, EncodedPrompt)], tick)
        wanted = {self.key(caption): caption for caption in prompts if isinstance(caption, str)}
        for key, caption in wanted.items():
            # Earlier keys do not include the embedding files that a caption was encoded with.
            if self._earlier and not self._embedded[caption]:
                self._cache.find_as(key, key_of("text 1", self._earlier, caption))
        missing = self._cache.missing(wanted)
        try:
            for batch in self._batches(wanted, missing):
                for key in batch:
                    if key in missing:
                        tick(wanted[key])
                encoded = self._together.make([wanted[key] for key in batch], self._encode)
                for key, tensors in zip(batch, encoded, strict=True):
                    if key in missing:
                        self._cache.put(key, check_finite(wanted[key], tensors))
        finally:
            self._cache.flush()

    def _store(self, prompts: Sequence[EncodedPrompt], tick: Callable[[str], None]) -> None:
        by_key = {self.key(prompt): prompt for prompt in prompts}
        for key in self._cache.missing(by_key):
            tick(str(by_key[key]))
            if by_key[key].tensors is None:
                raise RunError(
                    "A conditioning is missing or damaged, and a job cannot make it again.", "Export the job again."
                )
            self._cache.put(key, by_key[key].tensors)
        self._cache.flush()

    def _batches(self, wanted: dict[str, str], missing: set[str]) -> Iterator[list[str]]:
        """Yield groups of keys that the encoder takes together, from `_CAPTIONS` in a row, each with a missing key."""
        keys = list(wanted)
        for start in range(0, len(keys), _CAPTIONS):
            row = keys[start : start + _CAPTIONS]
            if missing.isdisjoint(row):
                # Skip `form`, since an encoder has to tokenize the captions for it.
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

    def get(self, prompt: str | EncodedPrompt) -> dict[str, torch.Tensor]:
        """Return the tensors of a prompt that was filled."""
        tensors = self._cache.get(self.key(prompt))
        if tensors is None:
            raise RunError(f"The cached conditioning of '{prompt}' is missing.", "Queue the graph again to compute it.")
        return tensors

    def key(self, prompt: str | EncodedPrompt) -> str:
        """Return the key of a prompt's conditioning: its text, encoder and embedding files, or what arrived encoded."""
        if isinstance(prompt, EncodedPrompt):
            return key_of("encoded 1", prompt.digest)
        caption = prompt
        if caption not in self._embedded:
            # Compute it once: a file that is replaced later must not change the key that was filled.
            self._embedded[caption] = embedded_digest(self._encoder, (caption,))
        embedded = self._embedded[caption]
        return key_of("text 1", self._base, caption, *([embedded] if embedded else []))


def check_finite(caption: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a caption's conditioning. Raise DatasetError if it is not finite."""
    import torch

    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise DatasetError(
            f"The text encoder gives no finite conditioning for the caption '{caption}'.",
            "Load the text encoder in float32.",
            "clip",
        )
    return tensors


class _Together:
    """Batched calls that fall back to smaller batches on failure, down to single items.

    The object remembers a batch size that fits into memory, because each failed try takes as long as a successful one.
    """

    def __init__(self):
        self._most = 0

    def make(self, items: Sequence[Item], make: Callable[[Sequence[Item]], list[Encoded]]) -> list[Encoded]:
        """Return the results of all items, in order.

        Raises:
            RuntimeError, MemoryError: a single item fails with it.
        """
        # Import it here: it imports torch, which callers that only describe datasets do not need.
        from ..errors import is_out_of_memory

        encoded: list[Encoded] = []
        size = min(len(items), self._most or len(items))
        while len(encoded) < len(items):
            batch = items[len(encoded) : len(encoded) + size]
            try:
                encoded += make(batch)
                continue
            except (RuntimeError, MemoryError) as error:
                if len(batch) == 1:
                    raise
                log.warning("Graft: cannot encode %d inputs at once. Graft tries fewer. %s", len(batch), error)
                size = len(batch) // 2
                if is_out_of_memory(error):
                    self._most = size
        return encoded


class Unreadable(Exception):
    """Error for a picture that cannot be trained on, while the others can."""

    def __init__(self, row: LeftOut):
        super().__init__(str(row))
        self.row = row


def open_picture(example: Example) -> Image.Image:
    """Open an example's picture. Raise Unreadable if that fails, or if its size has changed."""
    picture = opened(example.source)
    if picture.size != example.size:
        raise Unreadable(LeftOut(example.source.name, f"its size is {picture.size} when decoded, not {example.size}"))
    return picture


def _clip(example: Example, crop: Crop) -> np.ndarray:
    try:
        return clip_array(example, crop)
    except DatasetError as error:
        raise Unreadable(LeftOut(example.source.name, reason_of(error, example.source.name))) from error


def opened(source: Source) -> Image.Image:
    """Open the picture of a source. Raise Unreadable if that fails."""
    try:
        return source.open()
    except DatasetError as error:
        raise Unreadable(LeftOut(source.name, reason_of(error, source.name))) from error
