"""Family and parameterization of a loaded MODEL, read from its own classes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import comfy.utils
from comfy.model_base import BaseModel

from ....trainers.families import GENERAL, Family, LayerSplit, family_of
from ....trainers.memory.transfer import upload
from ....trainers.protocols import HOLE, Geometry

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

    from ....trainers.protocols import Conditioning

_FAMILIES = {
    "SDXLRefiner": "SDXL refiner",
    "SDXL": "SDXL",
    "SD15": "SD1",
    "SD20": "SD2",
    "SD3": "SD3",
    "Flux2": "Flux 2",
    "Flux": "Flux",
    "Chroma": "Chroma",
    "ZImage": "Z-Image",
    "Lumina2": "Lumina 2",
    "QwenImage": "Qwen-Image",
    "HiDream": "HiDream",
    "PixArtAlpha": "PixArt",
    "HunyuanDiT": "HunyuanDiT",
    "AuraFlow": "AuraFlow",
    "WAN21_T2V": "Wan",
    "CosmosT2IPredict2": "Cosmos-Predict2",
    "Anima": "Anima",
    # Subclasses that were trained without a description before their base class had one.
    "HunyuanImage21": GENERAL.name,
    "HunyuanImage21Refiner": GENERAL.name,
    "Kandinsky5Image": GENERAL.name,
    "HunyuanVideo15": "HunyuanVideo 1.5",
    "HunyuanVideo15_SR_Distilled": GENERAL.name,
    "HunyuanVideo": "HunyuanVideo",
    "LTXV": "LTX-Video",
    "CosmosT2V": "Cosmos",
    "GenmoMochi": "Mochi",
    "CogVideoX_T2V": "CogVideoX",
    "Kandinsky5": "Kandinsky 5",
}

CONCAT = "concat"
REFERENCE = "reference"

# Models whose class tells the network that the image tokens come after the text.
_IMAGE_AFTER_TEXT = {"LongCatImage"}

# ComfyUI's maps of diffusers' names, for families whose layers diffusers splits otherwise in LoRA files.
_DIFFUSERS_MAPS = {"SD3": "mmdit_to_diffusers", "Flux": "flux_to_diffusers"}

# Words in the class or module names of the pack that loads this format, ComfyUI-nunchaku. Its layers have no backward.
_FORMATS = {"nunchaku": "Nunchaku", "svdq": "Nunchaku"}

# Classes that draw video, and their subclasses that draw pictures.
_VIDEO = (
    *("WAN21_T2V", "HunyuanVideo", "LTXV", "CosmosT2V", "CosmosI2VPredict2", "GenmoMochi", "CogVideoX_T2V"),
    "Kandinsky5",
)
_STILLS = ("HunyuanImage21", "HunyuanImage21Refiner", "Kandinsky5Image")

# By channels of the input: latents alone, or with a mask and a picture beside them.
_BOUNDARIES = {16: 875, 36: 900}
_EXPERT = re.compile(r"(high|low)[ _-]?noise", re.IGNORECASE)

# Keys are names of the class that defines noising, network input and output. LCM's network predicts the noise.
_OBJECTIVE = ("noise_scaling", "calculate_input", "calculate_denoised")
_PARAMETERIZATIONS = {
    "EPS": "eps",
    "V_PREDICTION": "v",
    "EDM": "edm",
    "X0": "x0",
    "CONST": "flow",
    "COSMOS_RFLOW": "flow",
    "LCM": "eps",
    "V_PREDICTION_DDPM": "v",
}


def family_name(model: ModelPatcher) -> str:
    """Return the name of the family in `trainers.families`, or "general" for a model without a description."""
    for kind in type(model.model.model_config).__mro__:
        if kind.__name__ in _FAMILIES:
            name = _FAMILIES[kind.__name__]
            return "SD2 v" if name == "SD2" and parameterization_name(model) == "v" else name
    return "general"


def parameterization_name(model: ModelPatcher) -> str:
    """Return the name in `trainers.objective`, or the name of an unknown class, which is refused there."""
    name = _objective_name(model)
    return _PARAMETERIZATIONS.get(name, name)


def _objective_name(model: ModelPatcher) -> str:
    """Return the name of the class that defines the model's noising, network input and output."""
    sampling = model.get_model_object("model_sampling")
    for kind in type(sampling).__mro__:
        if any(name in vars(kind) for name in _OBJECTIVE):
            return kind.__name__
    return type(sampling).__name__


def preserves_variance(model: ModelPatcher) -> bool:
    """Report whether the network and ComfyUI's formula for x0 expect x_t / sqrt(sigma^2 + 1), as CogVideoX does.

    ComfyUI's own sampler for such models, of the VOID nodes, never scales the noise.
    """
    return _objective_name(model) == "V_PREDICTION_DDPM"


def diffusers_splits(model: ModelPatcher) -> dict[str, tuple[LayerSplit, ...]]:
    """Return diffusers' layers for a transformer's weights, by the weight's name in the checkpoint."""
    known = _DIFFUSERS_MAPS.get(family_name(model))
    if known is None:
        return {}
    splits: dict[str, list[LayerSplit]] = {}
    for diffusers_name, entry in getattr(comfy.utils, known)(model.model.model_config.unet_config).items():
        if not diffusers_name.endswith(".weight"):
            continue
        name, rows = (entry, None) if isinstance(entry, str) else entry[:2]
        # Newer ComfyUI maps hold other models' names for the same weight; the family's own names come first.
        if rows is not None or name not in splits:
            rows_of = functools.partial(_rows_of, entry)
            splits.setdefault(name, []).append(LayerSplit(diffusers_name.removesuffix(".weight"), rows_of))
    return {name: tuple(layers) for name, layers in splits.items()}


def _rows_of(entry: str | tuple, values: torch.Tensor) -> torch.Tensor:
    """Return the rows of a weight that an entry of ComfyUI's map refers to: all, a range, or all reordered."""
    if isinstance(entry, str):
        return values
    if entry[1] is not None:
        values = values.narrow(*entry[1])
    return entry[2](values) if len(entry) > 2 else values


def image_conditioning(model: ModelPatcher) -> str:
    """Return the model's image conditioning: HOLE, CONCAT, REFERENCE, or empty for none.

    HOLE is a mask and the image around it. CONCAT is a source image in extra input channels. REFERENCE is a source
    image in extra tokens. The result is read from ComfyUI's own class, as far as the class declares its inputs.
    """
    base = model.model
    kinds = {kind.__name__ for kind in type(base).__mro__}
    config = base.model_config.unet_config
    if "mask" in getattr(base, "concat_keys", ()):
        return HOLE
    if "Flux" in kinds and config.get("in_channels", 0) > config.get("out_channels", 0) > 0:
        # The rule of Flux's concat_cond: an image, or an image and 64 mask channels.
        return HOLE if config["in_channels"] > 2 * config["out_channels"] else CONCAT
    if "IP2P" in kinds:
        return CONCAT
    network = type(base.diffusion_model)
    requests_reference = _mentions(type(base), "extra_conds", "reference_latents")
    accepts_reference = any(_mentions(network, name, "ref_latents") for name in ("forward", "_forward"))
    # Lumina 2 has Z-Image's class, but not the padding tokens with which that class joins pictures.
    accepts_reference &= getattr(base.diffusion_model, "pad_tokens_multiple", 1) is not None
    return REFERENCE if requests_reference and accepts_reference else ""


def _mentions(kind: type, method: str, name: str) -> bool:
    """Report whether a class's method, or a base's, has a word as a constant or a variable name."""
    codes = [vars(base)[method].__code__ for base in kind.__mro__ if hasattr(vars(base).get(method), "__code__")]
    return any(name in code.co_consts or name in code.co_varnames for code in codes)


def image_conditioning_values(kind: str, conditioning: Conditioning, device: torch.device | None = None) -> dict:
    """Return a sample's image conditioning, under the names that ComfyUI's own nodes use.

    Args:
        kind: result of `image_conditioning`.
        device: target device; None to leave the tensors where they are.
    """
    values = {}
    if kind == HOLE and conditioning.inpaint_mask is not None:
        values = {
            "concat_mask": conditioning.inpaint_mask.float(),
            "concat_latent_image": conditioning.masked_image_latent,
        }
    elif kind == CONCAT and conditioning.sources:
        values = {"concat_latent_image": conditioning.sources[0]}
    elif kind == REFERENCE and conditioning.sources:
        values = {"reference_latents": list(conditioning.sources)}
    if device is None:
        return values
    return {
        name: [upload(latent, device) for latent in value] if isinstance(value, list) else upload(value, device)
        for name, value in values.items()
    }


def is_reproduced(base) -> bool:
    """Report whether training reproduces all that ComfyUI's class does around the network."""
    return type(base)._apply_model is BaseModel._apply_model or type(base).__name__ in _IMAGE_AFTER_TEXT


def token_positions(base, context: torch.Tensor | None) -> dict[str, dict[str, float]]:
    """Return position options for networks that number image tokens from the end of the text.

    The values are those of `LongCatImage._apply_model`, which keeps options that the MODEL already sets.

    Args:
        context: [B, tokens, width].
    """
    if type(base).__name__ not in _IMAGE_AFTER_TEXT:
        return {}
    length = 512.0 if context is None else float(context.shape[1])
    return {"rope_options": {"shift_t": 1.0, "shift_y": length, "shift_x": length}}


def guidance(model: ModelPatcher) -> dict[str, float]:
    """Return the guidance conditioning for training, which guidance-distilled networks read.

    1 means no guidance: training learns the pictures, not pictures drawn with guidance. Chroma reads a guidance value
    too, but was trained with ComfyUI's default, so it gets none here.
    """
    unguided = any(kind.__name__ == "Chroma" for kind in type(model.model).__mro__)
    return {} if unguided else {"guidance": 1.0}


def few_step_evidence(model: ModelPatcher) -> str:
    """Return the evidence that a model was distilled to draw in a few steps, or an empty string.

    SDXL Turbo, SDXL Lightning and Z-Image-Turbo look like the models they were made from, so they are not recognized.
    """
    if type(model.model.model_config).__name__ == "FluxSchnell":
        return "a Flux schnell"
    if any(kind.__name__ == "LCM" for kind in type(model.get_model_object("model_sampling")).__mro__):
        return "sampled as a latent consistency model"
    if model.model.model_config.unet_config.get("meanflow"):
        return "a mean-flow model"
    return ""


def takes_clips(model: ModelPatcher) -> bool:
    """Report whether the model was made for latents with several frames."""
    kinds = [kind.__name__ for kind in type(model.model.model_config).__mro__]
    return next((name in _VIDEO for name in kinds if name in (*_VIDEO, *_STILLS)), False)


def takes_first_frame(model: ModelPatcher) -> bool:
    """Report whether ComfyUI's class keeps a first frame without noise, and its network is told which frame it is."""
    base = model.model
    is_told = _mentions(type(base), "process_timestep", "denoise_mask")
    return takes_clips(model) and (is_told or getattr(base, "concat_keys", ()) == ("mask_inverted",))


def expert_range(model: ModelPatcher, texts: Iterable[str]) -> tuple[int, int] | None:
    """Return the bounds of t * 1000 for which an expert of Wan 2.2 14B was made; None for other models.

    Both experts have the same layers, so the loader's file name tells which one it is. The boundary is that of Wan's
    own configurations: 0.875 for text to video, 0.9 for image to video.
    """
    config = model.model.model_config
    boundary = _BOUNDARIES.get(config.unet_config.get("in_dim"))
    if type(config).__name__ not in ("WAN21_T2V", "WAN21_I2V") or boundary is None:
        return None
    experts = {match.group(1).lower() for match in map(_EXPERT.search, texts) if match}
    if len(experts) != 1:
        return None
    return (boundary, 1000) if experts == {"high"} else (0, boundary)


def hidden_format(model: ModelPatcher) -> str:
    """Return the format whose loader stores weights in its own form, judged by class names; empty for none."""
    parts = {type(model), *(type(part) for part in model.model.diffusion_model.modules())}
    names = " ".join(f"{kind.__module__}.{kind.__qualname__}" for part in parts for kind in part.__mro__).lower()
    return next((name for word, name in _FORMATS.items() if word in names), "")


def geometry(model: ModelPatcher, factor: int, resolution: int) -> Geometry:
    """Return the geometry of a model's crops.

    Args:
        factor: pixels per side of one latent position.
        resolution: requested resolution, 0 for the model's own.
    """
    return Geometry(resolution or family_of(family_name(model)).resolution, factor * latent_step(model))


def latent_step(model: ModelPatcher) -> int:
    """Return the multiple that a latent's width and height must have, from the down-samplings or the patch size."""
    config = model.model.model_config.unet_config
    if "channel_mult" in config:
        return 2 ** (len(config["channel_mult"]) - 1)
    patch = getattr(model.model.diffusion_model, "patch_size", 2)
    if isinstance(patch, (tuple, list)):
        patch = patch[-1]
    return int(patch)


def drawing(family: Family, cfg: float, sampler_name: str, scheduler: str) -> tuple[float, str, str]:
    """Return a node's (cfg, sampler, scheduler), with the family's values for unset ones (0, "auto")."""
    return (
        cfg or family.preview_cfg,
        "euler" if sampler_name == "auto" else sampler_name,
        family.preview_scheduler if scheduler == "auto" else scheduler,
    )
