"""Conditionings that a node of the host makes of a prompt and source pictures together, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data.examples import EncodedPrompt, LeftOut
from ..errors import DatasetError, RunError
from ..fingerprints import embedded_digest
from .cache import Cache, key_of
from .encode import TextCache, Unreadable, check_finite, open_picture
from .pixels import cut_unscaled, to_array

if TYPE_CHECKING:
    import torch

    from ..data.buckets import Crop
    from ..data.examples import Example
    from ..protocols import ImageCodec, TextEncoder

Sources = tuple[tuple["Example", "Crop"], ...]


@dataclass(frozen=True)
class SourcePrompt:
    """A prompt with the source pictures that the text encoder sees.

    Attributes:
        negative: it is a sample picture's negative prompt.
    """

    text: str
    sources: Sources
    negative: bool = False

    def __str__(self) -> str:
        return self.text


Prompt = str | EncodedPrompt | SourcePrompt


class SourceTextCache(TextCache):
    """Conditioning tensors of prompts with their source pictures, and of prompts that arrived encoded.

    Args:
        node: the host's node that encodes them, one of `recipe.options.PROMPT_NODES`.
    """

    def __init__(self, cache: Cache, node: str, encoder: TextEncoder):
        super().__init__(cache, encoder)
        self._node = node

    def key(self, prompt: Prompt) -> str:
        """Return the key of a prompt: text, content and crops of the source pictures, node, encoder."""
        if not isinstance(prompt, SourcePrompt):
            return super().key(prompt)
        embedded = embedded_digest(self._encoder, (prompt.text,))
        role = "negative" if prompt.negative else "positive"
        return key_of("source text 1", self._base, self._node, role, prompt.text, embedded, *_marks(prompt.sources))

    def fill(self, prompts: Iterable[Prompt], tick: Callable[[str], None]) -> None:
        """Encode the missing prompts.

        Raises:
            DatasetError: a conditioning is not finite, or a source picture cannot be read any more.
        """
        prompts = list(prompts)
        super().fill([prompt for prompt in prompts if not isinstance(prompt, SourcePrompt)], tick)
        wanted = {self.key(prompt): prompt for prompt in prompts if isinstance(prompt, SourcePrompt)}
        missing = self._cache.missing(wanted)
        try:
            for key in (key for key in wanted if key in missing):
                prompt = wanted[key]
                tick(prompt.text)
                encode = self._encoder.encode_with_sources
                tensors = encode(self._node, prompt.text, _pixels(prompt.sources), prompt.negative)
                self._cache.put(key, check_finite(prompt.text, tensors))
        except Unreadable as error:
            raise DatasetError(str(error), "Save the source picture again.", "dataset") from error
        finally:
            self._cache.flush()


class ReferenceCache:
    """Latents of source pictures, as the node that encodes the prompts makes them.

    Args:
        node: as of `SourceTextCache`.
    """

    def __init__(self, cache: Cache, node: str, codec: ImageCodec):
        self._cache = cache
        self._node = node
        self._codec = codec
        self._base = codec.fingerprint()

    def key(self, sources: Sources, size: tuple[int, int]) -> str:
        """Return the key of a picture's latents. `size` is that of the picture, since a node may depend on it."""
        return key_of("references 1", self._base, self._node, size, *_marks(sources))

    def fill(
        self, rows: Sequence[list[tuple[Sources, tuple[int, int]]]], tick: Callable[[str], None]
    ) -> list[LeftOut | None]:
        """Encode missing latents; return for each row None, or the reason for not training on it.

        Args:
            rows: the source pictures of each example, and the size of the picture, for each of its crops.
            tick: as of `LatentCache.fill`.
        """
        missing = self._cache.missing({self.key(*part) for row in rows for part in row})
        problems: list[LeftOut | None] = []
        try:
            for row in rows:
                try:
                    problems.append(None)
                    for sources, size in row:
                        if (key := self.key(sources, size)) in missing:
                            tick(sources[0][0].source.name)
                            self._encode(key, sources, size)
                            missing.discard(key)
                except Unreadable as error:
                    problems[-1] = error.row
        finally:
            self._cache.flush()
        return problems

    def _encode(self, key: str, sources: Sources, size: tuple[int, int]) -> None:
        import torch

        latents = self._codec.encode_sources(self._node, _pixels(sources), size)
        if not all(torch.isfinite(latent).all() for latent in latents):
            raise DatasetError(
                f"The VAE gives no finite latent for the source picture '{sources[0][0].source.name}'.",
                "Use a VAE that runs in float32 (start ComfyUI with --fp32-vae), or remove the picture.",
                "vae",
            )
        self._cache.put(key, {str(place): latent for place, latent in enumerate(latents)})

    def get(self, sources: Sources, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the latents [1, C, ...] of source pictures that were filled, by their place."""
        tensors = self._cache.get(self.key(sources, size))
        if tensors is None:
            raise RunError("The cached latents of source pictures are missing.", "Queue the graph again.")
        return tensors


def _marks(sources: Sources) -> list:
    return [(source.digest, crop.scaled, crop.offset, crop.bucket, crop.flip) for source, crop in sources]


def _pixels(sources: Sources) -> list[torch.Tensor]:
    import torch

    return [torch.from_numpy(to_array(cut_unscaled(open_picture(source), crop)))[None] for source, crop in sources]
