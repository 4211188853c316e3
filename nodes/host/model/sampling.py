"""Image sampling with ComfyUI's own sampler: previews in training, class images and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ....trainers.protocols import PictureRequest, PreviewSkipped
from ..server import control
from . import families

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

    def _latents(self, requests: Sequence[PictureRequest]) -> list[torch.Tensor]:
        """Return latents [1, C, ...], one for each request."""
        # Encode all texts first, so that the text encoder need not make room in between.
        plain = [request for request in requests if request.encoded is None]
        texts = dict.fromkeys(text for request in plain for text in (request.prompt, request.negative))
        encoded = {text: self._text.prompt(text) for text in texts}
        latents = []
        for request in requests:
            more = self._values(request)
            if request.encoded is None:
                pair = encoded[request.prompt], encoded[request.negative]
            else:
                pair = [[[values["cross_attn"], _without_cross_attn(values)]] for values in request.encoded]
            conditionings = [[[text, {**values, **more}] for text, values in prompt] for prompt in pair]
            latents.append(self._sample(*conditionings, request, [request.seed]))
        return latents

    def _decode(self, latent: torch.Tensor) -> Image.Image | list[Image.Image]:
        """Return a picture, or all frames if the latent [1, C, T, h, w] has several."""
        frames = _pictures(self._vae.decode(latent))
        return frames if latent.ndim == 5 and latent.shape[2] > 1 else frames[0]

    def _values(self, request: PictureRequest) -> dict:
        values = {} if request.guidance is None else {"guidance": request.guidance}
        if request.beside is None:
            return values
        kind = families.image_conditioning(self._patcher)
        return {**values, **families.image_conditioning_values(kind, request.beside)}

    def _sample(self, positive: list, negative: list, request: PictureRequest, seeds: Sequence[int]) -> torch.Tensor:
        """Return latents [len(seeds), C, ...] of one prompt. The noise of each depends on its own seed alone."""
        latent = empty_latent(self._patcher, self._vae, request.size, len(seeds), request.frames)
        noise = torch.cat([comfy.sample.prepare_noise(latent[:1], seed) for seed in seeds])
        latent, mask = self._with_first_frame(latent, request)
        prompts = (positive, negative, latent)
        more = {"callback": _check_interrupt, "disable_pbar": True, "seed": seeds[0], "noise_mask": mask}
        if families.preserves_variance(self._patcher):
            from comfy_extras.nodes_void import VOID_DDIM

            # The only sampler of ComfyUI whose latents have the scale that CogVideoX was made for.
            levels = self._patcher.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(levels, request.scheduler, request.steps)
            return comfy.sample.sample_custom(self._patcher, noise, request.cfg, VOID_DDIM(), sigmas, *prompts, **more)
        drawing = (request.steps, request.cfg, request.sampler_name, request.scheduler)
        return comfy.sample.sample(self._patcher, noise, *drawing, *prompts, **more)

    def _with_first_frame(
        self, latent: torch.Tensor, request: PictureRequest
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the latent with a request's first frame, and its noise mask; None without one of the latent's size."""
        frame = request.beside and request.beside.first_frame
        if frame is None or frame.shape[3:] != latent.shape[3:] or not families.takes_first_frame(self._patcher):
            return latent, None
        latent, mask = torch.zeros_like(latent), torch.ones_like(latent[:, :1])
        latent[:, :, :1], mask[:, :, :1] = frame, 0
        return self._patcher.model.process_latent_out(latent), mask


def empty_latent(
    patcher: ModelPatcher, vae: VAE, size: tuple[int, int], count: int = 1, frames: int = 1
) -> torch.Tensor:
    """Return zeros [count, C, ...] in the shape of the latents of pictures of (width, height) pixels, or of clips."""
    factor = int(vae.spacial_compression_encode())
    channels = patcher.get_model_object("latent_format").latent_channels
    latent = torch.zeros(count, channels, size[1] // factor, size[0] // factor)
    ratio = getattr(vae, "downscale_ratio", None)
    if frames > 1 and isinstance(ratio, tuple):
        latent = latent.unsqueeze(2).repeat(1, 1, ratio[0](frames), 1, 1)
    return comfy.sample.fix_empty_latent_channels(patcher, latent)


class ClassSampler(_Sampler):
    """A sampler of class images with the graph's model. It batches images only where that changes none of them."""

    def __init__(self, patcher: ModelPatcher, text: ComfyText, vae: VAE):
        super().__init__(patcher, text, vae)
        self._literal: dict[str, list] = {}

    def draw(self, request: PictureRequest, numbers: Sequence[int]) -> list[Image.Image]:
        """Return pictures of a prompt that is read literally, as captions are; picture i has the seed + i."""
        prompt = request.prompt
        with torch.no_grad():
            if prompt not in self._literal:
                self._literal[prompt] = self._text.encode_for_sampling(prompt)
            seeds = [(request.seed + number) % 2**64 for number in numbers]
            positive, negative = self._literal[prompt], self._text.prompt(request.negative)
            groups = [seeds] if request.sampler_name in _NOISELESS else [[seed] for seed in seeds]
            latents = torch.cat([self._sample(positive, negative, request, group) for group in groups])
            return [_pictures(self._vae.decode(latent))[0] for latent in latents.split(1)]


class PromptSampler(_Sampler):
    """A sampler that draws with one of the graph's models, including the patches that wait on it."""

    def draw(self, requests: Sequence[PictureRequest]) -> list[Image.Image | list[Image.Image]]:
        """Return a picture, or the frames of a clip, for each request."""
        with torch.no_grad():
            return [self._decode(latent) for latent in self._latents(requests)]


class PreviewSampler(_Sampler):
    """A sampler that draws with the private tree itself, so that no second copy of the weights is patched."""

    def __init__(self, model: ModelPatcher, base, text: ComfyText, vae: VAE):
        super().__init__(model.clone(), text, vae)
        self._patcher.model = base
        for name in _BAKED:
            if hasattr(self._patcher, name):
                setattr(self._patcher, name, type(getattr(self._patcher, name))())
        base.current_weight_patches_uuid = self._patcher.patches_uuid

    def draw(self, requests: Sequence[PictureRequest]) -> list[Image.Image | list[Image.Image]]:
        """Return a picture, or the frames of a clip, for each request."""
        with torch.no_grad():
            from ....trainers.memory.offload import is_on_other_device

            if is_on_other_device(self._patcher.model.diffusion_model):
                self._call_loaded()
            try:
                latents = self._latents(requests)
            finally:
                self._forget()
            return [self._decode(latent) for latent in latents]

    def _call_loaded(self) -> None:
        """Mark the tree as loaded, so that ComfyUI moves nothing: offloaded blocks fetch their weights themselves."""
        tree = self._patcher.model.diffusion_model
        base = self._patcher.model
        base.device = self._patcher.load_device
        base.model_lowvram = False
        base.current_weight_patches_uuid = self._patcher.patches_uuid
        from ....trainers.memory.offload import bytes_here

        base.model_loaded_weight_memory = self._patcher.size = max(1, bytes_here(tree))

    def _forget(self) -> None:
        """Remove the tree from ComfyUI's list of loaded models: ComfyUI must not unload it during training."""
        loaded = getattr(comfy.model_management, "current_loaded_models", [])
        for entry in list(loaded):
            if entry.model is self._patcher:
                loaded.remove(entry)
                if entry.model_finalizer is not None:
                    entry.model_finalizer.detach()


def _without_cross_attn(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a conditioning's values in the form of ComfyUI's nodes, which give `pooled_output` in any case."""
    return {"pooled_output": None, **{name: value for name, value in values.items() if name != "cross_attn"}}


def _check_interrupt(step: int, x0, x, total: int) -> None:
    """End sampling after the current step if the user cancelled, or if the preview is no longer wanted."""
    control.check_interrupt()
    if control.should_skip_optional_work():
        raise PreviewSkipped


def _pictures(pixels: torch.Tensor) -> list[Image.Image]:
    """Convert the frames of [1, (T,) H, W, 3] in 0..1 to PIL images."""
    from PIL import Image

    frames = (pixels.reshape(-1, *pixels.shape[-3:]).clamp(0, 1) * 255.0).round().to("cpu", torch.uint8)
    return [Image.fromarray(frame.numpy()) for frame in frames]
