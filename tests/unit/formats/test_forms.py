"""Tests of the conversion of adapters between the names and forms of kohya, diffusers, peft and LyCORIS."""

import json

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats import files
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from graft_pack.trainers.formats.convert import host_places
from graft_pack.trainers.formats.embedding import embeddings_of
from graft_pack.trainers.formats.layer_paths import dotted, place_of
from graft_pack.trainers.formats.peft_form import peft_form

# Layers of kohya's files with (outputs, inputs), by family.
LAYERS = {
    "SD1": {
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k": (8, 6),
        "lora_unet_mid_block_attentions_0_proj_in": (8, 8),
        "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (4, 4),
    },
    "SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_out_0": (8, 8),
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (16, 8),
        "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_v": (8, 6),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (4, 4),
        "lora_te2_text_model_encoder_layers_3_mlp_fc1": (16, 4),
    },
    "Flux": {
        "lora_unet_double_blocks_11_img_attn_qkv": (24, 8),
        "lora_unet_double_blocks_0_txt_mlp_2": (8, 32),
        "lora_unet_single_blocks_37_linear1": (56, 8),
        "lora_unet_single_blocks_3_linear2": (8, 40),
        "lora_unet_final_layer_adaLN_modulation_1": (16, 8),
        "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (4, 4),
    },
    "SD3": {
        "lora_unet_joint_blocks_2_x_block_attn_qkv": (24, 8),
        "lora_unet_joint_blocks_2_context_block_mlp_fc1": (32, 8),
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": (16, 8),
        "lora_unet_joint_blocks_0_x_block_attn2_proj": (8, 8),
    },
    "Qwen-Image": {
        "lora_unet_transformer_blocks_59_attn_add_k_proj": (8, 8),
        "lora_unet_transformer_blocks_0_img_mlp_net_0_proj": (32, 8),
    },
    "Z-Image": {
        "lora_unet_layers_29_attention_qkv": (24, 8),
        "lora_unet_layers_29_attention_out": (8, 8),
        "lora_unet_noise_refiner_1_feed_forward_w2": (8, 24),
    },
    "Wan": {
        "lora_unet_blocks_39_self_attn_o": (8, 8),
        "lora_unet_blocks_0_cross_attn_k_img": (8, 8),
        "lora_unet_blocks_0_ffn_2": (8, 24),
    },
}


def lora(layers, rank=2, seed=0):
    """Return a random LoRA; each layer has its own alpha."""
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (name, (rows, inputs)) in enumerate(layers.items(), 1):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, generator=source)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, rank, generator=source)
        tensors[f"{name}.alpha"] = torch.tensor(float(number))
    return tensors


def products(tensors):
    """Return the difference that each layer of a kohya file adds."""
    names = {key.removesuffix(".lora_up.weight") for key in tensors if key.endswith(".lora_up.weight")}
    found = {}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        found[name] = float(tensors.get(f"{name}.alpha", len(down))) / len(down) * up @ down
    return found


def assert_same_effect(tensors, expected):
    found, wanted = products(tensors), products(expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).norm() / value.norm()) <= 1e-5, name


def saved(adapter, folder, format):
    name = "adapter_model" if format == "peft" else "adapter"
    path = folder / format / f"{name}.safetensors"
    save_adapter(str(path), adapter, "a", format)
    return path


@pytest.mark.parametrize("family", LAYERS)
def test_names_of_kohyas_files_give_paths_and_back(family):
    for name in LAYERS[family]:
        path = place_of(name).path
        assert dotted(path.replace(".", "_")) == path
        assert name.endswith(path.replace(".", "_"))


@pytest.mark.parametrize("family", LAYERS)
def test_a_round_trip_through_all_formats_is_exact(family, tmp_path):
    """Each file is read again, so that nothing but the file carries anything along."""
    tensors = lora(LAYERS[family])
    adapter = Adapter(tensors)
    for number, format in enumerate(("kohya", "diffusers", "peft", "LyCORIS", "kohya")):
        adapter = load_adapter(str(saved(adapter, tmp_path / str(number), format)))
    assert_same_effect(adapter, tensors)
    ranks = {key: len(value) for key, value in adapter.items() if "lora_down" in key}
    assert ranks == {key: len(value) for key, value in tensors.items() if "lora_down" in key}


def test_parts_with_factors_of_their_own_become_one_layer_of_all_ranks(tmp_path):
    """diffusers trains query, key and value apart; kohya's trainers have one layer for them."""
    parts = {f"transformer.transformer_blocks.0.attn.to_{end}": (8, 8) for end in "qkv"}
    parts["transformer.single_transformer_blocks.0.proj_out"] = (8, 40)
    tensors = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for key, value in lora(parts).items()
    }
    path = tmp_path / "a.safetensors"
    files.write_tensors(str(path), {key: value for key, value in tensors.items() if not key.endswith("alpha")}, {})
    back = load_adapter(str(saved(load_adapter(str(path)), tmp_path, "kohya")))
    joint = products(back)["lora_unet_double_blocks_0_img_attn_qkv"]
    own = [tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in list(parts)[:3]]
    assert float((joint - torch.cat(own)).norm() / joint.norm()) <= 1e-5
    assert back["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"].shape[0] == 6


def test_a_missing_part_changes_nothing(tmp_path):
    parts = lora({"transformer.transformer_blocks.30.attn.to_v": (8, 8)})
    path = tmp_path / "a.safetensors"
    files.write_tensors(str(path), parts, {})
    joint = products(load_adapter(str(saved(load_adapter(str(path)), tmp_path, "kohya"))))
    found = joint["lora_unet_joint_blocks_30_x_block_attn_qkv"]
    assert not found[:16].any()
    assert float((found[16:] - next(iter(products(parts).values()))).norm() / found.norm()) <= 1e-5


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize(
    "more, named",
    [
        ({"lora_unet_mid_block_attentions_0_proj_in.diff": torch.ones(8, 8)}, "proj_in holds diff"),
        ({"lora_unet_mid_block_attentions_0_proj_in.nothing": torch.ones(8)}, "belongs to no layer"),
        (
            {
                f"lora_unet_mid_block_attentions_0_proj_in.hada_{end}": torch.ones(2, 2)
                for end in ("w1_a", "w1_b", "w2_a", "w2_b")
            },
            "has another type than",
        ),
    ],
    ids=["difference", "unknown", "mixed"],
)
def test_a_layer_without_a_form_is_refused_by_name(format, more, named, tmp_path):
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
    adapter = Adapter({**lora({name: (8, 6)}), **more})
    with pytest.raises(ModelError, match=f"'{format}'.*{named}") as caught:
        saved(adapter, tmp_path, format)
    assert caught.value.input == "format"


def test_an_unknown_network_has_no_diffusers_file_and_a_peft_folder_of_its_own_names():
    tensors = lora({"lora_unet_strange_0_layer": (8, 8)})
    with pytest.raises(ModelError, match="no counterpart in diffusers"):
        peft_form(tensors, {}, "diffusers")
    with pytest.raises(ModelError, match="lora_unet_strange_0_layer belongs to no model"):
        peft_form(tensors, {}, "peft")
    tensors = lora({"diffusion_model.strange.0.layer": (8, 8)})
    assert {name.partition(".lora_")[0] for name in peft_form(tensors, {}, "peft").tensors} == {"strange.0.layer"}


def test_a_lokr_of_swapped_halves_keeps_the_checkpoints_name():
    tensors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(8, 4), "alpha": torch.tensor(1.0)}
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{name}.{end}": value for end, value in tensors.items()}
    metadata = {"modelspec.architecture": "flux-1-dev/lora"}
    with pytest.raises(ModelError, match="no counterpart in diffusers"):
        peft_form(tensors, metadata, "diffusers")
    places = {key.partition(".lokr_")[0] for key in peft_form(tensors, metadata, "peft").tensors}
    assert places == {"final_layer.adaLN_modulation.1"}


def test_a_tucker_convolution_keeps_its_rank():
    source = torch.Generator().manual_seed(0)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down, mid, up = (torch.randn(shape, generator=source) for shape in ((2, 5, 1, 1), (2, 2, 3, 3), (7, 2, 1, 1)))
    ends = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    native = peft_form({f"{name}.{end}": value for end, value in ends.items()}, {}, "diffusers")
    a = native.tensors["down_blocks.0.resnets.0.conv1.lora_A.weight"]
    x = torch.randn(1, 5, 9, 9, generator=source)
    conv = torch.nn.functional.conv2d
    expected = conv(conv(x, down), mid)
    assert float((conv(x, a) - expected).norm() / expected.norm()) <= 1e-5
    assert native.scales == {"down_blocks.0.resnets.0.conv1": 0.5}


def test_a_text_encoders_folder_holds_the_names_of_both_generations_of_transformers(tmp_path):
    path = saved(Adapter(lora(LAYERS["SDXL"])), tmp_path, "peft")
    for component in ("text_encoder", "text_encoder_2"):
        keys = files.read_header(str(path.parent / component / path.name)).keys() - {"__metadata__"}
        inner = {key.removeprefix("base_model.model.") for key in keys}
        bare = {key.removeprefix("text_model.") for key in inner}
        assert inner == bare | {f"text_model.{key}" for key in bare}
        config = json.loads((path.parent / component / "adapter_config.json").read_text())
        assert all(name.startswith("encoder.layers.") for name in config["target_modules"])


@pytest.mark.parametrize("format", ["kohya", "LyCORIS"])
def test_a_bundled_word_is_read_and_kept(format, tmp_path):
    words = {"bundle_emb.cat.clip_l": torch.randn(2, 768), "bundle_emb.cat.clip_g": torch.randn(2, 1280)}
    words["bundle_emb.dog.string_to_param.*"] = torch.randn(3, 768)
    words["bundle_emb.dog.odd"] = torch.randn(3)
    path = tmp_path / "a.safetensors"
    files.write_tensors(str(path), {**lora(LAYERS["SD1"]), **words}, {})
    adapter = load_adapter(str(path))
    assert not any("bundle" in key for key in adapter)
    back = load_adapter(str(saved(adapter, tmp_path, format)))
    for found in (adapter, back):
        cat, dog = embeddings_of(found.bundled)
        assert (cat.name, set(cat), cat.count) == ("cat", {"clip_l", "clip_g"}, 2)
        assert (dog.name, set(dog), dog.count) == ("dog", {"clip_l"}, 3)
        assert found.bundled.keys() == words.keys()


def test_lycoris_gets_an_alpha_for_each_layer(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_k"
    tensors = {key: value for key, value in lora({name: (8, 6)}).items() if "alpha" not in key}
    path = saved(Adapter(tensors), tmp_path, "LyCORIS")
    found = load_adapter(str(path))
    assert float(found[f"{name}.alpha"]) == 2.0
    assert found.metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found.metadata["ss_network_args"]) == {"algo": "lora"}


@pytest.mark.parametrize("format", ["kohya", "LyCORIS"])
def test_loha_and_lokr_have_a_scale_of_one_in_files_of_lycoris(format, tmp_path):
    """LyCORIS 4.1 applies the scale twice when it merges them into a model."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    factors = {f"hada_w{number}_{end}": torch.randn(4, 4)[:, :2] for number in "12" for end in "ab"}
    factors = {end: value.T if end.endswith("b") else value for end, value in factors.items()}
    tensors = {f"{name}.{end}": value.half() for end, value in factors.items()} | {f"{name}.alpha": torch.tensor(3.0)}
    back = load_adapter(str(saved(Adapter(tensors), tmp_path, format)))
    # No other format needs it, so a kohya file stays as it is.
    alpha, scale = (2.0, 1.5) if format == "LyCORIS" else (3.0, 1.0)
    assert float(back[f"{name}.alpha"]) == alpha
    assert torch.equal(back[f"{name}.hada_w1_a"].float(), scale * tensors[f"{name}.hada_w1_a"].float())


@pytest.mark.parametrize(
    "layer", ["lora_unet_down_blocks_0_attentions_0_proj_in", "transformer.transformer_blocks.0.attn.to_q"]
)
def test_kohya_files_that_kept_the_metadata_of_diffusers_are_read(layer, tmp_path):
    """Earlier versions of Graft wrote them."""
    path = str(tmp_path / "a.safetensors")
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    tensors[f"{layer}.alpha"] = torch.tensor(3.0)
    config = {f"{prefix}.{name}": value for prefix in ("unet", "transformer") for name, value in {"r": 2}.items()}
    files.write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    read = load_adapter(path)
    assert read.native is None and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "kind, end", [("VERA", "vera_lambda_b"), ("HRA", "hra_u"), ("FOURIERFT", "fourierft_spectrum"), ("LN_TUNING", "w")]
)
def test_other_types_of_peft_are_refused_by_their_name(kind, end, tmp_path):
    path = str(tmp_path / "adapter_model.safetensors")
    files.write_tensors(path, {f"base_model.model.mid_block.to_q.{end}": torch.ones(8)}, {})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    with pytest.raises(ModelError, match=f"has peft's type {kind}, which Graft does not support"):
        load_adapter(path)


def dora_folder(folder, layers):
    """Write a peft folder of a DoRA and return the path of its weights."""
    tensors = {}
    for path, (rows, inputs) in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(rows, 2)
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = torch.ones(rows)
    files.write_tensors(str(folder / "adapter_model.safetensors"), tensors, {})
    config = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder / "adapter_model.safetensors")


def test_a_dora_folder_of_wan_has_comfyuis_names(tmp_path):
    layers = {"blocks.0.attn1.to_out.0": (8, 8), "blocks.0.ffn.net.2": (8, 24), "blocks.1.cross_attn.k": (8, 8)}
    places = host_places(load_adapter(dora_folder(tmp_path, layers)).native)
    assert {name: path for name, (_, path) in places.items()} == {
        "lora_unet_blocks_0_self_attn_o": "blocks.0.attn1.to_out.0",
        "lora_unet_blocks_0_ffn_2": "blocks.0.ffn.net.2",
        "lora_unet_blocks_1_cross_attn_k": "blocks.1.cross_attn.k",
    }


def test_a_dora_on_a_part_of_z_images_layer_is_refused_by_name(tmp_path):
    path = dora_folder(tmp_path, {"layers.3.attention.to_q": (8, 8)})
    with pytest.raises(ModelError, match=r"layer layers\.3\.attention\.to_q is a part of .*layers\.3\.attention\.qkv"):
        load_adapter(path)


def test_metadata_without_patterns_is_saved_again(tmp_path):
    path = str(tmp_path / "a.safetensors")
    tensors = {
        "unet.mid_block.to_q.lora_A.weight": torch.ones(2, 8),
        "unet.mid_block.to_q.lora_B.weight": torch.ones(8, 2),
    }
    files.write_tensors(path, tensors, {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3})})
    back = load_adapter(str(saved(load_adapter(path), tmp_path, "diffusers")))
    assert_same_effect(back, load_adapter(path))
