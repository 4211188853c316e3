"""ComfyUI's VAE as an image codec for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .digest import module_digest

if TYPE_CHECKING:
    import torch
    from comfy.sd import VAE


class ComfyCodec:
    """The graph's VAE, unchanged."""

    def __init__(self, vae: VAE):
        self._vae = vae

    @property
    def factor(self) -> int:
        """Pixels a side for one latent position."""
        return int(self._vae.spacial_compression_encode())

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] in 0..1 -> the host's latents, float32 on the CPU, unscaled."""
        import torch

        with torch.no_grad():
            return self._vae.encode(pixels).detach().float().cpu().clone()

    def fingerprint(self) -> str:
        """Changes with weights and dtype."""
        return f"{module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"
