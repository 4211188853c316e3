"""Tests that saving renames layers only if their family is certain."""

import json

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats import files
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from graft_pack.trainers.formats.forms import file_form
from graft_pack.trainers.formats.keys import split
from graft_pack.trainers.formats.kohya import kohya_form
from graft_pack.trainers.formats.layer_paths import family_of_layers
from graft_pack.trainers.formats.peft_format import PeftAdapter


def lora(names, rows=8, inputs=None, rank=2):
    """Return a LoRA without alphas under names of any layout."""
    ends = {"lora_down.weight": (rank, inputs or rows), "lora_up.weight": (rows, rank)}
    return {f"{name}.{end}": torch.ones(shape) for name in names for end, shape in ends.items()}


def attention(start, blocks, layer="attn"):
    return [f"{start}.{number}.{layer}.to_{end}" for number in blocks for end in "qkv"]


BLOCKS = "transformer.transformer_blocks"
SINGLE = "transformer.single_transformer_blocks"
# (layers of a file, width) of models that Graft has no table for, or whose names fit several.
UNCERTAIN = {
    "Qwen-Image": (attention(BLOCKS, [0, 59]), 3072),
    "first blocks of Qwen-Image": (attention(BLOCKS, [0, 1]), 3072),
    "LTX": (attention(BLOCKS, [0], "attn1") + attention(BLOCKS, [0], "attn2"), 2048),
    "cross-attention of PixArt": (attention(BLOCKS, [0, 27], "attn2"), 1152),
    "OneTrainer's PixArt": ([f"lora_transformer_transformer_blocks_0_attn2_to_{end}" for end in "qkv"], 1152),
    "AuraFlow": (attention("transformer.joint_transformer_blocks", [0]) + attention(SINGLE, [0]), 3072),
    "single blocks of AuraFlow": (attention(SINGLE, [0, 31]), 3072),
    "feed-forward layers of AuraFlow": ([*attention(SINGLE, [0]), f"{SINGLE}.0.ff.linear_1"], 3072),
    "HunyuanVideo": (attention(BLOCKS, [0, 19]) + attention(SINGLE, [0, 39]), 3072),
    "Flux 2": ([*attention(BLOCKS, [0]), f"{SINGLE}.0.attn.to_qkv_mlp_proj"], 3072),
    "HunyuanDiT": (attention("transformer.blocks", [0], "attn1"), 1408),
}


@pytest.mark.parametrize("kind", UNCERTAIN)
def test_layers_of_an_uncertain_family_keep_their_names(kind):
    names, width = UNCERTAIN[kind]
    tensors = lora(names, width)
    assert family_of_layers(split(tensors)[0], {}) == ""
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        named = {key.replace("lora_down", down).replace("lora_up", up): value for key, value in tensors.items()}
        assert kohya_form(Adapter(named), {}).keys() == named.keys()


@pytest.mark.parametrize(
    "names, width, architecture, family",
    [
        (attention(BLOCKS, [0, 23]), 1536, "", "SD3"),
        (attention(BLOCKS, [0, 37]), 2432, "", "SD3"),
        (attention(BLOCKS, [0]) + attention(SINGLE, [0]), 3072, "", "Flux"),
        (attention(BLOCKS, [0, 18]), 3072, "flux-1-dev/lora", "Flux"),
        (attention(BLOCKS, [0]), 3072, "Flux.2-dev/lora", ""),
        (["lora_unet_layers_0_attention_out"], 2304, "", ""),
        (["lora_unet_layers_0_attention_out"], 3840, "", "Z-Image"),
        (["lora_unet_layers_0_attention_out"], 3840, "Lumina-2/lora", ""),
    ],
)
def test_size_and_metadata_tell_families_with_the_same_names_apart(names, width, architecture, family):
    layers = split(lora(names, width))[0]
    assert family_of_layers(layers, {"modelspec.architecture": architecture}) == family
    assert family_of_layers(layers, {"ss_network_module": "networks.lora_flux_2"}) == ""


@pytest.mark.parametrize(
    "name, rows, inputs",
    [
        ("single_blocks_0_linear1", 72, 8),
        ("single_blocks_0_linear2", 8, 32),
        ("double_blocks_0_img_mlp_0", 48, 8),
    ],
)
def test_sizes_of_flux_2_are_not_flux(name, rows, inputs):
    assert family_of_layers(split(lora([f"lora_unet_{name}"], rows, inputs))[0], {}) == ""


Z_IMAGE = [f"diffusion_model.layers.0.attention.to_{end}" for end in "qkv"]


def loaded(tensors, folder):
    path = str(folder / "a.safetensors")
    files.write_tensors(path, tensors, {})
    return load_adapter(path)


def layers_of(tensors):
    return set(split(dict(tensors))[0])


def test_z_images_attention_becomes_the_layer_that_the_host_has(tmp_path):
    others = ["diffusion_model.layers.0.attention.to_out.0", "diffusion_model.layers.0.feed_forward.w1"]
    adapter = loaded(lora([*Z_IMAGE, *others]), tmp_path)
    ends = ("attention_qkv", "attention_out", "feed_forward_w1")
    assert layers_of(adapter) == {f"lora_unet_layers_0_{end}" for end in ends}


def test_z_images_attention_keeps_its_names_if_the_host_has_no_joint_layer(tmp_path):
    loha = {f"{name}.hada_w{number}_{end}": torch.ones(8, 8) for name in Z_IMAGE for number in "12" for end in "ab"}
    assert loaded(loha, tmp_path).keys() == loha.keys()


def test_ia3_keeps_its_factors():
    tensors = {"lora_unet_a.weight": torch.ones(8), "lora_unet_a.on_input": torch.tensor(False)}
    assert kohya_form(Adapter(tensors), {}).keys() == tensors.keys()


def test_attention_of_flux_joins_without_its_feed_forward_part():
    names = [*attention(BLOCKS, [0]), *attention(SINGLE, [3])]
    tensors = kohya_form(lora(names), {})
    assert layers_of(tensors) == {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_3_linear1"}
    up = tensors["lora_unet_single_blocks_3_linear1.lora_up.weight"]
    assert up.shape == (7 * 8, 2) and up[:24].all() and not up[24:].any()


@pytest.mark.parametrize("block", ["img_attn_qkv", "txt_mlp_0"])
def test_a_checkpoints_own_layer_with_a_name_of_diffusers_keeps_it(block):
    """JoyImage has blocks with the names of Flux, and ends with proj_out instead of final_layer.linear."""
    tensors = lora([f"lora_unet_double_blocks_0_{block}", "lora_unet_proj_out"])
    assert kohya_form(tensors, {}).keys() == tensors.keys()


def test_a_layer_that_cannot_join_keeps_its_names_alone():
    names = [*attention(BLOCKS, [0]), *attention(SINGLE, [3])]
    odd = {f"{BLOCKS}.0.attn.to_q.diff_b": torch.ones(8)}
    assert layers_of(kohya_form({**lora(names), **odd}, {})) == {*names[:3], "lora_unet_single_blocks_3_linear1"}


@pytest.mark.parametrize(
    "changed, shape", [("to_q.lora_down", (2, 4)), ("to_k.lora_up", (9, 2)), ("to_k.lora_down", (3, 8))]
)
def test_parts_of_other_sizes_do_not_join(changed, shape):
    names = [*attention(BLOCKS, [0]), f"{SINGLE}.0.proj_out"]
    tensors = {**lora(names), f"{BLOCKS}.0.attn.{changed}.weight": torch.ones(shape)}
    assert {*names[:3]} <= layers_of(kohya_form(tensors, {}))


@pytest.mark.parametrize("fault", ["missing", "odd"])
def test_a_part_of_z_image_that_does_not_fit_is_refused_by_name(fault, tmp_path):
    tensors = lora(Z_IMAGE)
    down = tensors.pop(f"{Z_IMAGE[0]}.lora_down.weight")
    if fault == "odd":
        tensors[f"{Z_IMAGE[0]}.lora_down.weight"] = torch.cat([down, down])
    with pytest.raises(ModelError, match=r"not a valid adapter.*attention\.to_q"):
        loaded(tensors, tmp_path)


def test_a_swapped_layer_that_is_no_lora_keeps_its_name():
    name = "transformer.norm_out.linear"
    odd = {f"{name}.hada_w{number}_{end}": torch.ones((16, 8)[end == "b"], 8) for number in "12" for end in "ab"}
    names = [*attention(BLOCKS, [0]), *attention(SINGLE, [3])]
    assert name in layers_of(kohya_form({**lora(names), **odd}, {}))


def test_lycoris_has_no_place_for_the_bias_of_a_lora(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {**lora([name]), f"{name}.diff_b": torch.ones(8)}
    with pytest.raises(ModelError, match=f"'LyCORIS'.*{name} changes a bias"):
        save_adapter(str(tmp_path / "a.safetensors"), Adapter(tensors), "a", "LyCORIS")


def test_a_dora_of_peft_is_not_saved_with_magnitudes_for_another_formula():
    place = "mid_block.attentions.0.proj_in"
    ends = {"lora_A.weight": (2, 8), "lora_B.weight": (8, 2), "lora_magnitude_vector.weight": (8,)}
    tensors = {f"{place}.{end}": torch.ones(shape) for end, shape in ends.items()}
    native = PeftAdapter("DoRA", {"peft_type": "LORA", "use_dora": True}, tensors, True, {place: 1.0})
    metadata = {"graft_recipe": json.dumps({"method": "DoRA"}), "ss_network_module": "networks.lora"}
    adapter = Adapter({}, metadata, native)
    with pytest.raises(ModelError, match="'kohya'.*depends on the model's weights") as caught:
        file_form(adapter, "kohya")
    assert "Connect the model" in caught.value.cure
    assert file_form(adapter, "LyCORIS")[1]["ss_network_module"] == "lycoris.kohya"


def test_an_alpha_that_is_no_number_is_refused_before_the_bias_takes_its_scale(tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    tensors |= {f"{name}.lora_B.bias": torch.ones(8), f"{name}.alpha": torch.ones(2)}
    with pytest.raises(ModelError, match=r"not a valid adapter.*alpha has the shape"):
        loaded(tensors, tmp_path)
