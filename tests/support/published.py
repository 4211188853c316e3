"""diffusers' own networks with a tiny MODEL's weights, and their predictions: SDXL, SD3 and Flux."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel


@dataclass(frozen=True)
class Published:
    """A family as diffusers has it.

    Attributes:
        name: key in `models.SIZES`.
        kind, config: diffusers' class, and its configuration for that size.
        names: the host's function from its configuration to its map of diffusers' names.
        run: (network, x_t, sigma, conditionings) -> prediction, shaped as x_t.
    """

    name: str
    kind: type
    config: dict
    names: str
    run: Callable

    def network(self, model):
        """Return diffusers' network with the weights of a MODEL, and {its name: place in the host's network}."""
        import comfy.utils

        network = self.kind(**self.config)
        weights = model.model.diffusion_model.state_dict()
        known = getattr(comfy.utils, self.names)(model.model.model_config.unet_config)
        places = {name: known[name] for name in network.state_dict()}
        network.load_state_dict({name: picked(weights, place).clone() for name, place in places.items()})
        return network.eval(), places


def picked(tensors, place):
    """Return the value at a place of the host's map: by name, as a slice along a dimension, or transformed."""
    if isinstance(place, str):
        return tensors[place]
    value = tensors[place[0]]
    if place[1] is not None:
        value = value.narrow(*place[1])
    return place[2](value) if len(place) > 2 else value


def _pooled(conditionings):
    return torch.cat([one.tensors["pooled_output"] for one in conditionings])


def _context(conditionings):
    return torch.cat([one.tensors["cross_attn"] for one in conditionings])


def _run_sdxl(network, x_t, sigma, conditionings):
    from diffusers import DDPMScheduler

    from .diffusers_host import SCHEDULE

    bar = DDPMScheduler(**SCHEDULE).alphas_cumprod
    t = (((1 - bar) / bar).sqrt()[None] - sigma[:, None]).abs().argmin(1)
    # Height and width, top and left, height and width of the crop.
    sizes = [(*one.original_size[::-1], *one.crop[::-1], *one.target_size[::-1]) for one in conditionings]
    added = {"text_embeds": _pooled(conditionings), "time_ids": torch.tensor(sizes, dtype=torch.float32)}
    x = x_t / (sigma.view(-1, 1, 1, 1) ** 2 + 1).sqrt()
    return network(x, t, _context(conditionings), added_cond_kwargs=added).sample


def _run_sd3(network, x_t, sigma, conditionings):
    return network(x_t, _context(conditionings), _pooled(conditionings), sigma * 1000).sample


def _run_flux(network, x_t, sigma, conditionings):
    from diffusers import FluxPipeline

    batch, channels, height, width = x_t.shape
    context = _context(conditionings)
    packed = FluxPipeline._pack_latents(x_t, batch, channels, height, width)
    places = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, x_t.dtype)
    found = network(
        packed,
        context,
        _pooled(conditionings),
        sigma,
        places,
        torch.zeros(context.shape[1], 3),
        torch.ones(batch),
    ).sample
    return FluxPipeline._unpack_latents(found, height * 8, width * 8, 8)


PUBLISHED = {
    "SDXL": Published(
        "SDXL",
        UNet2DConditionModel,
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 48,
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 1280 + 6 * 256,
        },
        "unet_to_diffusers",
        _run_sdxl,
    ),
    "SD3": Published(
        "SD3",
        SD3Transformer2DModel,
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "caption_projection_dim": 128,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "qk_norm": "rms_norm",
        },
        "mmdit_to_diffusers",
        _run_sd3,
    ),
    "Flux": Published(
        "Flux as in diffusers",
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        "flux_to_diffusers",
        _run_flux,
    ),
}
