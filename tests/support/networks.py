"""Small versions of the host's own networks: configs of its `supported_models` classes, and inputs for them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiny:
    """A small version of a model family.

    Attributes:
        build: returns the host's model_config with a small unet_config.
        latent: [C, h, w] of a sample, or [C, frames, h, w].
        context: (tokens, width) of its text conditioning.
        pooled: width of its pooled conditioning, 0 for none.
        more: further values of its conditioning, by the host's name, drawn from a generator.
        shrink: shrinks parts that the host builds at one size only, before the network has weights.
        norms: typical value of norm weights; 0 if the network adds the one itself.
    """

    build: Callable
    latent: tuple[int, ...]
    context: tuple[int, int]
    pooled: int = 0
    more: Callable | None = None
    shrink: Callable | None = None
    norms: float = 1.0


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


def _host_class(name: str, **config):
    """Return a config of the host's class of that name; given values take precedence over the class's."""
    import comfy.supported_models

    made = getattr(comfy.supported_models, name)(config)
    made.unet_config.update(config)
    return made


def _of(name: str, **config) -> Callable:
    """Return a function that builds the config of a host's class."""
    return functools.partial(_host_class, name, **config)


_SD1 = _unet(
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
_SD2 = {**_SD1, "use_linear_in_transformer": True, "num_head_channels": 16}
_UNCLIP = {**_SD2, "num_classes": "sequential", "adm_in_channels": 64}


def _sdxl(pooled: int = 1280, sizes: int = 6, **more) -> dict:
    # The host makes the conditioning from the pooled text and so many sizes of 256 each.
    return _unet(
        model_channels=32,
        num_res_blocks=[1, 1],
        channel_mult=[1, 2],
        context_dim=48,
        transformer_depth=[0, 1],
        transformer_depth_output=[0, 0, 1, 1],
        transformer_depth_middle=1,
        use_linear_in_transformer=True,
        num_classes="sequential",
        num_heads=-1,
        num_head_channels=16,
        adm_in_channels=pooled + sizes * 256,
        **more,
    )


_STREAMS = dict(
    in_channels=16,
    out_channels=16,
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
)


def _by_params(name: str, params: str, **config) -> Callable:
    """Return a builder like `_of` for a network with a dataclass of parameters; skip fields an older host lacks."""
    return functools.partial(_build_by_params, name, params, config)


def _build_by_params(name: str, params: str, config: dict):
    module, _, kind = params.rpartition(".")
    known = getattr(importlib.import_module(f"comfy.ldm.{module}"), kind).__dataclass_fields__
    return _host_class(name, **{key: value for key, value in config.items() if key in known or key == "image_model"})


_FLUX_PARAMS = "flux.model.FluxParams"
_FLUX = {**_STREAMS, "image_model": "flux", "vec_in_dim": 32, "guidance_embed": True, "txt_ids_dims": []}

_SD3 = dict(
    input_size=None,
    patch_size=2,
    in_channels=16,
    depth=2,
    pos_embed_max_size=16,
    num_patches=256,
    adm_in_channels=32,
    context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 128}},
    qkv_bias=True,
    pos_embed_scaling_factor=None,
    qk_norm="rms",
)
_LUMINA2 = dict(
    image_model="lumina2",
    patch_size=2,
    in_channels=16,
    dim=96,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    n_kv_heads=4,
    axes_dims=[8, 8, 8],
    axes_lens=[300, 64, 64],
    multiple_of=32,
    norm_eps=1e-5,
    cap_feat_dim=48,
    qk_norm=True,
)
# Its modulation is 256 wide at any size.
_Z_IMAGE = {
    **_LUMINA2,
    "dim": 256,
    "axes_dims": [16, 24, 24],
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 8,
}
_AURA = dict(
    in_channels=4,
    out_channels=4,
    patch_size=2,
    dim=64,
    n_layers=2,
    n_double_layers=1,
    n_heads=4,
    global_conddim=64,
    cond_seq_dim=48,
    max_seq=64,
)
_SD1_MIDDLING = _unet(
    model_channels=160,
    num_res_blocks=[1, 1, 1],
    channel_mult=[1, 2, 2],
    context_dim=512,
    transformer_depth=[1, 1, 1],
    transformer_depth_output=[1, 1, 1, 1, 1, 1],
    transformer_depth_middle=1,
    use_linear_in_transformer=False,
    adm_in_channels=None,
)
_CASCADE_C = dict(
    stable_cascade_stage="c",
    c_r=64,
    c_cond=64,
    c_hidden=[64, 64],
    nhead=[2, 2],
    blocks=[[1, 1], [1, 1]],
    c_clip_text=48,
    c_clip_text_pooled=32,
)
_PIXART = dict(
    input_size=None,
    patch_size=2,
    in_channels=4,
    hidden_size=72,
    depth=2,
    num_heads=4,
    caption_channels=48,
    model_max_length=16,
    pe_interpolation=1,
)
_HUNYUAN_DIT = dict(
    input_size=None,
    hidden_size=64,
    depth=2,
    num_heads=4,
    text_states_dim=48,
    text_states_dim_t5=64,
    text_len=7,
    text_len_t5=9,
    attn_precision=None,
)
_HUNYUAN_PARAMS = "hunyuan_video.model.HunyuanVideoParams"
_HUNYUAN_IMAGE = dict(
    image_model="hunyuan_video",
    in_channels=64,
    out_channels=64,
    vec_in_dim=None,
    context_in_dim=48,
    hidden_size=64,
    mlp_ratio=2.0,
    num_heads=4,
    depth=2,
    depth_single_blocks=2,
    axes_dim=[8, 8],
    theta=256,
    patch_size=[1, 1],
    qkv_bias=True,
    guidance_embed=False,
    byt5=False,
    meanflow=False,
    meanflow_sum=False,
    use_cond_type_embedding=False,
    vision_in_dim=None,
)
_COSMOS = dict(
    image_model="cosmos_predict2",
    max_img_h=32,
    max_img_w=32,
    max_frames=8,
    in_channels=16,
    out_channels=16,
    patch_spatial=2,
    patch_temporal=1,
    model_channels=64,
    num_blocks=2,
    num_heads=2,
    mlp_ratio=2.0,
    crossattn_emb_channels=48,
    pos_emb_cls="rope3d",
    pos_emb_learnable=True,
    use_adaln_lora=True,
    adaln_lora_dim=16,
    rope_enable_fps_modulation=False,
)
_WAN = dict(
    image_model="wan2.1",
    model_type="t2v",
    patch_size=(1, 2, 2),
    text_len=16,
    in_dim=16,
    dim=96,
    ffn_dim=128,
    freq_dim=32,
    text_dim=48,
    out_dim=16,
    num_heads=4,
    num_layers=2,
)
_HIDREAM = dict(
    image_model="hidream",
    patch_size=2,
    in_channels=16,
    out_channels=16,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=32,
    num_attention_heads=2,
    caption_channels=[48, 48],
    text_emb_dim=32,
    num_routed_experts=2,
    num_activated_experts=1,
    axes_dims_rope=(8, 12, 12),
    max_resolution=(16, 16),
    llama_layers=[0, 1],
)
_CHROMA = {
    **_STREAMS,
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "hidden_dim": 64,
    "out_dim": 64,
    "n_layers": 2,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
_RADIANCE = {
    **_CHROMA,
    "image_model": "chroma_radiance",
    "in_channels": 3,
    "out_channels": 3,
    "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2,
    "nerf_depth": 1,
    "nerf_max_freqs": 4,
    "nerf_tile_size": 0,
    "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": None,
    "use_x0": False,
    "use_sequential_txt_ids": False,
}
_OMNIGEN2 = dict(
    image_model="omnigen2",
    in_channels=16,
    hidden_size=96,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=4,
    num_kv_heads=2,
    multiple_of=32,
    axes_dim_rope=(8, 8, 8),
    axes_lens=(64, 64, 64),
    text_feat_dim=48,
    timestep_scale=1000.0,
)
_QWEN = dict(
    image_model="qwen_image",
    in_channels=64,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    joint_attention_dim=48,
    axes_dims_rope=(8, 12, 12),
)
_FLUX2 = {
    **_FLUX,
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "patch_size": 1,
    "axes_dim": [4, 4, 4, 4],
    "vec_in_dim": None,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
    "txt_ids_dims": [3],
}

_LENS = dict(
    image_model="lens",
    in_channels=128,
    out_channels=32,
    num_layers=2,
    attention_head_dim=32,
    num_attention_heads=2,
    enc_hidden_dim=24,
    axes_dims_rope=(8, 12, 12),
    selected_layer_index=(0, 1),
)
_Z_IMAGE_PIXEL = {
    **_Z_IMAGE,
    "image_model": "zimage_pixel",
    "in_channels": 3,
    "patch_size": 4,
    "decoder_hidden_size": 32,
    "decoder_num_res_blocks": 1,
}
_PIXEL_DIT = dict(
    image_model="pixeldit_t2i",
    num_groups=2,
    hidden_size=64,
    pixel_hidden_size=8,
    pixel_attn_hidden_size=32,
    pixel_num_groups=2,
    patch_depth=2,
    pixel_depth=1,
    patch_size=4,
    txt_embed_dim=48,
    txt_max_length=16,
)
_BOOGU = {
    **{name: value for name, value in _OMNIGEN2.items() if name != "text_feat_dim"},
    "image_model": "boogu",
    "num_double_stream_layers": 1,
    "instruction_feat_dim": 48,
}
_IDEOGRAM4 = dict(
    image_model="ideogram4",
    in_channels=128,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    intermediate_size=64,
    adaln_dim=32,
    llm_features_dim=48,
    mrope_section=(8, 4, 4),
)
_KREA2 = dict(
    image_model="krea2",
    features=64,
    tdim=32,
    txtdim=24,
    heads=2,
    kvheads=2,
    multiplier=2,
    layers=2,
    channels=16,
    txtlayers=2,
    txtheads=2,
    txtkvheads=2,
)
_MAGE_FLOW = {**_QWEN, "image_model": "mage_flow", "in_channels": 128, "out_channels": 128}
_JOY_IMAGE = dict(
    image_model="joyimage",
    in_channels=16,
    hidden_size=64,
    num_attention_heads=2,
    text_dim=48,
    mlp_width_ratio=2.0,
    num_layers=2,
    rope_dim_list=[8, 12, 12],
)
_KANDINSKY5 = dict(
    image_model="kandinsky5",
    in_text_dim=48,
    in_text_dim2=32,
    time_dim=32,
    model_dim=64,
    ff_dim=64,
    visual_embed_dim=64,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(8, 12, 12),
    rope_scale_factor=(1.0, 1.0, 1.0),
)
_ERNIE = dict(
    image_model="ernie",
    hidden_size=64,
    num_attention_heads=2,
    num_layers=2,
    ffn_hidden_size=64,
    in_channels=128,
    out_channels=128,
    text_in_dim=48,
    rope_axes_dim=(8, 12, 12),
)
_HIDREAM_O1 = dict(
    image_model="hidream_o1",
    text_config_overrides=dict(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        rope_dims=[8, 4, 4],
    ),
    vision_config_overrides=dict(hidden_size=32, num_heads=2, intermediate_size=32, depth=1),
)


_HUNYUAN_VIDEO = {
    **_HUNYUAN_IMAGE,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "hidden_size": 64,
    "axes_dim": [4, 6, 6],
    "patch_size": [1, 2, 2],
    "guidance_embed": True,
}
_HUNYUAN_VIDEO_15 = {
    **_HUNYUAN_VIDEO,
    "in_channels": 65,
    "out_channels": 32,
    "vec_in_dim": None,
    "patch_size": [1, 1, 1],
    "guidance_embed": False,
    "use_cond_type_embedding": True,
    "vision_in_dim": 24,
    "meanflow_sum": True,
}
_MOCHI = dict(
    image_model="mochi_preview",
    depth=2,
    patch_size=2,
    num_heads=2,
    hidden_size_x=64,
    hidden_size_y=48,
    mlp_ratio_x=192.0,  # the host allows no other width than 12288
    mlp_ratio_y=2.0,
    learn_sigma=False,
    in_channels=12,
    qk_norm=True,
    qkv_bias=False,
    out_bias=True,
    attn_drop=0.0,
    patch_embed_bias=True,
    posenc_preserve_area=True,
    timestep_mlp_bias=True,
    attend_to_padding=False,
    timestep_scale=1000.0,
    use_t5=True,
    t5_feat_dim=48,
    t5_token_length=7,
    rope_theta=10000.0,
)
_LTXV = dict(
    image_model="ltxv",
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=48,
)
_LTXAV = {
    **_LTXV,
    "image_model": "ltxav",
    "audio_cross_attention_dim": 32,
    "audio_attention_head_dim": 16,
    "audio_num_attention_heads": 2,
    "connector_attention_head_dim": 24,
    "connector_num_attention_heads": 2,
    "connector_num_layers": 1,
}
_COSMOS_VIDEO = {
    **{name: value for name, value in _COSMOS.items() if name not in ("image_model", "rope_enable_fps_modulation")},
    "image_model": "cosmos",
    "concat_padding_mask": True,
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "pos_emb_learnable": False,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_COGVIDEO = dict(
    image_model="cogvideox",
    num_attention_heads=2,
    attention_head_dim=32,
    in_channels=16,
    time_embed_dim=32,
    text_embed_dim=48,
    num_layers=2,
    use_rotary_positional_embeddings=True,
)


def _mask(source) -> dict:
    import torch

    return {"attention_mask": torch.ones(1, 7, dtype=torch.long)}


def _llama(source) -> dict:
    import torch

    return {"conditioning_llama3": torch.randn(1, 2, 7, 48, generator=source)}


def _hunyuan_text(source) -> dict:
    import torch

    second = {
        "conditioning_mt5xl": torch.randn(1, 9, 64, generator=source),
        "attention_mask_mt5xl": torch.ones(1, 9, dtype=torch.long),
    }
    return {**_mask(source), **second}


def _t5_ids(source) -> dict:
    import torch

    return {"t5xxl_ids": torch.randint(0, 64, (9,), generator=source), "t5xxl_weights": torch.ones(9)}


def _written(source) -> dict:
    import torch

    return {"text_input_ids": torch.randint(0, 64, (1, 9), generator=source)}


def _picture(channels: int, frames: int, side: int, vision: int = 0, mask: bool = True) -> Callable:
    """Return `more` of a class that animates a picture: what the host's nodes make of a first frame."""
    return functools.partial(_picture_values, channels, frames, side, vision, mask)


def _picture_values(channels, frames, side, vision, mask, source) -> dict:
    import comfy.clip_vision
    import torch

    values = {"concat_latent_image": torch.randn(1, channels, frames, side, side, generator=source)}
    if mask:
        values["concat_mask"] = torch.ones(1, 1, 3, side, side)
        values["concat_mask"][:, :, :1] = 0.0
    if vision:
        values["clip_vision_output"] = comfy.clip_vision.Output()
        for name in ("penultimate_hidden_states", "last_hidden_state"):
            values["clip_vision_output"][name] = torch.randn(1, 5, vision, generator=source)
    return values


def _small_adapter(network) -> None:
    """Shrink Anima's text adapter, which the host builds at one size."""
    import comfy.ops
    from comfy.ldm.anima.model import LLMAdapter

    sizes = dict(source_dim=48, target_dim=48, model_dim=48, num_layers=1, num_heads=4)
    ops = comfy.ops.disable_weight_init
    network.llm_adapter = LLMAdapter(**sizes, dtype=network.dtype, device="cpu", operations=ops)
    network.llm_adapter.embed = ops.Embedding(64, 48, dtype=network.dtype, device="cpu")


# Small enough for every test.
FAMILIES = {
    "SD1": Tiny(_of("SD15", **_SD1), (4, 8, 8), (77, 48)),
    "SDXL": Tiny(_of("SDXL", **_sdxl()), (4, 8, 8), (77, 48), 1280),
    "Flux": Tiny(_by_params("Flux", _FLUX_PARAMS, **_FLUX), (16, 8, 8), (7, 48), 32),
}
# With the transformers of other families: tested for every trainable architecture.
ARCHITECTURES = {
    **FAMILIES,
    "SD3": Tiny(_of("SD3", **_SD3), (16, 8, 8), (7, 48), 32),
    "Lumina 2": Tiny(_of("Lumina2", **_LUMINA2), (16, 8, 8), (7, 48)),
    "AuraFlow": Tiny(_of("AuraFlow", **_AURA), (4, 8, 8), (7, 48)),
}
# Classes of the host's supported_models that draw pictures from text, including those of newer versions.
CLASSES = {
    "SD15": FAMILIES["SD1"],
    "SD15_instructpix2pix": Tiny(_of("SD15_instructpix2pix", **{**_SD1, "in_channels": 8}), (4, 8, 8), (77, 48)),
    "SD20": Tiny(_of("SD20", **_SD2), (4, 8, 8), (77, 48)),
    "SD21UnclipL": Tiny(_of("SD21UnclipL", **_UNCLIP), (4, 8, 8), (77, 48)),
    "SDXL": FAMILIES["SDXL"],
    "SDXL_instructpix2pix": Tiny(
        _of("SDXL_instructpix2pix", **{**_sdxl(), "in_channels": 8}), (4, 8, 8), (77, 48), 1280
    ),
    "SDXLRefiner": Tiny(_of("SDXLRefiner", **_sdxl(sizes=5)), (4, 8, 8), (77, 48), 1280),
    "Stable_Cascade_C": Tiny(_of("Stable_Cascade_C", **_CASCADE_C), (16, 8, 8), (77, 48), 32),
    "SD3": ARCHITECTURES["SD3"],
    "AuraFlow": ARCHITECTURES["AuraFlow"],
    "PixArtAlpha": Tiny(
        _of("PixArtAlpha", **_PIXART, image_model="pixart_alpha", micro_condition=True), (4, 40, 40), (7, 48)
    ),
    "PixArtSigma": Tiny(
        _of("PixArtSigma", **_PIXART, image_model="pixart_sigma", micro_condition=False), (4, 40, 40), (7, 48)
    ),
    "HunyuanDiT": Tiny(_of("HunyuanDiT", **_HUNYUAN_DIT, image_model="hydit"), (4, 8, 8), (7, 48), more=_hunyuan_text),
    "HunyuanDiT1": Tiny(
        _of("HunyuanDiT1", **_HUNYUAN_DIT, image_model="hydit1", size_cond=True, use_style_cond=True),
        (4, 8, 8),
        (7, 48),
        more=_hunyuan_text,
    ),
    "Flux": FAMILIES["Flux"],
    "FluxInpaint": Tiny(
        _by_params("FluxInpaint", _FLUX_PARAMS, **{**_FLUX, "in_channels": 96}), (16, 8, 8), (7, 48), 32
    ),
    "FluxSchnell": Tiny(
        _by_params("FluxSchnell", _FLUX_PARAMS, **{**_FLUX, "guidance_embed": False}), (16, 8, 8), (7, 48), 32
    ),
    "Flux2": Tiny(_by_params("Flux2", _FLUX_PARAMS, **_FLUX2), (128, 8, 8), (7, 48)),
    "Chroma": Tiny(_by_params("Chroma", "chroma.model.ChromaParams", **_CHROMA), (16, 8, 8), (7, 48)),
    "ChromaRadiance": Tiny(
        _by_params("ChromaRadiance", "chroma_radiance.model.ChromaRadianceParams", **_RADIANCE), (3, 16, 16), (7, 48)
    ),
    "Lumina2": ARCHITECTURES["Lumina 2"],
    "ZImage": Tiny(_of("ZImage", **_Z_IMAGE), (16, 8, 8), (7, 48)),
    "HunyuanImage21": Tiny(_by_params("HunyuanImage21", _HUNYUAN_PARAMS, **_HUNYUAN_IMAGE), (64, 8, 8), (7, 48)),
    "CosmosT2IPredict2": Tiny(_of("CosmosT2IPredict2", **_COSMOS), (16, 1, 8, 8), (7, 48)),
    "WAN21_T2V": Tiny(_of("WAN21_T2V", **_WAN), (16, 3, 8, 8), (7, 48)),
    "WAN22_T2V": Tiny(_of("WAN22_T2V", **{**_WAN, "in_dim": 48, "out_dim": 48}), (48, 3, 8, 8), (7, 48)),
    "HunyuanVideo": Tiny(_by_params("HunyuanVideo", _HUNYUAN_PARAMS, **_HUNYUAN_VIDEO), (16, 3, 8, 8), (7, 48), 32),
    "HunyuanVideo15": Tiny(_by_params("HunyuanVideo15", _HUNYUAN_PARAMS, **_HUNYUAN_VIDEO_15), (32, 3, 4, 4), (7, 48)),
    "GenmoMochi": Tiny(_of("GenmoMochi", **_MOCHI), (12, 3, 8, 8), (7, 48), more=_mask),
    "LTXV": Tiny(_of("LTXV", **_LTXV), (128, 3, 4, 4), (7, 48), more=_mask),
    "LTXAV": Tiny(_of("LTXAV", **_LTXAV), (128, 3, 4, 4), (7, 96)),
    "CosmosT2V": Tiny(_of("CosmosT2V", **_COSMOS_VIDEO), (16, 3, 8, 8), (7, 48), more=_mask),
    "CosmosI2V": Tiny(_of("CosmosI2V", **{**_COSMOS_VIDEO, "in_channels": 17}), (16, 3, 8, 8), (7, 48), more=_mask),
    "CosmosI2VPredict2": Tiny(_of("CosmosI2VPredict2", **{**_COSMOS, "in_channels": 17}), (16, 3, 8, 8), (7, 48)),
    "Kandinsky5": Tiny(_of("Kandinsky5", **{**_KANDINSKY5, "visual_embed_dim": 132}), (16, 3, 8, 8), (7, 48), 32),
    "CogVideoX_T2V": Tiny(_of("CogVideoX_T2V", **_COGVIDEO), (16, 3, 8, 8), (7, 48)),
    "WAN21_I2V": Tiny(
        _of("WAN21_I2V", **{**_WAN, "model_type": "i2v", "in_dim": 36}),
        (16, 3, 8, 8),
        (7, 48),
        more=_picture(16, 3, 8, 1280),
    ),
    "HunyuanVideoI2V": Tiny(
        _by_params("HunyuanVideoI2V", _HUNYUAN_PARAMS, **{**_HUNYUAN_VIDEO, "in_channels": 33}),
        (16, 3, 8, 8),
        (7, 48),
        32,
        more=_picture(16, 1, 8),
    ),
    "HunyuanVideoSkyreelsI2V": Tiny(
        _by_params("HunyuanVideoSkyreelsI2V", _HUNYUAN_PARAMS, **{**_HUNYUAN_VIDEO, "in_channels": 32}),
        (16, 3, 8, 8),
        (7, 48),
        32,
        more=_picture(16, 1, 8, mask=False),
    ),
    "CogVideoX_I2V": Tiny(
        _of("CogVideoX_I2V", **{**_COGVIDEO, "in_channels": 32}), (16, 3, 8, 8), (7, 48), more=_picture(16, 1, 8)
    ),
    "HiDream": Tiny(_of("HiDream", **_HIDREAM), (16, 8, 8), (7, 48), 32, more=_llama),
    "Omnigen2": Tiny(_of("Omnigen2", **_OMNIGEN2), (16, 8, 8), (7, 48), more=_mask),
    "QwenImage": Tiny(_of("QwenImage", **_QWEN), (16, 1, 8, 8), (7, 48)),
    "Lens": Tiny(_of("Lens", **_LENS), (128, 4, 4), (7, 48)),
    "Anima": Tiny(
        _of("Anima", **{**_COSMOS, "image_model": "anima"}), (16, 1, 8, 8), (7, 48), 0, _t5_ids, _small_adapter
    ),
    "ZImagePixelSpace": Tiny(_of("ZImagePixelSpace", **_Z_IMAGE_PIXEL), (3, 16, 16), (7, 48)),
    "HiDreamO1": Tiny(_of("HiDreamO1", **_HIDREAM_O1), (3, 64, 64), (7, 48), more=_written),
    "Boogu": Tiny(_of("Boogu", **_BOOGU), (16, 8, 8), (7, 48), more=_mask),
    "Ideogram4": Tiny(_of("Ideogram4", **_IDEOGRAM4), (128, 4, 4), (7, 48)),
    "Krea2": Tiny(_of("Krea2", **_KREA2), (16, 1, 8, 8), (7, 48), norms=0.0),
    "MageFlow": Tiny(_of("MageFlow", **_MAGE_FLOW), (128, 4, 4), (7, 48)),
    "JoyImage": Tiny(_of("JoyImage", **_JOY_IMAGE), (16, 1, 8, 8), (7, 48)),
    "Kandinsky5Image": Tiny(_of("Kandinsky5Image", **_KANDINSKY5), (16, 1, 8, 8), (7, 48), 32),
    "ErnieImage": Tiny(_of("ErnieImage", **_ERNIE), (128, 4, 4), (7, 48)),
    "LongCatImage": Tiny(
        _by_params("LongCatImage", _FLUX_PARAMS, **{**_FLUX, "vec_in_dim": None, "guidance_embed": False}),
        (16, 8, 8),
        (7, 48),
    ),
}
# Classes that differ from one of them in sizes only.
ALIKE = {
    "SD21UnclipH": "SD21UnclipL",
    "SSD1B": "SDXL",
    "Segmind_Vega": "SDXL",
    "KOALA_700M": "SDXL",
    "KOALA_1B": "SDXL",
}
# Classes that the pack refuses, each with the objective or the reason that the refusal names.
REFUSED = {
    "LotusD": Tiny(_of("LotusD", **{**_UNCLIP, "adm_in_channels": 4}), (4, 8, 8), (77, 48)),
    "PixelDiTT2I": Tiny(_of("PixelDiTT2I", **_PIXEL_DIT), (3, 16, 16), (7, 48)),
}
_VIDEO = "draws video from inputs that no dataset holds"
_AUDIO = "makes sound"
_SHAPES = "makes three-dimensional shapes"
_SEES = "finds things in pictures and draws none"
# All others, with the reason why pictures with captions cannot train them.
LEFT_OUT = {
    "LotusD": "turns a picture into its depth or normals; its objective is refused by name",
    "PixelDiTT2I": "changes parts of its activations in place, so that no gradient can be had; refused by name",
    "Stable_Zero123": "turns a picture by an angle; it takes no text",
    "SD_X4Upscaler": "enlarges a picture",
    "Stable_Cascade_B": "second stage of a cascade: enlarges the latent that the first has drawn",
    "HunyuanImage21Refiner": "refines a picture that another model has drawn",
    "PiD": "decodes and enlarges the latent of another model",
    "SeedVR2": "enlarges video",
    **dict.fromkeys(("SVD_img2vid", "SV3D_u", "SV3D_p", "MiniMaxH3"), _VIDEO),
    "HunyuanVideo15_SR_Distilled": "enlarges video",
    **dict.fromkeys(("WAN21_FunControl2V", "WAN21_Vace", "WAN21_Camera", "WAN22_Camera"), _VIDEO),
    **dict.fromkeys(("WAN22_S2V", "WAN21_HuMo", "WAN22_Animate", "WAN_Animate2", "WAN21_CausalAR_T2V"), _VIDEO),
    **dict.fromkeys(("WAN21_FlowRVS", "WAN21_SCAIL", "WAN21_SCAIL2", "WAN22_WanDancer"), _VIDEO),
    "CogVideoX_Inpaint": _VIDEO,
    **dict.fromkeys(("StableAudio", "StableAudio3", "ACEStep", "ACEStep15", "MiniMaxMusic3"), _AUDIO),
    **dict.fromkeys(("Hunyuan3Dv2", "Hunyuan3Dv2_1", "Hunyuan3Dv2mini", "TripoSplat", "Trellis2"), _SHAPES),
    **dict.fromkeys(("RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"), _SEES),
}
# Classes with a small text encoder, and one large enough to be timed: 44.7 M parameters.
SIZES = {
    **CLASSES,
    **REFUSED,
    **ARCHITECTURES,
    "SD2": CLASSES["SD20"],
    "HunyuanVideo15 I2V": replace(CLASSES["HunyuanVideo15"], more=_picture(32, 3, 4, 24)),
    "SD1 inpaint": Tiny(_of("SD15", **{**_SD1, "in_channels": 9}), (4, 8, 8), (77, 48)),
    "SDXL with text": Tiny(_of("SDXL", **_sdxl(24)), (4, 8, 8), (77, 48), 24),
    # With the feed-forward width of diffusers' Flux.
    "Flux as in diffusers": Tiny(
        _by_params("Flux", _FLUX_PARAMS, **{**_FLUX, "mlp_ratio": 4.0}), (16, 8, 8), (7, 48), 32
    ),
    "SD1 middling": Tiny(_of("SD15", **_SD1_MIDDLING), (4, 32, 32), (77, 512)),
}
