"""Latents and conditionings on disk, each encoded once and found again by what decides it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..errors import DatasetError, RunError
from ..formats import files
from .pixels import cut, to_array

if TYPE_CHECKING:
    import torch

    from ..protocols import ImageCodec, TextEncoder
    from .buckets import Crop
    from .examples import Example

log = logging.getLogger(__name__)


class Cache:
    """Tensors by key below a folder; a damaged entry counts as absent."""

    def __init__(self, folder: str):
        self.folder = folder

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors of a key, None when absent or damaged."""
        path = self._path(key)
        if not os.path.isfile(path):
            return None
        try:
            tensors, metadata = files.read_tensors(path)
        except RunError as error:
            log.warning("Graft: cache entry %s is damaged and will be made again: %s", key, error)
            return None
        return tensors if metadata.get("key") == key else None

    def put(self, key: str, tensors: dict[str, torch.Tensor]) -> None:
        """Keeps tensors under a key."""
        files.write_tensors(self._path(key), tensors, {"key": key})

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key[:2], f"{key}.safetensors")


def key_of(*parts) -> str:
    """Hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LatentCache:
    """The latent of each example, [1, C, ...] float32, unscaled as the codec gives it."""

    def __init__(self, cache: Cache, codec: ImageCodec):
        self._cache = cache
        self._codec = codec
        self._base = codec.fingerprint()

    def key(self, example: Example, crop: Crop) -> str:
        """What decides an example's latent: content, cut, codec."""
        return key_of("latent 1", self._base, example.digest, crop.scaled, crop.offset, crop.bucket)

    def fill(self, pairs: Iterable[tuple[Example, Crop]], tick: Callable[[str], None]) -> list[str]:
        """Encodes what is missing; returns the key of each example, in order.

        Args:
            tick: called with an example's name before it is encoded; may raise to interrupt.

        Raises:
            DatasetError: naming the picture, when its latent is not finite.
        """
        keys = []
        for example, crop in pairs:
            key = self.key(example, crop)
            keys.append(key)
            if self._cache.get(key) is None:
                tick(example.source.name)
                self._cache.put(key, {"latent": self._encode(example, crop)})
        return keys

    def get(self, key: str) -> torch.Tensor:
        """The latent of a key that was filled."""
        tensors = self._cache.get(key)
        if tensors is None:
            raise RunError(f"The cached latent {key} is gone.", "Queue again; it will be made anew.")
        return tensors["latent"]

    def _encode(self, example: Example, crop: Crop) -> torch.Tensor:
        import torch

        pixels = torch.from_numpy(to_array(cut(example.source.open(), crop)))[None]
        latent = self._codec.encode(pixels)
        if not torch.isfinite(latent).all():
            raise DatasetError(
                f"The VAE gives no finite latent for the picture '{example.source.name}'.",
                "Use a VAE that runs in float32 (start ComfyUI with --fp32-vae), or take the picture out.",
                "vae",
            )
        return latent.float().cpu()


class TextCache:
    """The conditioning tensors of each caption."""

    def __init__(self, cache: Cache, encoder: TextEncoder):
        self._cache = cache
        self._encoder = encoder
        self._base = encoder.fingerprint()

    def fill(self, captions: Iterable[str], tick: Callable[[str], None]) -> None:
        """Encodes the captions that are missing.

        Raises:
            DatasetError: naming the caption, when its conditioning is not finite.
        """
        import torch

        for caption in dict.fromkeys(captions):
            key = self._key(caption)
            if self._cache.get(key) is not None:
                continue
            tick(caption)
            tensors = self._encoder.encode(caption)
            if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
                raise DatasetError(
                    f"The text encoder gives no finite conditioning for the caption '{caption}'.",
                    "Load the text encoder in float32.",
                    "clip",
                )
            self._cache.put(key, tensors)

    def get(self, caption: str) -> dict[str, torch.Tensor]:
        """The tensors of a caption that was filled."""
        tensors = self._cache.get(self._key(caption))
        if tensors is None:
            raise RunError(f"The cached conditioning of '{caption}' is gone.", "Queue again; it will be made anew.")
        return tensors

    def _key(self, caption: str) -> str:
        return key_of("text 1", self._base, caption)
