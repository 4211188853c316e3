"""Tests that a run starts with the effect of an applied file, or says why it cannot and what to do."""

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats.adapter import Adapter, load_adapter

from tests.interop import oracles
from tests.interop.test_reading import LYCORIS, lora_config, other_config
from tests.support import models
from tests.support.adapters import make_adapter, make_model

pytestmark = pytest.mark.usefixtures("comfy")

# Bound of the error relative to the adapter's effect.
BOUND = 3e-4
BEFORE = "Apply it with Graft Apply Adapter before the training node"


@pytest.fixture(scope="module")
def sd1(comfy):
    return oracles.Family("SD1", make_model("SD1"))


@pytest.fixture(scope="module", params=["SD3", "Flux"])
def transformer(request):
    return family_of(request.param)


def family_of(name):
    from tests.support.published import PUBLISHED

    return oracles.Family(name, make_model(PUBLISHED[name].name))


def size_of(name):
    from tests.support.published import PUBLISHED

    return name if name == "SD1" else PUBLISHED[name].name


def start(name, file, **fields):
    """Return (a run's output after it starts from a file, the warnings for the page)."""
    from graft_pack.trainers.engine.trainable_modules import TrainableModules
    from graft_pack.trainers.methods import METHODS

    size, warnings = size_of(name), []
    fields = {"method": "LoRA", "rank": 4, "alpha": 4.0, "targets": "patterns", **fields}

    def report(event, payload):
        if event == "adapter warnings":
            warnings.extend(payload["warnings"])

    with models.in_training(make_model(size), size, report=report, **fields) as training:
        modules = TrainableModules(METHODS[fields["method"]], training.plan.recipe, training.host)
        modules.start(training.plan.trainables, file)
        x, sigma, conditioning = point(size)
        return (x - models.trained_denoised(training, x, sigma, conditioning)) / sigma, warnings


def point(size):
    x = torch.randn(1, *models.SIZES[size].latent, generator=torch.Generator().manual_seed(9))
    return x, 0.6, models.conditioning(size, 9)


def assert_starts(name, file, **fields):
    """Check that a run starts with the effect of the file, as the node applies it. Return the warnings."""
    from graft_pack.nodes.host.model.lora import apply_adapter

    def output_of(model):
        x, sigma, conditioning = point(size_of(name))
        return (x - models.denoised(model, x, sigma, conditioning)) / sigma

    output, warnings = start(name, file, **fields)
    base = output_of(make_model(size_of(name)))
    applied = output_of(apply_adapter(make_model(size_of(name)), None, file, 1.0, 0.0)[0])
    effect = (applied - base).norm()
    assert effect >= 1e-3 * base.norm()
    assert (output - applied).norm() <= BOUND * effect
    return warnings


def only(file, *parts):
    """Return the layers of a file whose names contain one of the parts."""
    return Adapter({name: value for name, value in file.items() if any(part in name for part in parts)}, file.metadata)


# Parts of a layer, with an A each

QKV = {"SD3": r"x_block\.attn\.qkv", "Flux": r"img_attn\.qkv"}


def attention(**fields):
    from peft import LoraConfig

    blocks = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    return LoraConfig(r=4, lora_alpha=6, target_modules=blocks, **fields)


def patterns(name):
    return ("x_block.attn", "context_block.attn") if name == "SD3" else (r"double_blocks.*attn\.(qkv|proj)",)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_parts_with_an_a_each_are_joined(kind, transformer, tmp_path):
    oracle = transformer.peft(tmp_path, attention(use_dora=kind == "DoRA"))
    file = load_adapter(oracle.path)
    fields = {"method": kind, "target_patterns": patterns(transformer.name)}
    assert assert_starts(transformer.name, file, rank=12, **fields) == []
    with pytest.raises(ModelError, match=r"has rank 12 in .*, but this run has rank 8.*Use the rank"):
        start(transformer.name, file, rank=8, **fields)


def test_some_parts_of_a_layer_are_joined(transformer, tmp_path):
    from peft import LoraConfig

    oracle = transformer.peft(tmp_path, LoraConfig(r=4, lora_alpha=6, target_modules=r"transformer_blocks.*to_[qv]"))
    fields = {"target_patterns": (QKV[transformer.name],), "rank": 8}
    if transformer.name == "SD3":
        fields["target_patterns"] = (r"x_block\.attn2?\.qkv",)
    assert_starts(transformer.name, load_adapter(oracle.path), **fields)


def test_parts_of_simpletuner_are_joined_or_refused(transformer, tmp_path):
    fields = {"rank": 12, "target_patterns": patterns(transformer.name)}
    for kind in ("LoCon", "DoRA", "LoKr"):
        oracle = transformer.lycoris(tmp_path / "a.safetensors", **LYCORIS[kind])
        file = only(load_adapter(oracle.path), "lycoris_transformer_blocks")
        method = {"LoCon": "LoRA"}.get(kind, kind)
        if kind == "LoKr":
            with pytest.raises(ModelError, match=f"separate parts for .*qkv.*{BEFORE}"):
                start(transformer.name, file, method=method, **fields)
        else:
            file["strange"] = torch.ones(1)
            (warning,) = assert_starts(transformer.name, file, method=method, **fields)
            assert (warning["kind"], warning["names"]) == ("unread", "strange")


def test_a_single_file_of_sd3_with_pefts_names_starts_as_it_is_applied(tmp_path):
    """Its rank counts as alpha, as in ComfyUI; the page says so."""
    family = family_of("SD3")
    family.peft(tmp_path / "folder", attention())
    path = tmp_path / "flash.safetensors"
    path.write_bytes((tmp_path / "folder" / "adapter_model.safetensors").read_bytes())
    (warning,) = assert_starts("SD3", load_adapter(str(path)), rank=12, target_patterns=patterns("SD3"))
    assert warning["kind"] == "alpha" and "the rank counts as alpha" in warning["text"]


# Other forms of a type


LAYERS = {
    "down_blocks_0_resnets_0_conv1": r"input_blocks\.1\.0\.in_layers\.2",
    "down_blocks_0_attentions_0_proj_in": r"input_blocks\.1\.1\.proj_in",
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": r"input_blocks\.1\.1.*attn1\.to_q",
}
ON_LAYERS = {"target_patterns": tuple(LAYERS.values())}
FORMS = {
    "LoCon Tucker": (LYCORIS["LoCon Tucker"], {"method": "LoRA with conv"}),
    "LoCon, larger rank": (LYCORIS["LoCon"], {"method": "LoRA with conv", "rank": 6}),
    "LoHa Tucker": (LYCORIS["LoHa Tucker"], {"method": "LoHa"}),
    "LoKr Tucker": ({"algo": "lokr", "use_tucker": True, "dim": 2}, {"method": "LoKr", "rank": 2}),
    "LoKr both": ({"algo": "lokr", "decompose_both": True, "dim": 1}, {"method": "LoKr", "rank": 1}),
}


def layers_of(path):
    return only(load_adapter(path), *LAYERS)


@pytest.mark.parametrize("kind", FORMS)
def test_a_run_starts_from_other_forms_of_its_type(kind, sd1, tmp_path):
    made, fields = FORMS[kind]
    oracle = oracles.lycoris(sd1.model, tmp_path / "a.safetensors", **made)
    assert_starts("SD1", layers_of(oracle.path), **ON_LAYERS, **fields)


PLACES = ("down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
LINEAR = {"target_patterns": (r"input_blocks\.1\.1.*attn1\.to_[qkv]",)}
ROTATED = {"targets": [r"down_blocks\.0\.attentions\.0.*attn1\.to_[qkv]"], "r": 0, "oft_block_size": 4}
PEFT = {
    "LoHa effective": ("LoHa", {"r": 4, "alpha": 6, "use_effective_conv2d": True}, {}),
    "LoKr both": ("LoKr", {"r": 1, "alpha": 6, "decompose_both": True}, {"rank": 1}),
    "LoKr effective": ("LoKr", {"r": 2, "alpha": 6, "use_effective_conv2d": True}, {"rank": 2}),
    "OFT": ("OFT", {**ROTATED, "use_cayley_neumann": False}, LINEAR),
    "OFT shared": ("OFT", {**ROTATED, "use_cayley_neumann": False, "block_share": True}, LINEAR),
    "OFT constraint": ("OFT", {**ROTATED, "use_cayley_neumann": False, "coft": True, "eps": 0.1}, LINEAR),
    "BOFT": ("BOFT", {"targets": ROTATED["targets"], "boft_block_size": 4}, LINEAR),
    "rsLoRA": ("Lora", {"r": 4, "lora_alpha": 6, "use_rslora": True}, {"method": "rsLoRA"}),
}


def folder(kind, config, model, tmp_path, spread=0.1):
    fields = {"targets": PLACES, **config}
    targets = fields.pop("targets")
    config = other_config(kind, (), **fields)
    config.target_modules = targets[0] if isinstance(targets, list) else list(targets)
    return load_adapter(oracles.peft(model, tmp_path, config, spread).path)


@pytest.mark.parametrize("kind", PEFT)
def test_a_run_starts_from_other_forms_of_peft(kind, sd1, tmp_path):
    made, config, fields = PEFT[kind]
    on = {"target_patterns": (ON_LAYERS["target_patterns"][0], ON_LAYERS["target_patterns"][2])}
    assert_starts("SD1", folder(made, config, sd1.model, tmp_path), **{**on, "method": made, **fields})


def test_rotations_by_a_series_start_where_it_is_exact_enough(sd1, tmp_path):
    """peft approximates the rotations by default; this run computes them exactly."""
    config, fields = {**ROTATED, "use_cayley_neumann": True}, {"method": "OFT", **LINEAR}
    assert_starts("SD1", folder("OFT", config, sd1.model, tmp_path / "small", 0.02), **fields)
    large = folder("OFT", config, sd1.model, tmp_path / "large", 0.3)
    with pytest.raises(ModelError, match=f"by a series of 5 terms.*exact ones of this run differ.*{BEFORE}"):
        start("SD1", large, **fields)


# What no run can start from


REFUSED = {
    "GLoRA": ("LoRA", "has the tensors a1.weight.*LoRA does not train"),
    "LoHa DoRA": ("LoHa", "has the tensors dora_scale, hada_w1_a"),
    "full": ("LoRA", "has the tensors diff"),
    "OFT": ("OFT", "rotates the outputs of layers, as LyCORIS does"),
    "BOFT": ("BOFT", "rotates the outputs of layers, as LyCORIS does"),
    "DoRA by input": ("DoRA", "has the tensors dora_scale, lora_down"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_with_the_reason_and_the_cure(kind, sd1, tmp_path):
    method, reason = REFUSED[kind]
    file = layers_of(oracles.lycoris(sd1.model, tmp_path / "a.safetensors", **LYCORIS[kind]).path)
    fields = {"target_patterns": (LAYERS["down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"],)}
    with pytest.raises(ModelError, match=f"{reason}.*(A|a)pply it with Graft Apply Adapter before") as caught:
        start("SD1", file, method=method, **fields)
    assert ("Graft Resize Adapter and its model" in str(caught.value)) == ("OFT" not in kind)


def test_a_file_of_another_type_that_this_node_has_is_named(sd1, tmp_path):
    file = layers_of(oracles.lycoris(sd1.model, tmp_path / "a.safetensors", **LYCORIS["LoHa"]).path)
    with pytest.raises(ModelError, match="which LoRA with conv does not train. Choose the type LoHa. Or apply it"):
        start("SD1", file, method="LoRA with conv", **ON_LAYERS)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_start_values_of_the_weights_are_turned_into_a_lora_first(init, sd1, tmp_path):
    from graft_pack.nodes.tools import GraftResizeAdapter

    file = load_adapter(oracles.peft(sd1.model, tmp_path, lora_config(init_lora_weights=init)).path)
    with pytest.raises(ModelError, match=f"init_lora_weights is '{init}'.*Graft Resize Adapter and the model"):
        start("SD1", file, targets="attention")
    lora = GraftResizeAdapter.execute(file, 0, 1.0, model=make_model("SD1")).args[0]
    assert_starts("SD1", lora, rank=8, targets="attention")


# Keys of no layer


def test_few_unknown_keys_are_named_and_more_than_a_tenth_is_an_error():
    adapter = make_adapter("SD1")
    few = {f"lora_unet_nowhere_{n}.alpha": torch.ones(()) for n in range(len(adapter) // 10)}
    few["strange"] = few.pop("lora_unet_nowhere_0.alpha")
    (warning,) = assert_starts("SD1", Adapter({**adapter, **few}), targets="attention")
    count = {"count": len(few), "total": len(adapter) + len(few)}
    assert warning["kind"] == "unread" and warning.items() >= count.items()
    assert warning["names"].startswith("lora_unet_nowhere_1")
    many = {f"lora_unet_nowhere_{n}.alpha": torch.ones(()) for n in range(len(adapter) // 8)}
    with pytest.raises(ModelError, match=r"does not fit the model: \d+ keys of \d+ fit no layer.*Inspect Adapter"):
        start("SD1", Adapter({**adapter, **many}), targets="attention")


@pytest.mark.parametrize("other", ["mid_block_attentions_0_proj_in", "conv_in"])
def test_layers_that_the_run_does_not_train_are_no_unknown_keys(other):
    file = Adapter({**make_adapter("SD1"), f"lora_unet_{other}.alpha": torch.ones(())})
    with pytest.raises(ModelError, match=f"layers that this run does not train, such as lora_unet_{other}"):
        start("SD1", file, targets="attention")
