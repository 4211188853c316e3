"""Tiny MODELs of the host's own classes with random weights, each as a loader would hand it on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable


@dataclass(frozen=True)
class Tiny:
    """A model family in small.

    Attributes:
        build: gives the host's model_config with a small unet_config.
        latent: [C, h, w] of an example.
        context: (tokens, width) of its text conditioning.
        pooled: width of its pooled conditioning, 0 for none.
    """

    build: Callable
    latent: tuple[int, int, int]
    context: tuple[int, int]
    pooled: int = 0


def _unet(**more) -> dict:
    return dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        use_spatial_transformer=True,
        use_temporal_attention=False,
        legacy=False,
        **more,
    )


def _sd1():
    import comfy.supported_models

    config = _unet(
        model_channels=32,
        num_res_blocks=[1, 1],
        channel_mult=[1, 2],
        context_dim=48,
        transformer_depth=[1, 1],
        transformer_depth_output=[1, 1, 1, 1],
        transformer_depth_middle=1,
        use_linear_in_transformer=False,
        adm_in_channels=None,
    )
    return comfy.supported_models.SD15(config)


def _sdxl():
    import comfy.supported_models

    # 1280 pooled and six sizes of 256 each are what the host's SDXL class makes of a conditioning.
    config = _unet(
        model_channels=32,
        num_res_blocks=[1, 1],
        channel_mult=[1, 2],
        num_heads=-1,
        num_head_channels=16,
        context_dim=48,
        transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 1, 1],
        transformer_depth_middle=1,
        use_linear_in_transformer=True,
        num_classes="sequential",
        adm_in_channels=2816,
    )
    made = comfy.supported_models.SDXL(config)
    made.unet_config["num_head_channels"] = 16
    return made


def _flux():
    import comfy.ldm.flux.model
    import comfy.supported_models

    config = dict(
        image_model="flux",
        in_channels=16,
        out_channels=16,
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=64,
        mlp_ratio=2.0,
        num_heads=4,
        depth=2,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
    )
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    return comfy.supported_models.Flux(config)


FAMILIES = {
    "SD1": Tiny(_sd1, (4, 8, 8), (77, 48)),
    "SDXL": Tiny(_sdxl, (4, 8, 8), (77, 48), 1280),
    "Flux": Tiny(_flux, (16, 8, 8), (7, 48), 32),
}


def patcher(name: str, dtype=None, seed: int = 0):
    """A MODEL of a family with random weights of a size that makes every layer matter."""
    import comfy.model_management
    import comfy.model_patcher
    import torch

    dtype = dtype or torch.float32
    config = FAMILIES[name].build()
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device="cpu")
    randomise(model.diffusion_model, seed)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def randomise(module, seed: int) -> None:
    """Fills a module with random weights; norms near one."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.12 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=source) * spread)
            if parameter.dim() == 1 and "norm" in name and name.endswith(("weight", "scale")):
                parameter.add_(1.0)


def conditioning(name: str, seed: int = 0):
    """A random Conditioning as that family's text encoder would give it."""
    import torch
    from graft_pack.trainers.protocols import Conditioning

    tiny = FAMILIES[name]
    source = torch.Generator().manual_seed(seed)
    tensors = {"cross_attn": torch.randn(1, *tiny.context, generator=source)}
    if tiny.pooled:
        tensors["pooled_output"] = torch.randn(1, tiny.pooled, generator=source)
    return Conditioning(tensors, (640 + seed, 480), (seed, 0), (512, 512))


class SmallVae:
    """What the denoiser asks of a VAE when no picture is coded."""

    def spacial_compression_encode(self) -> int:
        return 8
