"""Pictures by ComfyUI's own sampler: of a model in training, and for class images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ...trainers.protocols import PreviewRequest

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE
    from PIL import Image

    from .text import ComfyText

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS

# What belongs to the graph's patcher and is already part of the tree.
_BAKED = ("patches", "backup", "backup_buffers", "object_patches", "object_patches_backup", "pinned")


class PreviewSampler:
    """Draws with the private tree itself, so that no second copy of the weights is patched for it."""

    def __init__(self, model: ModelPatcher, base, text: ComfyText, vae: VAE):
        self._patcher = model.clone()
        self._patcher.model = base
        for name in _BAKED:
            if hasattr(self._patcher, name):
                setattr(self._patcher, name, type(getattr(self._patcher, name))())
        base.current_weight_patches_uuid = self._patcher.patches_uuid
        self._text = text
        self._vae = vae

    def draw(self, request: PreviewRequest) -> list[Image.Image]:
        """One picture for each prompt."""
        with torch.no_grad():
            negative = self._text.prompt(request.negative)
            positives = [self._text.prompt(prompt) for prompt in request.prompts]
            try:
                latents = [self._sample(positive, negative, request, i) for i, positive in enumerate(positives)]
            finally:
                self._forget()
            return [_picture(self._vae.decode(latent)) for latent in latents]

    def _sample(self, positive: list, negative: list, request: PreviewRequest, index: int) -> torch.Tensor:
        factor = int(self._vae.spacial_compression_encode())
        channels = self._patcher.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, request.size[1] // factor, request.size[0] // factor)
        latent = comfy.sample.fix_empty_latent_channels(self._patcher, latent)
        seed = request.seed + index
        return comfy.sample.sample(
            self._patcher,
            comfy.sample.prepare_noise(latent, seed),
            request.steps,
            request.cfg,
            request.sampler_name,
            request.scheduler,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=seed,
        )

    def _forget(self) -> None:
        """Takes the tree off the host's list of loaded models: the host must not unload what is being trained."""
        loaded = getattr(comfy.model_management, "current_loaded_models", [])
        for entry in list(loaded):
            if entry.model is self._patcher:
                loaded.remove(entry)
                if entry.model_finalizer is not None:
                    entry.model_finalizer.detach()


def _picture(pixels: torch.Tensor) -> Image.Image:
    """[1, (T,) H, W, 3] in 0..1 -> PIL."""
    from PIL import Image

    frame = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray((frame.clamp(0, 1) * 255.0).round().to("cpu", torch.uint8).numpy())
