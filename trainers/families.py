"""Facts about each model family that the model itself does not hold: defaults and names of attention layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerSplit:
    """Layer of a diffusers model that corresponds to some rows of a checkpoint's layer.

    Attributes:
        name: path of the layer in the diffusers model.
        rows: takes the checkpoint layer's tensor [out, ...] and returns the rows of the diffusers layer,
            [part of out, ...], in the order that diffusers uses.
    """

    name: str
    rows: Callable[[torch.Tensor], torch.Tensor]


# Choices of `targets` that only some families have.
SINGLE, DOUBLE, NO_CONTEXT = "single blocks", "double blocks", "no context blocks"
CONTENT, STYLE = "content", "style"
TARGET_PRESETS = (SINGLE, DOUBLE, NO_CONTEXT, CONTENT, STYLE)

SplitsOf = Callable[[str], tuple[LayerSplit, ...]]


@dataclass(frozen=True)
class Family:
    """Defaults of a model family.

    Attributes:
        name: name in reports and metadata.
        resolution: side of the square that the model was trained at, in pixels.
        lora_learning_rate: default for adapters with alpha = rank.
        full_learning_rate: default for full training.
        attention: patterns for attention projections; a module path must contain a match of one. Empty: every Linear.
        feed_forward: patterns for the projections of feed-forward layers, matched in the same way.
        among: patterns for all modules that may be trained, matched in the same way. Empty: every module.
        diffusers_names: True if its LoRA files use diffusers' module names (SD1, SD2), False if they use the model's.
        preview_cfg, preview_scheduler: defaults for sample pictures.
        presets: regular expressions for the attention and feed-forward layers of TARGET_PRESETS, by preset.
        frame_rate: frames per second of its clips.
        adds_in_place: True if the network changes activations in place that autograd has saved.
    """

    name: str
    resolution: int = 1024
    lora_learning_rate: float = 1e-4
    full_learning_rate: float = 1e-6
    attention: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = (r"\.ff\.net\.(0\.proj|2)$", r"mlp\.(0|2|fc1|fc2)$")
    among: tuple[str, ...] = ()
    diffusers_names: bool = False
    preview_cfg: float = 7.0
    preview_scheduler: str = "normal"
    presets: Mapping[str, str] = field(default_factory=dict)
    frame_rate: int = 24
    adds_in_place: bool = True


GENERAL = Family("general")

# CLIP text transformers. Common adapter files have names for their layers only.
TEXT_ENCODER = Family(
    "text encoder",
    attention=(r"\.self_attn\.(q|k|v|out)_proj$",),
    feed_forward=(r"\.mlp\.fc[12]$",),
    among=(r"\.encoder\.layers\.",),
)


def _unet(name: str, resolution: int, **more) -> Family:
    return Family(name, resolution, attention=(r"\.attn[12]\.to_(q|k|v|out\.0)$",), adds_in_place=False, **more)


def _transformer(name: str, attention: tuple[str, ...], feed_forward: tuple[str, ...], **more) -> Family:
    return Family(name, attention=attention, feed_forward=feed_forward, **{"preview_scheduler": "simple", **more})


FAMILIES = {
    family.name: family
    for family in (
        _unet("SD1", 512, full_learning_rate=5e-6, diffusers_names=True),
        _unet("SD2", 512, full_learning_rate=5e-6, diffusers_names=True),
        _unet("SD2 v", 768, full_learning_rate=5e-6, diffusers_names=True),
        # B-LoRA (Frenkel et al. 2024): attention of up_blocks.0.attentions.0 and .1, by diffusers' names.
        _unet(
            "SDXL",
            1024,
            presets={CONTENT: r"^output_blocks\.0\.1\..*\.attn", STYLE: r"^output_blocks\.1\.1\..*\.attn"},
        ),
        _unet("SDXL refiner", 1024),
        *(
            Family(
                name,
                1024,
                full_learning_rate=5e-6,
                # The two linear layers of a single-stream block also contain its feed-forward layers.
                attention=(r"_attn\.(qkv|proj)$", r"single_blocks\.\d+\.linear[12]$"),
                feed_forward=(r"_mlp\.[02]$",),
                presets={
                    SINGLE: r"^single_blocks\.",
                    DOUBLE: r"^double_blocks\.",
                    NO_CONTEXT: r"^(single_blocks\.|double_blocks\.\d+\.img_)",
                },
                preview_cfg=cfg,
                preview_scheduler="simple",
            )
            # Flux is distilled to sample without an unconditional pass; Chroma needs one.
            for name, cfg in (("Flux", 1.0), ("Flux 2", 1.0), ("Chroma", 4.0))
        ),
        _transformer(
            "SD3",
            (r"\.attn2?\.(qkv|proj)$",),
            (r"_block\.mlp\.fc[12]$",),
            presets={NO_CONTEXT: r"\.x_block\."},
            preview_cfg=4.5,
            full_learning_rate=5e-6,
        ),
        *(
            _transformer(name, (r"\.attention\.(qkv|out)$",), (r"\.feed_forward\.w[123]$",), preview_cfg=cfg)
            for name, cfg in (("Lumina 2", 4.0), ("Z-Image", 1.0))
        ),
        _transformer(
            "Qwen-Image",
            (r"\.attn\.(to_(q|k|v|out\.0|add_out)|add_[qkv]_proj)$",),
            (r"_mlp\.net\.(0\.proj|2)$",),
            presets={NO_CONTEXT: r"\.(attn\.to_(q|k|v|out\.0)|img_mlp\..*)$"},
            resolution=1328,
            preview_cfg=4.0,
        ),
        _transformer(
            "HiDream",
            (r"\.attn1\.to_(q|k|v|out)(_t)?$",),
            (r"\.ff_[it]\.(.*\.)?w[123]$",),
            presets={
                SINGLE: r"^single_stream_blocks\.",
                DOUBLE: r"^double_stream_blocks\.",
                NO_CONTEXT: r"\.(attn1\.to_(q|k|v|out)|ff_i\..*)$",
            },
            preview_cfg=5.0,
        ),
        _transformer(
            "PixArt",
            (r"\.attn\.(qkv|proj)$", r"\.cross_attn\.(q_linear|kv_linear|proj)$"),
            (r"^blocks\..*\.mlp\.fc[12]$",),
            preview_cfg=4.5,
            preview_scheduler="normal",
        ),
        _transformer(
            "HunyuanDiT",
            (r"\.attn1\.(Wqkv|out_proj)$", r"\.attn2\.(q_proj|kv_proj|out_proj)$"),
            (r"^blocks\..*\.mlp\.fc[12]$",),
            preview_cfg=6.0,
            preview_scheduler="normal",
        ),
        _transformer(
            "AuraFlow",
            (r"\.attn\.w[12][qkvo]$",),
            (r"\.mlp[CX]?\.c_(fc1|fc2|proj)$",),
            presets={SINGLE: r"^single_layers\.", DOUBLE: r"^double_layers\."},
            preview_cfg=3.5,
        ),
        # Wan was made for video of 832 x 480 and 1280 x 720. A square of side 640 has about the area of the first.
        _transformer(
            "Wan",
            (r"\.(self|cross)_attn\.([qkvo]|[kv]_img)$",),
            (r"\.ffn\.[02]$",),
            resolution=640,
            preview_cfg=6.0,
            frame_rate=16,
        ),
        *(
            _transformer(
                name,
                # Exclude Anima's own adapter, which converts one text encoder's tokens into another's.
                (r"^blocks\..*\.(self|cross)_attn\.(q_proj|k_proj|v_proj|output_proj)$",),
                (r"^blocks\..*\.mlp\.layer[12]$",),
                preview_cfg=4.0,
            )
            for name in ("Cosmos-Predict2", "Anima")
        ),
        *(
            _transformer(
                name,
                (r"_attn\.(qkv|proj)$", r"single_blocks\.\d+\.linear[12]$"),
                (r"_mlp\.[02]$", r"refiner\.blocks\.\d+\.mlp\.[02]$"),
                presets={SINGLE: r"^single_blocks\.", DOUBLE: r"^double_blocks\."},
                resolution=720,  # the area of 960 x 544
                preview_cfg=cfg,
            )
            # The first is distilled to sample without an unconditional pass.
            for name, cfg in (("HunyuanVideo", 1.0), ("HunyuanVideo 1.5", 6.0))
        ),
        _transformer(
            "LTX-Video",
            (r"\.attn[12]\.to_(q|k|v|out\.0)$",),
            (r"\.ff\.net\.(0\.proj|2)$",),
            # Of LTX-2, exclude the layers of sound, and the connectors, which process the text once.
            among=(r"^(?!.*(audio|_connector|av_ca_))",),
            resolution=640,
            preview_cfg=3.0,
            frame_rate=25,
        ),
        _transformer(
            "Cosmos",
            (r"\.attn\.to_(q\.0|k\.0|v\.0|out\.0)$",),
            (r"\.block\.layer[12]$",),
            resolution=960,  # the area of 1280 x 704
        ),
        _transformer(
            "Mochi",
            (r"\.attn\.(qkv|proj)_[xy]$",),
            (r"\.mlp_[xy]\.w[12]$",),
            resolution=640,
            preview_cfg=4.5,
            adds_in_place=False,  # it keeps views of what it changes
        ),
        _transformer(
            "CogVideoX",
            (r"^blocks\.\d+\.(q|k|v|attn_out)$",),
            (r"^blocks\.\d+\.ff_(proj|out)$",),
            resolution=592,  # the area of 720 x 480
            preview_cfg=6.0,
            preview_scheduler="normal",
            frame_rate=8,
        ),
        _transformer(
            "Kandinsky 5",
            (r"attention\.(to_query|to_key|to_value|out_layer)$",),
            (r"\.feed_forward\.(in|out)_layer$",),
            resolution=640,
            preview_cfg=5.0,
        ),
    )
}


def family_of(name: str) -> Family:
    """Return the family with this name, or GENERAL if it is not in FAMILIES."""
    return FAMILIES.get(name, GENERAL)


def is_trained(path: str, family: Family) -> bool:
    """Report whether the family allows a module to be trained, by its path."""
    return not family.among or any(re.search(pattern, path) for pattern in family.among)


def is_attention(path: str, family: Family) -> bool:
    """Report whether a module is an attention projection of the family, by its path."""
    if not family.attention:
        return True
    return any(re.search(pattern, path) for pattern in family.attention)


def is_feed_forward(path: str, family: Family) -> bool:
    """Report whether a module is a projection in a feed-forward layer of the family, by its path."""
    return any(re.search(pattern, path) for pattern in family.feed_forward)


def is_preset(path: str, family: Family, preset: str) -> bool:
    """Report whether a module is a layer of one of the family's presets, by its path."""
    return bool(re.search(family.presets[preset], path)) and (
        is_attention(path, family) or is_feed_forward(path, family)
    )
