"""ComfyUI's VAE as an image codec for training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ....trainers.errors import is_out_of_memory
from . import prompt_nodes
from .fingerprint import module_digest, sampled_module_digest

if TYPE_CHECKING:
    import torch
    from comfy.sd import VAE

log = logging.getLogger(__name__)

# Pixels of the pictures that are encoded together. Larger batches are slower on a CPU: every layer gets a tensor from
# the system anew if it exceeds the CPU's caches and the memory that the C library keeps.
_PIXELS_ON_CPU = 4 * 64 * 64
_PIXELS = 2 * 1024 * 1024
# Pixels and frames of a tile of a clip, and the frames that tiles share.
_TILE, _TILE_T, _OVERLAP_T = 256, 16, 4


class ComfyCodec:
    """The graph's VAE, unchanged.

    Attributes:
        pixels_at_once: 0 for a VAE that reads a batch as the frames of a video.
    """

    def __init__(self, vae: VAE):
        self._vae = vae
        self.pixels_at_once = _pixels_at_once(vae)

    @property
    def factor(self) -> int:
        """Return the pixels per side of one latent position."""
        return int(self._vae.spacial_compression_encode())

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode [B, H, W, 3] in 0..1 to mean and log-variance of ComfyUI's latents, float32 on the CPU, unscaled.

        ComfyUI returns the posterior's mode only, so a hook records the moments on their way into the regularizer. The
        log-variance is None if the VAE has no regularizer (TAESD, most video VAEs), or if it encoded in tiles.

        Raises:
            RuntimeError: memory sufficed for tiles only, with several pictures; fewer pictures may need no tiles.
        """
        mean, caught = self._encode(lambda: self._vae.encode(pixels))
        if len(pixels) > 1 and caught and not _is_whole(caught, mean):
            raise RuntimeError("Not enough memory: the VAE encoded in tiles.")
        return mean, _log_variance(caught, mean)

    def snap_frames(self, frames: int) -> int:
        """Return the largest number of frames that survives ComfyUI's encoding and decoding; 0 for a VAE of stills."""
        vae = self._vae
        if vae.latent_dim != 3 or vae.not_video:
            return 0
        down, up = vae.downscale_ratio, vae.upscale_ratio
        if not (isinstance(down, tuple) and isinstance(up, tuple)):
            return frames
        return next((count for count in range(frames, 1, -1) if up[0](down[0](count)) == count), 1)

    def encode_clip(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode the frames [T, H, W, 3] of one clip as `encode` does, to [1, C, latent frames, h, w].

        If ComfyUI's own fallback, tiles of all frames, takes too much memory, encode in tiles of few frames.
        """
        try:
            mean, caught = self._encode(lambda: self._vae.encode(pixels))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning(
                "Graft: a clip of %d frames does not fit. Graft encodes it in tiles of %d.", len(pixels), _TILE_T
            )
            tiles = {"tile_x": _TILE, "tile_y": _TILE, "overlap": _TILE // 4}
            in_time = {"tile_t": _TILE_T, "overlap_t": _OVERLAP_T}
            mean, caught = self._encode(lambda: self._vae.encode_tiled(pixels, **tiles, **in_time))
        return mean, _log_variance(caught, mean)

    def _encode(self, encode: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the latent of ComfyUI's encoding, float32 on the CPU, and the recorded moments."""
        import torch

        caught = []
        regularizer = getattr(self._vae.first_stage_model, "regularization", None)
        hook = None
        if isinstance(regularizer, torch.nn.Module):
            hook = regularizer.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
        try:
            # As in a graph: ComfyUI's tiles change inference tensors in place, which torch forbids outside this mode.
            with torch.inference_mode():
                mean = encode()
        finally:
            if hook is not None:
                hook.remove()
        return mean.float().cpu().clone(), caught

    def encode_sources(self, node: str, pictures: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        """Encode source pictures as one of ComfyUI's nodes does; float32 on the CPU, unscaled."""
        import torch

        with torch.inference_mode():
            latents = prompt_nodes.encode_sources(node, self._vae, pictures, size)
        return [latent.float().cpu().clone() for latent in latents]

    def fingerprint(self) -> str:
        """Return a fingerprint that changes with weights and dtype."""
        return f"{module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"

    def earlier_fingerprint(self) -> str:
        """Return the fingerprint that earlier versions computed from samples of the weights."""
        return f"{sampled_module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"


def _pixels_at_once(vae: VAE) -> int:
    import comfy.model_management

    if vae.latent_dim != 2:
        return 0
    return _PIXELS_ON_CPU if comfy.model_management.is_device_cpu(vae.device) else _PIXELS


def _is_whole(caught: list[torch.Tensor], mean: torch.Tensor) -> bool:
    """Report whether the recorded moments, of one pass or several, cover exactly the pictures of the mean."""
    rows = sum(len(recorded) for recorded in caught)
    return rows == len(mean) and all(recorded.shape[2:] == mean.shape[2:] for recorded in caught)


def _log_variance(caught: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor | None:
    """Return the second half of the moments if the first half equals ComfyUI's mean, else None.

    Clamped as in Rombach et al. 2022, DiagonalGaussianDistribution.
    """
    import torch

    if not caught or not _is_whole(caught, mean):
        return None
    moments = torch.cat([recorded.detach().float().cpu() for recorded in caught])
    if moments.ndim != mean.ndim or moments.shape[1] != 2 * mean.shape[1]:
        return None
    first, second = moments.chunk(2, dim=1)
    if not torch.allclose(first, mean, rtol=1e-3, atol=1e-3, equal_nan=True):
        return None
    return second.clamp(-30.0, 20.0).clone()
