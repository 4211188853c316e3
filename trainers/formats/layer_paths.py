"""Paths of layers from their names in adapter files, and the model family that the paths belong to.

kohya's names replace the dots of a path by underscores. A list of the field's module names restores the dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from .keys import common_name, misfit_of_parts, shape_of
from .published_layers import joint_path

if TYPE_CHECKING:
    from .keys import Layers

# Module names with underscores, of the networks in diffusers, transformers and the original checkpoints.
_WORDS = """
    down_blocks mid_block up_blocks transformer_blocks proj_in proj_out to_q to_k to_v to_out conv_shortcut
    time_emb_proj conv_in conv_out time_embedding add_embedding class_embedding linear_1 linear_2 input_blocks
    middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed label_emb
    double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in
    vector_in guidance_in in_layer out_layer final_layer adaLN_modulation single_transformer_blocks add_q_proj
    add_k_proj add_v_proj to_add_out proj_mlp ff_context norm1_context context_embedder x_embedder
    time_text_embed timestep_embedder text_embedder guidance_embedder norm_out joint_blocks x_block
    context_block t_embedder y_embedder pos_embed self_attn cross_attn k_img v_img patch_embedding
    text_embedding time_projection img_emb condition_embedder time_embedder image_embedder time_proj
    noise_refiner context_refiner feed_forward cap_embedder all_final_layer all_x_embedder text_model q_proj
    k_proj v_proj out_proj final_layer_norm text_projection wi_0 wi_1
"""
_MODULES = frozenset(_WORDS.split())
_MOST_PARTS = 1 + max(word.count("_") for word in _MODULES)
# Component in diffusers' pipelines by the network in `keys`.
_COMPONENTS = {"te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"}


class LayerPath(NamedTuple):
    """Place of a layer.

    Attributes:
        component: name of the network in diffusers' pipelines; empty for the denoiser.
        path: path of the layer in its network, with dots.
    """

    component: str
    path: str


def place_of(name: str) -> LayerPath:
    """Return the place of a layer from its name in an adapter file of any layout."""
    network, flat = common_name(name)
    raw = name[len(name) - len(flat) :] if name.replace(".", "_").endswith(flat) else flat
    return LayerPath(_COMPONENTS.get(network, ""), raw if "." in raw else dotted(raw))


def dotted(flat: str) -> str:
    """Return a path with dots from one with underscores: `down_blocks_0_to_q` gives `down_blocks.0.to_q`."""
    parts = flat.split("_")
    path = []
    while parts:
        size = next(
            (size for size in range(min(_MOST_PARTS, len(parts)), 1, -1) if "_".join(parts[:size]) in _MODULES), 1
        )
        path.append("_".join(parts[:size]))
        parts = parts[size:]
    return ".".join(path)


# A path that only one family has. The first match applies.
_MARKS = (
    ("Flux", re.compile(r"(double_blocks|single_blocks)\.")),
    ("SD3", re.compile(r"joint_blocks\.")),
    ("Qwen-Image", re.compile(r"transformer_blocks\.\d+\.(img|txt)_(mlp|mod)\.")),
    (
        "Z-Image",
        re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|adaLN_modulation)\."),
    ),
    ("Wan", re.compile(r"blocks\.\d+\.((self|cross)_attn\.[qkvo]$|ffn\.|attn[12]\.)")),
    ("SDXL", re.compile(r"(add_embedding|label_emb)\.|.*attentions\.\d+\.transformer_blocks\.[1-9]")),
    ("SDXL", re.compile(r"(input|output)_blocks\.|middle_block\.")),
    ("SD1", re.compile(r"(down|up)_blocks\.|mid_block\.")),
)
# Families of ModelSpec's and sd-scripts' names, where the paths fit several.
_NAMED = (
    ("Flux", "flux-1"),
    ("SD3", "stable-diffusion-3"),
    ("SDXL", "stable-diffusion-xl"),
    ("SD1", "stable-diffusion-v"),
    ("Qwen-Image", "qwen-image"),
)
# Models with layers of the same names, but of other sizes.
_OTHERS = ("flux-2", "flux2", "flux.2", "flux 2", "flux_2", "lumina")
# Fields that name a model or its trainer's module.
_FIELDS = ("modelspec.architecture", "ss_base_model_version", "ss_network_module")
# Blocks of transformers in diffusers. Many families have these.
_PUBLISHED = re.compile(r"((joint\.|joint_)?transformer_blocks|single_transformer_blocks)\.(\d+)\.(.*)")
_ONLY_FLUX = re.compile(r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out|norm\.linear)$")
_ONLY_LUMINA = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.adaLN_modulation\.1")
# Last blocks: HunyuanVideo has more than Flux with the same names, and Qwen-Image more than SD3.
_LAST = {"Flux": {"transformer_blocks": 18, "single_transformer_blocks": 37}, "SD3": {"transformer_blocks": 37}}
# SD3.5 medium has a second attention in its first blocks.
_LAST_SECOND = 12
# Width of the largest SD3. Flux, Qwen-Image and the others with its names have at least 2560.
_WIDEST_SD3 = 2432
# Widths of Lumina 2 and HunyuanDiT, which have names of Z-Image and Wan.
_FOREIGN_WIDTHS = {"Z-Image": 2304, "Wan": 1408}

Shapes = dict[str, tuple[int, ...] | None]


def family_of_layers(layers: Layers, metadata: dict[str, str]) -> str:
    """Return the family whose layers a file holds, empty if it is not certain.

    Args:
        layers: tensors by layer name in any layout and by kohya's key suffix.
        metadata: metadata of the file, for layers that several families have.
    """
    places = {name: place_of(name) for name in layers}
    shapes = {
        place.path: None if misfit_of_parts(layers[name]) else shape_of(layers[name])
        for name, place in places.items()
        if not place.component
    }
    architecture = metadata.get("modelspec.architecture", "").lower()
    if any(name in metadata.get(field, "").lower() for field in _FIELDS for name in _OTHERS):
        return ""
    named = next((family for family, name in _NAMED if name in architecture), "")
    marked = family_of_paths(shapes)
    if marked == "SD1" and (named == "SDXL" or any(place.component == "text_encoder_2" for place in places.values())):
        return "SDXL"
    if marked in ("", "Flux", "SD3") and any(_PUBLISHED.match(path) for path in shapes):
        # Among these models, only trainers of Qwen-Image put kohya's prefix before diffusers' names.
        possible = (
            [named] if any(name.startswith("lora_unet_transformer_blocks") for name in layers) else ["Flux", "SD3"]
        )
        marked = next((family for family in possible if _is_of_transformer(family, shapes, family == named)), "")
        # Its layers have the same names everywhere.
        marked = named if named == "Qwen-Image" else marked
    else:
        marked = marked or named
    return "" if _is_foreign(marked, shapes) else marked


def family_of_paths(paths: Collection[str]) -> str:
    """Return the family that one of the denoiser's paths is a mark of, empty without a mark."""
    return next((family for family, mark in _MARKS if any(mark.match(path) for path in paths)), "")


def _is_of_transformer(family: str, shapes: Shapes, is_named: bool) -> bool:
    """Report whether diffusers' transformer of a family, and no other with the same names, has all layers."""
    if family not in _LAST or not all(joint_path(family, path) for path in shapes):
        return False
    blocks = [match.groups() for path in shapes if (match := _PUBLISHED.match(path))]
    if any(int(number) > _LAST[family].get(kind, -1) for kind, _, number, _ in blocks):
        return False
    if is_named:
        return True
    kinds = {kind for kind, _, _, _ in blocks}
    if family == "Flux":
        return "single_transformer_blocks" in kinds and (len(kinds) > 1 or any(map(_ONLY_FLUX.match, shapes)))
    second = [int(number) for _, _, number, rest in blocks if rest.startswith("attn2.")]
    attention = [shape for path, shape in shapes.items() if ".attn." in path]
    is_narrow = all(shape is not None and shape[1] <= _WIDEST_SD3 for shape in attention)
    return bool(attention) and is_narrow and max(second, default=0) <= _LAST_SECOND


def _is_foreign(family: str, shapes: Shapes) -> bool:
    """Report whether layers have sizes of another model than the family that their names fit."""
    known = [(path, shape[0], shape[1]) for path, shape in shapes.items() if shape is not None and len(shape) > 1]
    if family == "Flux":
        # Flux 2 has a gated feed-forward layer, with three times its inputs instead of four.
        ratios = {"linear1": (9, 1), "img_mlp.0": (6, 1), "txt_mlp.0": (6, 1), "linear2": (1, 4)}
        return any(
            path.endswith(f".{end}") and rows * inner == inputs * outer
            for path, rows, inputs in known
            for end, (outer, inner) in ratios.items()
        )
    if family == "Z-Image" and any(map(_ONLY_LUMINA.match, shapes)):
        return True
    return any(_FOREIGN_WIDTHS.get(family) in (rows, inputs) for _, rows, inputs in known)
