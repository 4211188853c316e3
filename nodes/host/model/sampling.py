"""Image sampling with ComfyUI's own sampler: previews in training, class images and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ....trainers.memory.offload import bytes_here, is_on_other_device
from ....trainers.protocols import PreviewRequest, PreviewSkipped
from ..server import control
from . import families
from .text_encoder import ComfyText

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE
    from PIL import Image

    from .text_encoder import ComfyText

SAMPLERS = comfy.samplers.KSampler.SAMPLERS
SCHEDULERS = comfy.samplers.KSampler.SCHEDULERS

# State of the graph's patcher that the private tree already contains.
_BAKED = ("patches", "backup", "backup_buffers", "object_patches", "object_patches_backup", "pinned")


# Samplers that draw no noise while sampling. The others draw noise for a whole batch from one seed, so an image would
# depend on its neighbors in the batch: they sample one image at a time.
_NOISELESS = {
    "euler",
    "euler_cfg_pp",
    "heun",
    "heunpp2",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "res_multistep_cfg_pp",
    "gradient_estimation",
    "gradient_estimation_cfg_pp",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
}


class _Sampler:
    """A sampler that draws with a patcher as ComfyUI's own sampling nodes do."""

    def __init__(self, patcher: ModelPatcher, text: ComfyText, vae: VAE):
        self._patcher = patcher
        self._text = text
        self._vae = vae

    def _latents(self, request: PreviewRequest) -> list[torch.Tensor]:
        """Return latents [1, C, ...], one for each prompt of the request; picture i has the seed + i."""
        negative = self._text.prompt(request.negative)
        # Encode all texts first, so that the text encoder need not make room in between.
        positives = [self._text.prompt(prompt) for prompt in request.prompts]
        found = []
        for index, positive in enumerate(positives):
            more = self._values(request, index)
            conditionings = [[[text, {**values, **more}] for text, values in one] for one in (positive, negative)]
            found.append(self._sample(*conditionings, request, [(request.seed + index) % 2**64]))
        return found

    def _values(self, request: PreviewRequest, index: int) -> dict:
        """Return the conditioning values of a prompt other than its text."""
        return {}

    def _sample(self, positive: list, negative: list, request: PreviewRequest, seeds: Sequence[int]) -> torch.Tensor:
        """Return latents [len(seeds), C, ...] of one prompt. The noise of each depends on its own seed alone."""
        factor = int(self._vae.spacial_compression_encode())
        channels = self._patcher.get_model_object("latent_format").latent_channels
        latent = torch.zeros(len(seeds), channels, request.size[1] // factor, request.size[0] // factor)
        latent = comfy.sample.fix_empty_latent_channels(self._patcher, latent)
        return comfy.sample.sample(
            self._patcher,
            torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds]),
            request.steps,
            request.cfg,
            request.sampler_name,
            request.scheduler,
            positive,
            negative,
            latent,
            callback=_check_interrupt,
            disable_pbar=True,
            seed=seeds[0],
        )


class ClassSampler(_Sampler):
    """A sampler of class images with the graph's model. It batches images only where that changes none of them."""

    def __init__(self, patcher: ModelPatcher, text: ComfyText, vae: VAE):
        super().__init__(patcher, text, vae)
        self._literal: dict[str, list] = {}

    def draw(self, request: PreviewRequest, numbers: Sequence[int]) -> list[Image.Image]:
        """Return pictures of the request's one prompt, read literally as captions are; picture i has the seed + i."""
        (prompt,) = request.prompts
        with torch.no_grad():
            if prompt not in self._literal:
                self._literal[prompt] = self._text.encode_for_sampling(prompt)
            seeds = [(request.seed + number) % 2**64 for number in numbers]
            positive, negative = self._literal[prompt], self._text.prompt(request.negative)
            groups = [seeds] if request.sampler_name in _NOISELESS else [[seed] for seed in seeds]
            latents = torch.cat([self._sample(positive, negative, request, group) for group in groups])
            return [_picture(self._vae.decode(latent)) for latent in latents.split(1)]


class PromptSampler(_Sampler):
    """A sampler that draws with one of the graph's models, including the patches that wait on it."""

    def draw(self, request: PreviewRequest) -> list[Image.Image]:
        """Return one picture for each prompt."""
        with torch.no_grad():
            return [_picture(self._vae.decode(latent)) for latent in self._latents(request)]


class PreviewSampler(_Sampler):
    """A sampler that draws with the private tree itself, so that no second copy of the weights is patched."""

    def __init__(self, model: ModelPatcher, base, text: ComfyText, vae: VAE, image_conditioning: str = ""):
        super().__init__(model.clone(), text, vae)
        self._image_conditioning = image_conditioning
        self._patcher.model = base
        for name in _BAKED:
            if hasattr(self._patcher, name):
                setattr(self._patcher, name, type(getattr(self._patcher, name))())
        base.current_weight_patches_uuid = self._patcher.patches_uuid

    def draw(self, request: PreviewRequest) -> list[Image.Image]:
        """Return one picture for each prompt."""
        with torch.no_grad():
            if is_on_other_device(self._patcher.model.diffusion_model):
                self._call_loaded()
            try:
                latents = self._latents(request)
            finally:
                self._forget()
            return [_picture(self._vae.decode(latent)) for latent in latents]

    def _values(self, request: PreviewRequest, index: int) -> dict:
        if not request.beside:
            return {}
        return families.image_conditioning_values(self._image_conditioning, request.beside[index % len(request.beside)])

    def _call_loaded(self) -> None:
        """Mark the tree as loaded, so that ComfyUI moves nothing: offloaded blocks fetch their weights themselves."""
        tree = self._patcher.model.diffusion_model
        base = self._patcher.model
        base.device = self._patcher.load_device
        base.model_lowvram = False
        base.current_weight_patches_uuid = self._patcher.patches_uuid
        base.model_loaded_weight_memory = self._patcher.size = max(1, bytes_here(tree))

    def _forget(self) -> None:
        """Remove the tree from ComfyUI's list of loaded models: ComfyUI must not unload it during training."""
        loaded = getattr(comfy.model_management, "current_loaded_models", [])
        for entry in list(loaded):
            if entry.model is self._patcher:
                loaded.remove(entry)
                if entry.model_finalizer is not None:
                    entry.model_finalizer.detach()


def _check_interrupt(step: int, x0, x, total: int) -> None:
    """End sampling after the current step if the user cancelled, or if the preview is no longer wanted."""
    control.check_interrupt()
    if control.should_skip_optional_work():
        raise PreviewSkipped


def _picture(pixels: torch.Tensor) -> Image.Image:
    """Convert the first frame of [1, (T,) H, W, 3] in 0..1 to a PIL image."""
    from PIL import Image

    frame = pixels.reshape(-1, *pixels.shape[-3:])[0]
    return Image.fromarray((frame.clamp(0, 1) * 255.0).round().to("cpu", torch.uint8).numpy())
