"""What every adapter type has to hold, on every kind of layer it is offered on."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from graft_pack.trainers.methods import METHODS

from tests.support import diffusers_host, models

pytestmark = pytest.mark.usefixtures("comfy")

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
SIGMA = 2.0
LARGE = {"steps": 3, "batch_size": 2, "rank": 4, "alpha": 4.0}
# Steps of these move a layer by much less or much more than those of a LoRA.
RATES = {"IA3": 0.1, "OFT": 0.05, "BOFT": 0.1, "LoKr": 0.05, "PiSSA": 5e-3, "DoRA": 1e-2}

POINTS = {"targets": "patterns", "target_patterns": (r"proj_(in|out)$",)}
LINEARS = {"targets": "all linear"}
ALL = {"targets": "linear + conv"}
CASES = {
    "LoRA": LINEARS,
    "LoRA with conv": ALL,
    "DoRA": LINEARS,
    "DoRA conv": ALL,
    "rsLoRA": LINEARS,
    "rsLoRA conv": ALL,
    "PiSSA": LINEARS,
    "LoHa": LINEARS,
    "LoHa conv": ALL,
    "LoKr": LINEARS,
    "LoKr conv": ALL,
    "OFT": LINEARS,
    "OFT conv": POINTS,
    "BOFT": LINEARS,
    "IA3": LINEARS,
}


def type_of(case):
    return case if case in METHODS else case.removesuffix(" conv")


def fields_of(case, **more):
    """The recipe's fields of a case."""
    return {**LARGE, **CASES[case], "method": type_of(case), **more}


@dataclass(frozen=True, repr=False)
class Trained:
    """One short training.

    Attributes:
        start, output: the raw output in training before the first step and after the last.
        untouched: whether the weights of the graph's model are the same to the bit afterwards.
    """

    recipe: Any
    adapter: Adapter
    trainables: dict
    start: torch.Tensor
    output: torch.Tensor
    untouched: bool


def raw(denoised):
    return (X - denoised) / SIGMA


def output_of(model):
    return raw(models.denoised(model, X, SIGMA, models.conditioning("SD1", 9)))


def trained_output(training):
    return raw(models.trained_denoised(training, X, SIGMA, models.conditioning("SD1", 9)))


def weights(model):
    """As they are without anything applied: the models that wait on one share its weights."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


@pytest.fixture(scope="module")
def model(comfy):
    """The tiny SD1 that all types are trained on: each leaves it as it was, or the next one's tests fail."""
    with torch.inference_mode():
        return models.patcher("SD1")


@pytest.fixture(scope="module")
def base(model):
    """Its raw output."""
    return output_of(model)


def train(model, case, folder, **more):
    """A few large steps."""
    before = weights(model)
    rate = RATES.get(type_of(case), 2e-2)
    with models.in_training(model, "SD1", **fields_of(case, learning_rate=rate, **more)) as training:
        start = trained_output(training)
        state = models.train(training, folder)
        output = trained_output(training)
        adapter = training.plan.export(state.trainables, 0).adapter
        recipe = training.plan.recipe
    after = weights(model)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return Trained(recipe, adapter, state.trainables, start, output, same)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def done(case, model, base, tmp_path_factory):
    """The case's training, made once for all tests."""
    return train(model, case, tmp_path_factory.mktemp("run"))


def assert_applied(output, done, base):
    """DESIGN's bar: off by at most a thousandth of the effect."""
    assert float((output - done.output).norm() / (done.output - base).norm()) <= 1e-3


def test_it_starts_without_effect_and_steps_have_one(done, base):
    assert models.distance(done.start, base) <= 1e-6
    assert models.distance(done.output, base) >= 1e-2


def test_the_graphs_weights_stay_as_they_were(done, model, base):
    assert done.untouched
    assert torch.equal(output_of(model), base)


def test_what_the_host_loads_from_the_file_is_what_was_trained(case, done, model, base, comfy):
    from graft_pack.nodes.host.adapters import unread_keys

    import nodes

    path = comfy.base / "models" / "loras" / f"{case}.safetensors"
    save_adapter(str(path), done.adapter, case)
    assert unread_keys(model, None, done.adapter) == []
    applied, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    assert_applied(output_of(applied), done, base)


def test_strength_zero_is_the_base(done, model, base):
    from graft_pack.nodes.host.adapters import apply_adapter

    applied, _ = apply_adapter(model, None, done.adapter, 0.0, 0.0)
    assert torch.equal(output_of(applied), base)


def test_half_the_strength_is_half_the_difference(done, model):
    """Of the weights: the host's patches are linear in the strength, those of a magnitude too."""
    from graft_pack.nodes.host.adapters import apply_adapter

    held = []
    for strength in (0.5, 1.0):
        applied, _ = apply_adapter(model, None, done.adapter, strength, 0.0)
        held.append(merged(applied))
    before = weights(model)
    half, whole = (models.joined(one[name] - before[name] for name in sorted(before)) for one in held)
    assert models.distance(2 * half, whole) <= 1e-4


def merged(applied):
    """The weights with the patches worked in, as core's CheckpointSave writes them."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([applied], force_patch_weights=True)
        found = {name: tensor.clone() for name, tensor in applied.model.state_dict().items()}
        applied.unpatch_model(applied.offload_device)
    return found


def test_merged_is_what_is_applied(done, model, base):
    from graft_pack.nodes.host.adapters import apply_adapter

    applied, _ = apply_adapter(model, None, done.adapter, 1.0, 0.0)
    found = merged(applied)
    with torch.inference_mode():
        whole = models.patcher("SD1", seed=1)
        whole.model.load_state_dict(found)
    assert_applied(output_of(whole), done, base)
    assert torch.equal(output_of(model), base)


@pytest.fixture(scope="module")
def unet(model):
    """The same network as diffusers publishes it, as a factory: loading an adapter changes it."""
    return lambda: diffusers_host.convert_sd1(model)


def diffusers_output(network):
    return diffusers_host.raw_output(network, X, SIGMA, models.conditioning("SD1", 9))


def test_peft_loads_the_folder_onto_the_model_as_published(case, done, base, unet, tmp_path):
    from peft import PeftModel

    folder = tmp_path / "adapter"
    save_adapter(str(folder / "adapter_model.safetensors"), done.adapter, case, "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    network = unet()
    with warnings.catch_warnings():
        # A key that finds no place is a warning of peft's.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`|.*CUDA extension|Setting boft_n")
        loaded = PeftModel.from_pretrained(network, str(folder))
    assert_applied(diffusers_output(loaded.base_model.model), done, base)


def test_diffusers_loads_the_types_it_knows_and_the_others_are_refused(case, done, base, unet, tmp_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    path = tmp_path / "adapter.safetensors"
    if done.adapter.native.config["peft_type"] != "LORA":
        with pytest.raises(ModelError, match=f"does not know the adapter type {type_of(case)}"):
            save_adapter(str(path), done.adapter, case, "diffusers")
        assert not path.exists()
        return
    save_adapter(str(path), done.adapter, case, "diffusers")
    network = unet()
    pipe = StableDiffusionPipeline(
        None, None, None, network, DDPMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(path))
    assert_applied(diffusers_output(network), done, base)


def test_a_peft_folder_comes_back_in_the_hosts_names(case, done, model, base, tmp_path):
    from graft_pack.nodes.host.adapters import apply_adapter

    path = str(tmp_path / "adapter" / "adapter_model.safetensors")
    save_adapter(path, done.adapter, case, "peft")
    back = load_adapter(path)
    assert torch.equal(joined(back.native.tensors), joined(done.adapter.native.tensors))
    if type_of(case) in ("DoRA", "OFT", "BOFT", "IA3"):
        assert not back
        return
    applied, _ = apply_adapter(model, None, back, 1.0, 0.0)
    assert_applied(output_of(applied), done, base)


def joined(tensors):
    return models.joined(tensors[name] for name in sorted(tensors))
