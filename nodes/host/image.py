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

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, H, W, 3] in 0..1 -> mean and log-variance of the host's latents, float32 on the CPU, unscaled.

        The host answers with the posterior's mode alone, so the moments are caught on their way into the regulariser.
        A VAE without one (TAESD, most video VAEs), or one that encoded in tiles, gives no log-variance.
        """
        import torch

        caught = []
        regulariser = getattr(self._vae.first_stage_model, "regularization", None)
        hook = None
        if isinstance(regulariser, torch.nn.Module):
            hook = regulariser.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
        try:
            with torch.no_grad():
                mean = self._vae.encode(pixels).detach().float().cpu().clone()
        finally:
            if hook is not None:
                hook.remove()
        return mean, _log_variance(caught, mean)

    def fingerprint(self) -> str:
        """Changes with weights and dtype."""
        return f"{module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"


def _log_variance(caught: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor | None:
    """The second half of the moments, if the first half is the mean that the host gave; None otherwise.

    Clamped as the field does (Rombach et al. 2022, DiagonalGaussianDistribution).
    """
    import torch

    if len(caught) != 1:
        return None
    moments = caught[0].detach().float().cpu()
    if moments.ndim != mean.ndim or moments.shape[1] != 2 * mean.shape[1] or moments.shape[2:] != mean.shape[2:]:
        return None
    first, second = moments.chunk(2, dim=1)
    if not torch.allclose(first, mean, rtol=1e-3, atol=1e-3, equal_nan=True):
        return None
    return second.clamp(-30.0, 20.0).clone()
