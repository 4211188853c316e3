"""Tests that adapters of other libraries act as their makers apply them. The oracle is the maker's own library."""

import json
import subprocess
import sys

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats.adapter import Adapter, load_adapter
from graft_pack.trainers.formats.peft_format import PeftAdapter

from tests.interop import oracles
from tests.support import models
from tests.support.adapters import differences, make_adapter, make_model

pytestmark = pytest.mark.usefixtures("comfy")

# Bound of the error relative to the adapter's effect.
BOUND = 3e-4


@pytest.fixture(scope="module")
def model(comfy):
    with torch.inference_mode():
        return models.patcher("SD1")


@pytest.fixture(scope="module")
def resting(comfy):
    """Return a model that no test loads: `differences` reads its weights, where a loaded clone's patches would be."""
    return make_model("SD1")


def applied(model, path, strength=1.0):
    from graft_pack.nodes.host.model.lora import apply_adapter

    out, _ = apply_adapter(model, None, load_adapter(path), strength, strength)
    return oracles.output_of(out)


LYCORIS = {
    "LoCon": {"algo": "lora"},
    "LoCon Tucker": {"algo": "lora", "use_tucker": True},
    "DoRA": {"algo": "lora", "dora_wd": True, "spread": 0.6},
    "DoRA by input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa DoRA": {"algo": "loha", "dora_wd": True},
    "LoHa Tucker": {"algo": "loha", "use_tucker": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr DoRA": {"algo": "lokr", "factor": 4, "dora_wd": True},
    "LoKr both": {"algo": "lokr", "factor": 8, "decompose_both": True, "dim": 2},
    "LoKr Tucker": {"algo": "lokr", "factor": 4, "use_tucker": True, "dim": 2},
    "GLoRA": {"algo": "glora"},
    "OFT": {"algo": "diag-oft"},
    "OFT rescaled": {"algo": "diag-oft", "rescaled": True},
    "OFT constraint": {"algo": "diag-oft", "constraint": 0.01},
    "BOFT": {"algo": "boft"},
    "BOFT rescaled": {"algo": "boft", "rescaled": True},
    "BOFT constraint": {"algo": "boft", "constraint": 0.01},
    "IA3": {"algo": "ia3"},
    "IA3 by input": {"algo": "ia3", "train_on_input": True},
    "full": {"algo": "full", "spread": 0.02},
    "norms": {"algo": "lora", "train_norm": True},
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_files_act_as_in_lycoris(kind, model, tmp_path):
    oracle = oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS[kind])
    assert oracle.error(applied(model, oracle.path)) <= BOUND


def lora_config(**fields):
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **fields)


def other_config(kind, targets=("to_q", "to_k", "to_v", "to_out.0"), **fields):
    import peft

    return getattr(peft, f"{kind}Config")(target_modules=list(targets), **fields)


CONVS = ("conv1", "conv2", "to_q")
PEFT = {
    "LoRA": lambda: lora_config(),
    "rsLoRA": lambda: lora_config(use_rslora=True),
    "Gaussian": lambda: lora_config(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora_config(init_lora_weights="orthogonal"),
    "PiSSA": lambda: lora_config(init_lora_weights="pissa"),
    "OLoRA": lambda: lora_config(init_lora_weights="olora"),
    "DoRA": lambda: lora_config(use_dora=True),
    "LoHa": lambda: other_config("LoHa", CONVS, r=4, alpha=6),
    "LoHa effective": lambda: other_config("LoHa", CONVS, r=4, alpha=6, use_effective_conv2d=True),
    "LoKr": lambda: other_config("LoKr", CONVS, r=2, alpha=6, decompose_factor=4),
    "LoKr both": lambda: other_config("LoKr", CONVS, r=2, alpha=6, decompose_both=True, decompose_factor=8),
    "LoKr effective": lambda: other_config("LoKr", CONVS, r=2, alpha=6, use_effective_conv2d=True, decompose_factor=4),
    "OFT": lambda: other_config("OFT", r=0, oft_block_size=4),
    "OFT shared": lambda: other_config("OFT", r=0, oft_block_size=4, block_share=True, use_cayley_neumann=False),
    "OFT constraint": lambda: other_config("OFT", r=0, oft_block_size=4, coft=True, eps=0.1),
    "BOFT": lambda: other_config("BOFT", boft_block_size=4),
    "IA3": lambda: other_config("IA3", ("to_k", "to_v", "ff.net.2"), feedforward_modules=["ff.net.2"]),
    "IA3 with biases": lambda: other_config("IA3", ("proj_in", "proj_out", "ff.net.0.proj"), feedforward_modules=[]),
    "DoRA conv": lambda: other_config("Lora", CONVS, r=4, lora_alpha=6, use_dora=True),
    "BOFT conv": lambda: other_config("BOFT", ("conv_shortcut", "proj_in"), boft_block_size=4),
    "OFT conv": lambda: other_config("OFT", ("proj_in", "conv_shortcut"), r=0, oft_block_size=4),
    "IA3 conv": lambda: other_config("IA3", ("conv1", "conv2"), feedforward_modules=["conv2"]),
    "IA3 by a pattern": lambda: other_config("IA3", ("conv1", "conv2"), feedforward_modules=r".*\.conv2"),
    "LoRA with biases": lambda: other_config("Lora", ("to_out.0", "ff.net.2"), r=4, lora_alpha=6, lora_bias=True),
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_folders_act_as_in_peft(kind, model, tmp_path):
    oracle = oracles.peft(model, tmp_path, PEFT[kind]())
    assert oracle.error(applied(model, oracle.path)) <= BOUND


@pytest.mark.parametrize(
    "start, cure", [("corda", "path_initial_model"), ("loftq", "quantized base"), ("lora_ga", "path_initial_model")]
)
def test_start_values_that_the_folder_lacks_are_refused(start, cure, model, tmp_path):
    oracle = oracles.peft(model, tmp_path, lora_config())
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"'))
    with pytest.raises(ModelError, match=f"init_lora_weights is '{start}'.*{cure}"):
        load_adapter(oracle.path)


# Layouts that other programs write, as tensors of their documented names


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
PLACE = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"


def factors(rank=2, width=32):
    source = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=source) for shape in ((rank, width), (width, rank), (width,))]


def added_by(model, tensors, tmp_path, clip=None, metadata=None):
    """Return what an adapter file adds to the weights of a model and its text encoder."""
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.trainers.formats import files

    path = str(tmp_path / "adapter.safetensors")
    files.write_tensors(path, tensors, metadata or {})
    out, text = apply_adapter(model, clip, load_adapter(path), 1.0, 1.0)
    return {**differences(out), **({} if text is None else differences(text.patcher))}


def assert_added(found, expected, bar=1e-5):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key] - value).norm() <= bar * value.norm(), key


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_bias_is_added_with_the_scale_of_its_layer(prefix, alpha, resting, tmp_path):
    down, up, bias = factors()
    name = prefix + ATTENTION
    tensors = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}
    if alpha:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    scale = alpha / 2 if alpha else 1.0
    expected = {f"{PLACE}.weight": scale * up @ down, f"{PLACE}.bias": scale * bias}
    assert_added(added_by(resting, tensors, tmp_path), expected)


@pytest.mark.parametrize("end", ["magnitude", "lora_magnitude_vector", "lora_magnitude_vector.default.weight"])
@pytest.mark.parametrize("layer", [ATTENTION, f"unet.{ATTENTION}", "lora_unet_" + ATTENTION.replace(".", "_")])
def test_magnitudes_of_rows_divide_by_the_norm_of_the_sum(layer, end, resting, tmp_path):
    """ai-toolkit and peft: m (W + s B A) / |W + s B A|."""
    down, up, bias = factors()
    tensors = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up, f"{layer}.{end}": bias.abs()}
    weight = resting.model.state_dict()[f"{PLACE}.weight"]
    total = weight + up @ down
    expected = {f"{PLACE}.weight": bias.abs()[:, None] * total / total.norm(dim=1, keepdim=True) - weight}
    assert_added(added_by(resting, tensors, tmp_path), expected)


def test_random_start_values_are_refused_where_they_matter(model, tmp_path):
    """peft's own results differ from load to load: four iterations do not find the components of a random weight."""
    oracle = oracles.peft(model, tmp_path, lora_config(init_lora_weights="pissa_niter_4"))
    with pytest.raises(ModelError, match=r"start values at random \(pissa_niter_4\)"):
        applied(model, oracle.path)


def place_of_text(layer, encoder="clip_l"):
    return f"{encoder}.transformer.text_model.encoder.layers.0.{layer}.weight"


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_metadata_of_a_file_for_text_encoders_only_is_read(encoder, tmp_path):
    """diffusers stores r and lora_alpha in lora_adapter_metadata, and B without the scale."""
    source = torch.Generator().manual_seed(4)
    down, up = torch.randn(2, 24, generator=source), torch.randn(24, 2, generator=source)
    layer = f"{encoder}.text_model.encoder.layers.0.self_attn.q_proj"
    config = {f"{encoder}.{name}": value for name, value in {"r": 2, "lora_alpha": 5, "use_rslora": False}.items()}
    found = added_by(
        models.patcher("SDXL with text"),
        {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up},
        tmp_path,
        models.text("SDXL with text"),
        {"lora_adapter_metadata": json.dumps(config)},
    )
    place = place_of_text("self_attn.q_proj", "clip_l" if encoder == "text_encoder" else "clip_g")
    assert_added(found, {place: 2.5 * up @ down})


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA", "PiSSA", "LoRA with biases"])
def test_files_of_save_lora_adapter_act_as_in_diffusers(kind, model, tmp_path):
    """They have neither a prefix nor a folder's configuration, but metadata."""
    network, base = oracles.network_of(model)
    torch.manual_seed(5)
    network.add_adapter(PEFT[kind]())
    oracles.randomize([p for p in network.parameters() if p.requires_grad], 0.1)
    network.save_lora_adapter(str(tmp_path))
    loaded, _ = oracles.network_of(model)
    loaded.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    (path,) = tmp_path.glob("*.safetensors")
    oracle = oracles.Oracle(str(path), oracles.network_output(loaded), base)
    assert oracle.error(applied(model, str(path))) <= BOUND


@pytest.mark.parametrize("kind", [dict, Adapter])
def test_the_limit_of_comfyuis_own_oft_is_comfyuis(kind, resting):
    """Its Train LoRA limits the rotations to alpha, LyCORIS to alpha times the number of outputs."""
    import comfy.lora
    import comfy.sd
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.nodes.tools import GraftResizeAdapter

    blocks = torch.randn(8, 4, 4, generator=torch.Generator().manual_seed(4))
    file = {f"{PLACE}.oft_blocks": blocks, f"{PLACE}.alpha": torch.tensor(1.0)}
    weight = resting.model.state_dict()[f"{PLACE}.weight"]

    def added_in(patcher):
        # ComfyUI's OFT has no float64.
        (patches,) = patcher.patches.values()
        return {f"{PLACE}.weight": comfy.lora.calculate_weight(patches, weight.clone(), PLACE) - weight}

    expected = added_in(comfy.sd.load_lora_for_models(resting, None, file, 1.0, 0.0)[0])
    assert_added(added_in(apply_adapter(resting, None, kind(file), 1.0, 1.0)[0]), expected)
    whole = GraftResizeAdapter.execute(kind(file), 0, 1.0, model=resting).args[0]
    assert_added(differences_of(resting, whole), expected, 1e-4)


def test_a_dora_of_text_encoders_is_not_saved_for_others_with_the_model(resting):
    from graft_pack.nodes.host.actions.adapter_tools import restore_magnitudes

    down, up, magnitude = factors()
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    adapter = Adapter({**tensors, f"{name}.dora_scale": magnitude[:, None]}, {"graft_recipe": '{"method": "DoRA"}'})
    with pytest.raises(ModelError, match=f"text-encoder layers, such as {name}.*'kohya'.*training node"):
        restore_magnitudes(adapter, resting, "LyCORIS")


# Tools


RELATIVE = {
    "LyCORIS": ["DoRA", "LoKr DoRA", "GLoRA", "OFT rescaled", "BOFT constraint", "IA3"],
    "peft": ["PiSSA", "OLoRA", "DoRA", "OFT", "BOFT", "IA3 with biases"],
}


@pytest.fixture(scope="module", params=[(maker, kind) for maker, kinds in RELATIVE.items() for kind in kinds], ids=str)
def relative(request, model, tmp_path_factory):
    """Return an adapter with a difference that depends on the model's weights."""
    maker, kind = request.param
    folder = tmp_path_factory.mktemp("relative")
    if maker == "peft":
        return load_adapter(oracles.peft(model, folder, PEFT[kind]()).path)
    return load_adapter(oracles.lycoris(model, folder / "adapter.safetensors", **LYCORIS[kind]).path)


def differences_of(model, adapter):
    from graft_pack.nodes.host.model.lora import apply_adapter

    found = differences(apply_adapter(model, None, adapter, 1.0, 1.0)[0])
    return {key: value for key, value in found.items() if value.norm() > 0}


def test_merging_with_the_model_is_the_sum_of_both(relative, resting):
    from graft_pack.nodes.tools import GraftMergeAdapters

    other = make_adapter("SD1", seed=1)
    fields = {"method": "weighted sum", "rank": 0, "density": 0.5, "seed": 0}
    with pytest.raises(ModelError, match="input 'adapter_a'.*Connect the model"):
        GraftMergeAdapters.execute(relative, other, 0.5, 2.0, **fields)
    merged = GraftMergeAdapters.execute(relative, other, 0.5, 2.0, **fields, model=resting).args[0]
    expected = {key: 0.5 * value for key, value in differences_of(resting, relative).items()}
    for key, value in differences_of(resting, other).items():
        expected[key] = expected.get(key, 0) + 2 * value
    assert_added(differences_of(resting, merged), expected, 1e-4)


def test_resizing_with_the_model_keeps_what_the_rank_allows(relative, resting):
    from graft_pack.nodes.tools import GraftResizeAdapter

    expected = differences_of(resting, relative)
    with pytest.raises(ModelError, match="input 'adapter'.*Connect the model"):
        GraftResizeAdapter.execute(relative, 4, 1.0)
    whole = GraftResizeAdapter.execute(relative, 0, 1.0, model=resting).args[0]
    assert_added(differences_of(resting, whole), expected, 1e-4)
    small = differences_of(resting, GraftResizeAdapter.execute(relative, 4, 1.0, model=resting).args[0])
    for key, value in expected.items():
        left = torch.linalg.svdvals(value.flatten(1).double())[4:].norm() if value.dim() > 1 else 0.0
        assert (small[key] - value).double().norm() <= left * (1 + 1e-4) + 1e-4 * value.norm()


def test_lokr_with_a_core_is_merged_and_resized(model, resting, tmp_path):
    from graft_pack.nodes.tools import GraftResizeAdapter

    oracle = oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS["LoKr Tucker"])
    adapter = load_adapter(oracle.path)
    whole = GraftResizeAdapter.execute(adapter, 4096, 1.0).args[0]
    assert_added(differences_of(resting, whole), differences_of(resting, adapter), 1e-4)


@pytest.mark.parametrize("prefixes", [("lora_te3_", "lora_te2_"), ("lora_te2_", "lora_te3_")])
def test_t5_is_merged_under_both_of_its_numbers(prefixes):
    """OneTrainer numbers Flux' T5 as its second text encoder, other programs as the third."""
    from graft_pack.nodes.tools import GraftMergeAdapters

    model, clip = models.patcher("Flux"), models.text("Flux")
    source = torch.Generator().manual_seed(4)
    parts = []
    for prefix in prefixes:
        down, up = torch.randn(2, 48, generator=source), torch.randn(16, 2, generator=source)
        name = f"{prefix}encoder_block_0_layer_0_SelfAttention_q"
        parts.append(Adapter({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}))
    merged = GraftMergeAdapters.execute(*parts, 1.0, 1.0, "weighted sum", 0, 0.5, 0).args[0]
    expected = sum(part_up @ part_down for part_down, part_up in (part.values() for part in parts))
    from graft_pack.nodes.host.model.lora import apply_adapter

    _, text = apply_adapter(model, clip, merged, 1.0, 1.0)
    (found,) = differences(text.patcher).values()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_comfyuis_own_loader_refuses_what_only_graft_can_apply(model, tmp_path):
    import comfy.sd

    adapter = load_adapter(oracles.peft(model, tmp_path, PEFT["DoRA"]()).path)
    with pytest.raises(ModelError, match="DoRA in peft's form.*Connect it to Graft Apply Adapter"):
        comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0.0)


# Keys that nothing uses


def test_unused_keys_are_named_and_more_than_a_tenth_is_an_error(model):
    from graft_pack.nodes.adapter import GraftApplyAdapter
    from graft_pack.nodes.tools import GraftInspectAdapter

    adapter = make_adapter("SD1")
    few = {f"lora_unet_nowhere_{n}.alpha": torch.ones(()) for n in range(len(adapter) // 10)}
    done = GraftApplyAdapter.execute(model, Adapter({**adapter, **few}), 1.0, 0.0)
    said = f"{len(few)} keys of {len(adapter) + len(few)} fit no layer"
    assert said in done.ui["text"][0]
    assert GraftApplyAdapter.execute(model, adapter, 1.0, 0.0).ui == {"text": ("",)}
    report = GraftInspectAdapter.execute(Adapter({**adapter, **few}), model).args[1]
    assert f"{len(few)} keys fit no layer: lora_unet_nowhere" in report
    many = {f"lora_unet_nowhere_{n}.alpha": torch.ones(()) for n in range(len(adapter) // 8)}
    with pytest.raises(ModelError, match=r"Graft Apply Adapter, input 'adapter'.*keys of \d+ fit no layer, such as"):
        GraftApplyAdapter.execute(model, Adapter({**adapter, **many}), 1.0, 0.0)
    report = GraftInspectAdapter.execute(Adapter({**adapter, **many}), model).args[1]
    assert "DOES NOT FIT" in report


def test_the_node_says_where_it_uses_the_makers_formula(model, tmp_path):
    from graft_pack.nodes.adapter import GraftApplyAdapter

    oracle = oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS["IA3"])
    done = GraftApplyAdapter.execute(model, load_adapter(oracle.path), 1.0, 0.0)
    assert "changed by the formula of the adapter's maker" in done.ui["text"][0]


def test_sdxl_files_of_two_namings_merge_with_the_model(tmp_path):
    """kohya names a UNet's layers by the checkpoint, OneTrainer and SimpleTuner by diffusers."""
    from graft_pack.nodes.tools import GraftMergeAdapters

    model = make_model("SDXL")
    own, published = "input_blocks_3_1_transformer_blocks_0_attn1_to_q", "down_blocks_1_attentions_0_"
    published += "transformer_blocks_0_attn1_to_q"
    assert_merged(model, f"lora_unet_{own}", f"lycoris_{published}", (64, 64), GraftMergeAdapters)


def assert_merged(model, first, second, shape, node):
    parts = [adapter_on(name, shape, seed) for seed, name in enumerate((first, second))]
    fields = {"method": "weighted sum", "rank": 0, "density": 0.5, "seed": 0}
    with pytest.raises(ModelError, match="name their layers in different ways.*connect it as model"):
        node.execute(*parts, 0.5, 2.0, **fields)
    for given in (parts, parts[::-1]):
        merged = node.execute(*given, 1.0, 1.0, **fields, model=model).args[0]
        expected = differences_of(model, given[0])
        for key, value in differences_of(model, given[1]).items():
            expected[key] = expected.get(key, 0) + value
        assert_added(differences_of(model, merged), expected)


def adapter_on(name, shape, seed):
    source = torch.Generator().manual_seed(seed)
    down, up = torch.randn(2, shape[1], generator=source), torch.randn(shape[0], 2, generator=source)
    return Adapter({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})


def test_flux_files_of_two_namings_merge_with_the_model():
    """kohya has one layer for queries, keys and values, ai-toolkit has three."""
    from graft_pack.nodes.tools import GraftMergeAdapters

    model = make_model("Flux")
    whole = adapter_on("lora_unet_double_blocks_0_img_attn_qkv", (192, 64), 0)
    parts = Adapter({})
    for seed, end in enumerate(("to_q", "to_v"), 1):
        parts.update(adapter_on(f"transformer.transformer_blocks.0.attn.{end}", (64, 64), seed))
    for given in ((whole, parts), (parts, whole)):
        merged = GraftMergeAdapters.execute(
            *given, 1.0, 1.0, method="weighted sum", rank=0, density=0.5, seed=0, model=model
        ).args[0]
        (key,) = {name.rpartition(".lora_")[0] for name in merged if ".lora_" in name}
        assert key == "lora_unet_double_blocks_0_img_attn_qkv"
        expected = differences_of(model, whole)
        (place,) = expected
        expected[place] = expected[place] + differences_of_parts(model, parts, place)
        assert_added(differences_of(model, merged), expected)


def differences_of_parts(model, parts, place):
    from graft_pack.nodes.host.model.lora import apply_adapter

    out, _ = apply_adapter(model, None, parts, 1.0, 1.0)
    return differences(out)[place]


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_files_of_two_namings_merge_where_the_names_tell_the_family(name, tmp_path):
    """kohya and diffusers name SDXL and Flux in different ways; parts of a layer have an A each."""
    from graft_pack.nodes.tools import GraftMergeAdapters

    from tests.interop import makers

    family = makers.FAMILIES[name]
    kohya = Adapter(dict(makers.train(name, "LoRA").adapter))
    published = load_adapter(str(makers.make_by_diffusers(name, tmp_path, with_metadata=False).path))
    for given in ((kohya, published), (published, kohya)):
        merged = GraftMergeAdapters.execute(*given, 0.5, 2.0, "weighted sum", 0, 0.5, 0).args[0]
        expected = {key: 0.5 * value for key, value in differences_of(family.model(), given[0]).items()}
        for key, value in differences_of(family.model(), given[1]).items():
            expected[key] = expected.get(key, 0) + 2 * value
        assert_added(differences_of(family.model(), merged), expected)


def test_layers_of_text_encoders_are_merged_and_resized_with_the_clip():
    """Their magnitudes depend on the text encoder's weights."""
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.nodes.tools import GraftMergeAdapters, GraftResizeAdapter

    model, clip = make_model("SD1"), models.text("SD1")
    place = place_of_text("self_attn.q_proj")
    width = len(dict(clip.cond_stage_model.named_parameters())[place])
    down, up, magnitude = factors(width=width)
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    dora = Adapter({**tensors, f"{name}.dora_scale": magnitude.abs()[:, None]}, {"ss_network_module": "lycoris.kohya"})
    plain = Adapter(tensors)

    def added(adapter):
        return differences(apply_adapter(model, clip, adapter, 1.0, 1.0)[1].patcher)[place]

    fields = {"method": "weighted sum", "rank": 0, "density": 0.5, "seed": 0, "model": model}
    with pytest.raises(ModelError, match="input 'clip'.*changes its layer lora_te_.*Connect the clip"):
        GraftMergeAdapters.execute(dora, plain, 0.5, 2.0, **fields)
    merged = GraftMergeAdapters.execute(dora, plain, 0.5, 2.0, **fields, clip=clip).args[0]
    expected = 0.5 * added(dora) + 2 * added(plain)
    assert (added(merged) - expected).norm() <= 1e-4 * expected.norm()
    resized = GraftResizeAdapter.execute(dora, 0, 1.0, model=model, clip=clip).args[0]
    assert (added(resized) - added(dora)).norm() <= 1e-4 * added(dora).norm()


# Embeddings


def embedding_of(tensors, tmp_path, name="word"):
    from graft_pack.trainers.formats import files
    from graft_pack.trainers.formats.embedding import load_embedding

    path = str(tmp_path / f"{name}.safetensors")
    files.write_tensors(path, tensors, {})
    return load_embedding(path, name)


def test_vectors_for_outputs_are_left_out(tmp_path):
    """OneTrainer's; ComfyUI reads no such vectors."""
    vectors = torch.randn(2, 768)
    read = embedding_of({"emb_params": vectors, "emb_params_out": torch.randn(2, 768)}, tmp_path)
    assert read.keys() == {"clip_l"} and torch.equal(read["clip_l"], vectors)


@pytest.mark.parametrize("end", ["{}", "string_to_param.*"])
def test_an_embedding_bundled_in_a_lora_is_read(end, tmp_path):
    vectors = {"clip_l": torch.randn(2, 768), "clip_g": torch.randn(2, 1280)}
    if end != "{}":
        del vectors["clip_g"]
    bundled = {f"bundle_emb.my.word.{end.format(key)}": value for key, value in vectors.items()}
    read = embedding_of({**bundled, "lora_unet_x.alpha": torch.ones(())}, tmp_path)
    assert read.keys() == vectors.keys() and all(torch.equal(read[key], vectors[key]) for key in vectors)


def test_of_several_bundled_embeddings_the_files_name_chooses(tmp_path):
    words = {name: torch.randn(1, 768) for name in ("cat", "dog")}
    bundled = {f"bundle_emb.{name}.clip_l": value for name, value in words.items()}
    assert torch.equal(embedding_of(bundled, tmp_path, "dog")["clip_l"], words["dog"])
    with pytest.raises(ModelError, match="bundles several embeddings: cat, dog"):
        embedding_of(bundled, tmp_path, "bird")


@pytest.mark.parametrize("ending", ["pt", "BIN"])
def test_embeddings_of_torch_save_are_refused_with_the_ways_around(ending, tmp_path):
    from graft_pack.trainers.formats import files
    from graft_pack.trainers.formats.embedding import load_embedding

    path = str(tmp_path / f"word.{ending}")
    torch.save({"string_to_param": {"*": torch.randn(2, 768)}}, path)
    with pytest.raises(ModelError, match="torch.save wrote.*embedding:word in a prompt.*convert"):
        load_embedding(path, "word")
    # The name alone decides nothing.
    files.write_tensors(path, {"emb_params": torch.zeros(2, 768)}, {})
    assert load_embedding(path, "word").count == 2


def test_the_help_page_converts_an_embedding_of_torch_save(tmp_path, monkeypatch):
    from graft_pack.trainers.formats.embedding import load_embedding

    from tests.support.host import ROOT

    monkeypatch.chdir(tmp_path)
    page = (ROOT / "web/docs/GraftLoadEmbedding.md").read_text(encoding="utf-8")
    code = page.partition("```\n")[2].partition("```")[0]
    vectors = torch.randn(2, 768)
    for file in ({"string_to_param": {"*": torch.nn.Parameter(vectors)}, "step": 3}, {"<word>": vectors}):
        torch.save(file, "word.pt")
        subprocess.run([sys.executable, "-c", code], check=True)
        assert torch.equal(load_embedding("word.safetensors", "word")["clip_l"], vectors)


# Files to start from


def renamed(adapter, change):
    return {change(name): value for name, value in adapter.items()}


LAYOUTS = {
    "older names of diffusers": lambda name: (
        name.replace("lora_unet_", "unet.").replace("lora_down", "lora.down").replace("lora_up", "lora.up")
    ),
    "SimpleTuner": lambda name: name.replace("lora_unet_", "lycoris_"),
    "diffusers": lambda name: name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"),
}
STARTS = [(layout, kind) for layout in LAYOUTS for kind in ("LoRA", "LoKr", "LoHa")]


@pytest.mark.parametrize("layout, kind", STARTS, ids=str)
def test_a_run_starts_from_files_of_other_namings(layout, kind, model):
    """The run's first state has the file's effect."""
    fields = {"method": kind, "targets": "linear + conv", "rank": 4, "alpha": 2.0}
    with models.in_training(model, "SD1", spread=0.2, seed=1, **fields) as training:
        made = training.plan.export(training.plan.trainables, 0).adapter
    file = Adapter(renamed(made, LAYOUTS[layout]))
    assert file.keys() != made.keys() or kind != "LoRA"
    assert_starts(model, file, made, fields)


def assert_starts(model, file, same, fields):
    """Check that a run that starts from a file exports what the file does."""
    from graft_pack.trainers.methods import METHODS

    with models.in_training(model, "SD1", **fields) as training:
        trainables, module = training.plan.trainables, training.denoiser.module
        names = training.denoiser.adapter_name, training.denoiser.published_name
        used = METHODS[fields["method"]].start(trainables, module, file, training.plan.recipe, names)
        started = training.plan.export(trainables, 0).adapter
    started = Adapter(started, {"graft_recipe": json.dumps({"method": fields["method"]})})
    assert used == set(file)
    resting = make_model("SD1")
    assert_added(differences_of(resting, started), differences_of(resting, same), 1e-4)


def test_a_run_starts_from_lokr_of_lycoris(model, tmp_path):
    oracle = oracles.lycoris(model, tmp_path / "adapter.safetensors", "lokr", factor=-1, dim=2)
    file = load_adapter(oracle.path)
    layers = {name: value for name, value in file.items() if "attn" in name}
    fields = {"method": "LoKr", "targets": "attention", "rank": 2, "alpha": 5.0}
    assert_starts(model, Adapter(layers, file.metadata), Adapter(layers, file.metadata), fields)


def test_a_start_with_biases_or_unknown_names_says_so(model):
    fields = {"method": "LoRA", "targets": "attention", "rank": 4, "alpha": 4.0}
    made = make_adapter("SD1", **fields)
    first = min(made).rpartition(".lora_")[0] or min(made).removesuffix(".alpha")
    with_bias = Adapter({**made, f"{first}.diff_b": torch.ones(32)})
    with pytest.raises(ModelError, match="changes the bias.*Graft Apply Adapter before the training node"):
        assert_starts(model, with_bias, made, fields)
    unknown = Adapter(renamed(made, lambda name: name.replace("lora_unet_", "strange_")))
    with pytest.raises(ModelError, match="names its layers in a way that Graft does not know, such as strange_"):
        assert_starts(model, unknown, made, fields)


# Reasons


@pytest.mark.parametrize(
    "key, reason",
    [
        ("lllite_unet_input_blocks_1_1_attn1_to_q.down.0.weight", "a ControlNet-LLLite.*node for ControlNet-LLLite"),
        ("base_model.model.unet.x.vera_lambda_b", "a VeRA.*Load it with peft"),
        ("lora_unet_down_blocks_0_x.oft_R.weight", "an OFT of another trainer"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
    ],
)
def test_files_of_other_kinds_are_named(key, reason, model):
    from graft_pack.nodes.adapter import GraftApplyAdapter

    with pytest.raises(ModelError, match=f"The file is {reason}"):
        GraftApplyAdapter.execute(model, Adapter({key: torch.ones(2, 2)}), 1.0, 1.0)


def test_a_run_starts_from_dora_of_lycoris(model, tmp_path):
    oracle = oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS["DoRA"])
    file = load_adapter(oracle.path)
    layers = Adapter({name: value for name, value in file.items() if "attn" in name}, file.metadata)
    assert_starts(model, layers, layers, {"method": "DoRA", "targets": "attention", "rank": 4, "alpha": 5.0})


def test_a_start_from_rotations_of_outputs_is_refused(model, tmp_path):
    file = load_adapter(oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS["OFT"]).path)
    with pytest.raises(ModelError, match="rotates the outputs of layers, as LyCORIS does, and OFT here rotates"):
        assert_starts(model, file, file, {"method": "OFT", "targets": "attention", "rank": 4, "alpha": 4.0})


# Families beside SD1


@pytest.fixture(scope="module", params=["SDXL", "SD3", "Flux"])
def family(request):
    from tests.support.published import PUBLISHED

    return oracles.Family(request.param, make_model(PUBLISHED[request.param].name))


TARGETS = ["to_q", "to_v", "add_k_proj", "norm_out.linear", "proj_out"]
FAMILY_PEFT = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoRA with biases": {"lora_bias": True},
}


def family_config(kind):
    from peft import LoraConfig

    # SDXL's queries have no bias.
    targets = ["proj_out", "proj_in", "norm_out.linear"] if kind == "LoRA with biases" else TARGETS
    return LoraConfig(r=4, lora_alpha=6, target_modules=targets, **FAMILY_PEFT[kind])


def applied_to(family, path):
    from graft_pack.nodes.host.model.lora import apply_adapter

    out, _ = apply_adapter(family.model, None, load_adapter(path), 1.0, 1.0)
    return family.output(out)


@pytest.mark.parametrize("kind", FAMILY_PEFT)
def test_peft_folders_of_a_family_act_as_in_peft(kind, family, tmp_path):
    oracle = family.peft(tmp_path, family_config(kind))
    assert oracle.error(applied_to(family, oracle.path)) <= BOUND


def single_file(family, folder, config):
    """Return the oracle of a peft folder, and its weights as a file of another name without the configuration."""
    config.lora_alpha = config.r
    oracle = family.peft(folder / "folder", config)
    path = folder / "flash.safetensors"
    path.write_bytes((folder / "folder" / "adapter_model.safetensors").read_bytes())
    return oracle, str(path)


def test_a_single_file_with_pefts_names_is_applied_where_comfyui_reads_it(family, tmp_path):
    """Some SD3 LoRAs; ComfyUI's loader takes the same scale, and the nodes say so."""
    from graft_pack.nodes.adapter import GraftApplyAdapter
    from graft_pack.nodes.tools import GraftInspectAdapter

    oracle, path = single_file(family, tmp_path, family_config("LoRA"))
    if family.name != "SD3":
        with pytest.raises(ModelError, match="adapter_config.json, which holds the alpha, is missing"):
            load_adapter(path)
        return
    assert oracle.error(applied_to(family, path)) <= BOUND
    done = GraftApplyAdapter.execute(family.model, load_adapter(path), 1.0, 0.0)
    assert "the rank counts as alpha" in done.ui["text"][0]
    assert "the rank counts as alpha" in GraftInspectAdapter.execute(load_adapter(path), family.model).args[1]


def test_a_single_file_with_other_tensors_than_factors_is_refused(tmp_path):
    from safetensors.torch import save_file

    down, up, bias = factors()
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    path = str(tmp_path / "a.safetensors")
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_B.bias": bias}, path)
    with pytest.raises(ModelError, match="adapter_config.json, which holds the alpha, is missing"):
        load_adapter(path)


def test_pefts_names_without_a_configuration_are_refused_for_models_where_comfyui_reads_none():
    from graft_pack.nodes.host.model.lora import apply_adapter

    down, up, _ = factors(width=64)
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    with pytest.raises(ModelError, match="an adapter of peft without its folder"):
        file = Adapter({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
        apply_adapter(models.patcher("Flux"), None, file, 1.0, 1.0)


FAMILY_LYCORIS = {
    "LoCon": {"algo": "lora"},
    "DoRA": {"algo": "lora", "dora_wd": True, "spread": 0.6},
    "LoKr": {"algo": "lokr", "factor": 4},
    "OFT rescaled": {"algo": "diag-oft", "rescaled": True},
    "IA3": {"algo": "ia3"},
}


@pytest.mark.parametrize("kind", FAMILY_LYCORIS)
def test_lycoris_files_of_simpletuner_act_as_in_lycoris(kind, family, tmp_path):
    oracle = family.lycoris(tmp_path / "adapter.safetensors", **FAMILY_LYCORIS[kind])
    assert oracle.error(applied_to(family, oracle.path)) <= BOUND


def with_prefix(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


TEXT_LAYOUTS = {
    "te1 on SD1": lambda made: renamed(made, lambda name: name.replace("lora_te_", "lora_te1_")),
    "diffusers without metadata": lambda made: {
        **{f"unet.{name}": value for name, value in made.native.tensors.items()},
        **{
            f"text_encoder.text_model.{name}": value for name, value in made.native.text["text_encoder"].tensors.items()
        },
    },
}


@pytest.mark.parametrize("layout", TEXT_LAYOUTS)
def test_a_run_starts_from_text_encoders_of_other_namings(layout, tmp_path):
    fields = {"rank": 2, "alpha": 2.0}
    with models.with_text("SD1", spread=0.2, **fields) as training:
        made = training.plan.export(training.plan.trainables, 0).adapter
        file = Adapter(TEXT_LAYOUTS[layout](made))
        from graft_pack.trainers.formats.convert import host_names

        assert_restarts(training, Adapter(host_names(file)), made)


def assert_restarts(training, file, same):
    """Check that trainables with other values export a file's values after they start from it."""
    from graft_pack.trainers.engine.trainable_modules import TrainableModules
    from graft_pack.trainers.methods import METHODS

    models.scatter(training.plan.trainables, 0.1, seed=5)
    TrainableModules(METHODS["LoRA"], training.plan.recipe, training.host).start(training.plan.trainables, file)
    started = training.plan.export(training.plan.trainables, 0).adapter
    assert started.keys() == same.keys()
    for name, value in same.items():
        assert models.distance(started[name], value) <= 1e-5, name


@pytest.mark.parametrize("layout", ["diffusers", "the model's own"])
def test_a_run_starts_from_flux_files_without_metadata(layout, tmp_path):
    """ai-toolkit writes both: diffusers' layers, whose parts share A here, and the checkpoint's."""
    from graft_pack.trainers.formats.peft_format import diffusers_form

    name = "Flux as in diffusers"
    with models.in_training(make_model(name), name, spread=0.2, rank=2, alpha=2.0) as training:
        made = training.plan.export(training.plan.trainables, 0).adapter
        if layout == "diffusers":
            file = {f"transformer.{key}": value for key, value in diffusers_form(made.native).tensors.items()}
        else:
            file = {f"diffusion_model.{key}": value for key, value in made.native.tensors.items()}
        assert_restarts(training, Adapter(file), made)


def test_a_start_without_pefts_configuration_is_refused(model):
    """A job's copy of a folder's weights has no configuration beside it, so its scale is unknown."""
    fields = {"method": "LoRA", "targets": "attention", "rank": 4, "alpha": 4.0}
    made = make_adapter("SD1", **fields)
    file = Adapter(with_prefix("base_model.model.", made.native.tensors))
    with pytest.raises(ModelError, match="has peft's names, but no configuration"):
        assert_starts(model, file, made, fields)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"use_qalora": True}, "sets use_qalora"),
        ({"kasa_config": {"r": 2}}, "sets kasa_config"),
        ({"modules_to_save": ["conv_in"]}, "has the tensor conv_in.weight, which peft adds to no layer"),
    ],
    ids=["QALoRA", "KaSA", "whole modules"],
)
def test_variants_of_peft_that_graft_does_not_compute_are_refused(change, named, model, tmp_path):
    from safetensors.torch import load_file, save_file

    oracle = oracles.peft(model, tmp_path, lora_config())
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    if "modules_to_save" in change:
        save_file({**load_file(oracle.path), "base_model.model.conv_in.weight": torch.ones(2)}, oracle.path)
    with pytest.raises(ModelError, match=f"{named}.*Load it with peft itself"):
        load_adapter(oracle.path)


def test_the_layers_of_a_folder_that_needs_the_weights_are_inspected(model, tmp_path):
    from graft_pack.nodes.tools import GraftInspectAdapter

    oracle = oracles.peft(model, tmp_path, PEFT["DoRA"]())
    report = GraftInspectAdapter.execute(load_adapter(oracle.path), model).args[1]
    assert "Type: DoRA (56 layers); trained as DoRA" in report
    assert "Rank: 4" in report and "Fits the connected model (SD15): 56 of 56 keys" in report
    assert "56 layers need the model's weights for their norm" in report


def test_inspection_computes_no_start_values(model, tmp_path, monkeypatch):
    """They need an SVD of each layer."""
    from graft_pack.nodes.tools import GraftInspectAdapter
    from graft_pack.trainers.tools import peft_weight

    adapter = load_adapter(oracles.peft(model, tmp_path, PEFT["PiSSA"]()).path)
    monkeypatch.delattr(peft_weight, "_injected")
    report = GraftInspectAdapter.execute(adapter, model).args[1]
    assert "Fits the connected model (SD15): 56 of 56 keys" in report


def test_a_pattern_for_inputs_is_compiled_once_for_all_layers(monkeypatch):
    from graft_pack.trainers import regex
    from graft_pack.trainers.tools.relative import own_changes

    compiled, own = [], regex.Patterns._compile
    monkeypatch.setattr(regex.Patterns, "_compile", lambda *given: compiled.append(given) or own(*given))
    config = {"peft_type": "IA3", "feedforward_modules": r".*\.ff\.net\.2"}
    names = [f"mid_block.{number}.{end}" for number in range(50) for end in ("ff.net.2", "to_k")]
    native = PeftAdapter("IA3", config, {f"{name}.ia3_l": torch.ones(8) for name in names}, True, {})
    changes = own_changes(Adapter({}, {}, native))
    assert len(compiled) == 1 and len(changes) == 100
    assert all((change.bias is None) == name.endswith("ff_net_2") for name, change in changes.items())


@pytest.mark.parametrize("maker", ["LyCORIS", "peft"])
def test_factors_on_a_weight_that_is_no_matrix_are_refused(maker, resting):
    from graft_pack.nodes.host.model.lora import apply_adapter

    layer = "down_blocks.0.attentions.0.norm"
    if maker == "peft":
        native = PeftAdapter("IA3", {"peft_type": "IA3"}, {f"{layer}.ia3_l": torch.ones(32)}, True, {})
        adapter = Adapter({}, {}, native)
    else:
        name = "lora_unet_" + layer.replace(".", "_")
        adapter = Adapter({f"{name}.weight": torch.ones(32), f"{name}.on_input": torch.ones(())})
    with pytest.raises(ModelError, match=r"32 factors, the layer \[32\]"):
        apply_adapter(resting, None, adapter, 1.0, 1.0)


def test_control_loras_of_flux_keep_their_names():
    """ComfyUI converts them by itself, biases included."""
    from graft_pack.trainers.formats.convert import host_names

    names = ["img_in.lora_A.weight", "img_in.lora_B.bias", "single_blocks.0.norm.key_norm.scale"]
    assert list(host_names(dict.fromkeys(names, torch.ones(1)))) == names


def test_a_run_starts_from_ia3_of_lycoris_where_both_train_the_same(model, tmp_path):
    """Queries, keys and values have no bias here, and both have factors of outputs there."""
    file = load_adapter(oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS["IA3"]).path)
    fields = {"method": "IA3", "targets": "patterns", "rank": 4, "alpha": 4.0}
    plain = Adapter({name: value for name, value in file.items() if "_to_k" in name or "_to_v" in name}, file.metadata)
    assert_starts(model, plain, plain, {**fields, "target_patterns": (r"to_[kv]$",)})
    biased = Adapter({name: value for name, value in file.items() if "_to_out" in name}, file.metadata)
    with pytest.raises(ModelError, match="factors of outputs without the bias.*Graft Apply Adapter before"):
        assert_starts(model, biased, biased, {**fields, "target_patterns": (r"to_out\.0$",)})


@pytest.mark.parametrize("kind", ["IA3", "DoRA"])
def test_merging_with_another_model_is_refused_by_name(kind, model, tmp_path):
    from graft_pack.nodes.tools import GraftResizeAdapter

    file = load_adapter(oracles.lycoris(model, tmp_path / "adapter.safetensors", **LYCORIS[kind]).path)
    for name in ("Flux", "SDXL"):
        with pytest.raises(ModelError, match="input 'model'.*does not fit the adapter.*that layer (is missing|has)"):
            GraftResizeAdapter.execute(file, 4, 1.0, model=make_model(name))
