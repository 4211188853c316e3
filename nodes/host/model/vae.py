"""ComfyUI's VAE as an image codec for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .fingerprint import module_digest, sampled_module_digest

if TYPE_CHECKING:
    import torch
    from comfy.sd import VAE


# Of pictures that are encoded together. On a processor more would be slower: what is larger than its caches, and than
# what the C library keeps, is fetched from the system anew by every layer.
_PIXELS_ON_CPU = 4 * 64 * 64
_PIXELS = 2 * 1024 * 1024


class ComfyCodec:
    """The graph's VAE, unchanged.

    Attributes:
        pixels_at_once: none for a VAE that takes a batch for the frames of a video.
    """

    def __init__(self, vae: VAE):
        self._vae = vae
        self.pixels_at_once = _pixels_at_once(vae)

    @property
    def factor(self) -> int:
        """Pixels a side for one latent position."""
        return int(self._vae.spacial_compression_encode())

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, H, W, 3] in 0..1 -> mean and log-variance of the host's latents, float32 on the CPU, unscaled.

        The host answers with the posterior's mode alone, so the moments are caught on their way into the regulariser.
        A VAE without one (TAESD, most video VAEs), or one that encoded in tiles, gives no log-variance.

        Raises:
            RuntimeError: of several pictures, when the host's memory was enough for tiles alone; fewer may need none.
        """
        import torch

        caught = []
        regulariser = getattr(self._vae.first_stage_model, "regularization", None)
        hook = None
        if isinstance(regulariser, torch.nn.Module):
            hook = regulariser.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
        try:
            # As a graph has it: what the host does in tiles it changes in place, which it may not do outside.
            with torch.inference_mode():
                mean = self._vae.encode(pixels)
        finally:
            if hook is not None:
                hook.remove()
        mean = mean.float().cpu().clone()
        if len(pixels) > 1 and caught and not _is_whole(caught, mean):
            raise RuntimeError("There was not enough memory: the VAE encoded in tiles.")
        return mean, _log_variance(caught, mean)

    def fingerprint(self) -> str:
        """Changes with weights and dtype."""
        return f"{module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"

    def earlier_fingerprint(self) -> str:
        """Of samples of its weights, as versions before had it."""
        return f"{sampled_module_digest(self._vae.first_stage_model)}|{self._vae.vae_dtype}"


def _pixels_at_once(vae: VAE) -> int:
    import comfy.model_management

    if vae.latent_dim != 2:
        return 0
    return _PIXELS_ON_CPU if comfy.model_management.is_device_cpu(vae.device) else _PIXELS


def _is_whole(caught: list[torch.Tensor], mean: torch.Tensor) -> bool:
    """Whether what was caught, in one pass or in several, is of just the pictures that the mean is of."""
    rows = sum(len(one) for one in caught)
    return rows == len(mean) and all(one.shape[2:] == mean.shape[2:] for one in caught)


def _log_variance(caught: list[torch.Tensor], mean: torch.Tensor) -> torch.Tensor | None:
    """The second half of the moments, if the first half is the mean that the host gave; None otherwise.

    Clamped as the field does (Rombach et al. 2022, DiagonalGaussianDistribution).
    """
    import torch

    if not caught or not _is_whole(caught, mean):
        return None
    moments = torch.cat([one.detach().float().cpu() for one in caught])
    if moments.ndim != mean.ndim or moments.shape[1] != 2 * mean.shape[1]:
        return None
    first, second = moments.chunk(2, dim=1)
    if not torch.allclose(first, mean, rtol=1e-3, atol=1e-3, equal_nan=True):
        return None
    return second.clamp(-30.0, 20.0).clone()
