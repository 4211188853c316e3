"""ComfyUI's networks in their published sizes without weights, and their inputs. Use them under `fake_tensors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

_UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True}
_TOKENS = 77
_LONG = 512
MIDDLING = "SD1 middling"


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Give tensors shapes and dtypes, but no numbers, within the block."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def apply(module, function, recurse=True):
        # `Module.to` replaces parameters, which fake ones do not allow.
        return module

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch("torch.nn.Module._apply", apply):
        yield


def network(name: str, dtype: torch.dtype, stored: torch.dtype | None = None) -> torch.nn.Module:
    """Build a network, frozen.

    Args:
        dtype: dtype that it computes in.
        stored: dtype of its weights if it is another one; ComfyUI's layers cast them at each use.
    """
    import comfy.ops

    operations = comfy.ops.disable_weight_init if stored is None else comfy.ops.manual_cast
    options = {"device": "cpu", "dtype": stored or dtype, "operations": operations}
    module = _BUILDERS[name](options)
    for layer in module.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = stored is not None
    return module.requires_grad_(False)


def _sd1(options: dict[str, Any]) -> torch.nn.Module:
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**comfy.supported_models.SD15.unet_config, **_UNET, "legacy": False, "num_heads": 8}
    config |= {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1] * 6 + [0, 0]}
    config |= {"transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1}
    return UNetModel(**config, **options)


def _sdxl(options: dict[str, Any]) -> torch.nn.Module:
    import comfy.supported_models
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**comfy.supported_models.SDXL.unet_config, **_UNET, "legacy": False, "num_head_channels": 64}
    config |= {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_classes": "sequential"}
    config |= {"transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]}
    return UNetModel(**config, **options)


def _sd35_large(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * 38}}
    sizes = {"input_size": None, "in_channels": 16, "depth": 38, "adm_in_channels": 2048, "qk_norm": "rms"}
    sizes |= {"context_embedder_config": embedder, "pos_embed_max_size": 192, "num_patches": 192**2}
    return OpenAISignatureMMDITWrapper(**sizes, **options)


def _flux(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.flux.model import Flux, FluxParams

    sizes = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072}
    sizes |= {"mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56]}
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        # Newer versions of ComfyUI ask for it.
        sizes["txt_ids_dims"] = []
    return Flux(**sizes, theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, **options)


def _z_image(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    sizes = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560}
    sizes |= {"axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0, "time_scale": 1000.0}
    return NextDiT(**sizes, ffn_dim_multiplier=8 / 3, qk_norm=True, z_image_modulation=True, **options)


def _qwen_image(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(**options)


def _wan(name: str, dim: int, feed_forward: int, options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.wan.model import WanModel

    sizes = {"dim": dim, "ffn_dim": feed_forward, "num_heads": dim // 128, "num_layers": BLOCKS[name]}
    return WanModel(model_type="t2v", in_dim=16, out_dim=16, text_dim=4096, **sizes, **options)


def _middling(options: dict[str, Any]) -> torch.nn.Module:
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    from tests.support import models

    return UNetModel(**models.SIZES[MIDDLING].build().unet_config, **options)


_BUILDERS = {
    MIDDLING: _middling,
    "SD1": _sd1,
    "SDXL": _sdxl,
    "SD3": _sd35_large,
    "Flux": _flux,
    "Lumina 2": _z_image,
    "Qwen-Image": _qwen_image,
    "Wan 1.3B": partial(_wan, "Wan 1.3B", 1536, 8960),
    "Wan 14B": partial(_wan, "Wan 14B", 5120, 13824),
}
NAMES = ("SD1", "SDXL", "SD3", "Flux", "Lumina 2", "Qwen-Image")
# Networks of clips of 832 x 480 pixels.
BLOCKS = {"Wan 1.3B": 30, "Wan 14B": 40}
CLIPS = tuple(BLOCKS)
LABELS = {"SD1": "SD1.5", "SD3": "SD3.5 large", "Lumina 2": "Z-Image", **{name: f"Wan 2.1{name[3:]}" for name in CLIPS}}


def family_name(name: str) -> str:
    """Return the name in `trainers.families` of a network's family."""
    return {MIDDLING: "SD1", **dict.fromkeys(CLIPS, "Wan")}.get(name, name)


def inputs(name: str, side: int, dtype: torch.dtype, batch: int = 1) -> tuple[tuple, dict[str, Any]]:
    """Return the positional and keyword inputs of a network for pictures of `side` pixels or clips of `side` frames."""

    def of(*shape: int) -> torch.Tensor:
        return torch.empty(batch, *shape, dtype=dtype)

    latent = side // 8
    timestep = torch.empty(batch)
    if name in (MIDDLING, "SD1", "SDXL"):
        context = {MIDDLING: 512, "SD1": 768, "SDXL": 2048}[name]
        keywords = {"context": of(_TOKENS, context)} | ({"y": of(2816)} if name == "SDXL" else {})
        return (of(4, latent, latent), timestep), keywords
    if name in CLIPS:
        return (of(16, (side + 3) // 4, 60, 104), timestep), {"context": of(_LONG, 4096)}
    x = of(16, latent, latent)
    if name == "SD3":
        return (x, timestep), {"context": of(154, 4096), "y": of(2048)}
    if name == "Flux":
        return (x, timestep), {"context": of(_LONG, 4096), "y": of(768), "guidance": of()}
    if name == "Lumina 2":
        return (x, timestep), {"context": of(_LONG, 2560), "num_tokens": _LONG}
    return (x.unsqueeze(2), timestep), {"context": of(_LONG, 3584)}


def adapt(module: torch.nn.Module, name: str, targets: str, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Put a LoRA on a network as a training does, shared inputs grouped. Return its trainables.

    Args:
        dtype: dtype of the network's inputs.
    """
    from graft_pack.nodes.host.model.placement import mark_plain
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.lowrank.layers import grouping
    from graft_pack.trainers.methods import METHODS

    from tests.support import models

    family = family_name(name)
    recipe = models.recipe(family, rank=rank, alpha=float(rank), targets=targets)
    mark_plain(module)
    paths = METHODS["LoRA"].targets(module, family_of(family), recipe)
    trainables = METHODS["LoRA"].inject(module, paths, recipe)
    args, keywords = inputs(name, 1 if name in CLIPS else 256, dtype)
    with grouping([module]), torch.no_grad():
        module(*args, **keywords, transformer_options={})
    return trainables
