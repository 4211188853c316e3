"""Tests that applying the saved adapter gives the trained weights, and that the graph's own MODEL stays unchanged."""

import logging

import pytest
import torch
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

# Levels of noise predictors; flow models know levels up to 1.
SIGMA = {"SD1": 2.0, "SDXL": 2.0}
SIGMA_FLOW = 0.6
LARGE = {"steps": 6, "learning_rate": 2e-2, "batch_size": 2}


class Stop(Exception):
    """The exception that interrupts training in a test."""


def make_model(name):
    with torch.inference_mode():
        return models.patcher(name)


def probe(name):
    """Return x, sigma and conditioning of a prediction to compare."""
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(9))
    return x, SIGMA.get(name, SIGMA_FLOW), models.conditioning(name, 9)


def raw(denoised, point):
    """Return the network's output from an x0, for eps and flow alike."""
    x, sigma, _ = point
    return (x - denoised) / sigma


def trained(model, name, folder, **fields):
    """Return (adapter, raw output in training) after a few large steps."""
    with models.in_training(model, name, **LARGE) as training:
        state = models.train(training, folder, **fields)
        output = raw(models.trained_denoised(training, *probe(name)), probe(name))
        return Adapter(training.plan.export(state.trainables, 0).adapter), output


def saved(comfy, adapter, name):
    """Save the adapter among ComfyUI's LoRAs and return its path."""
    path = comfy.base / "models" / "loras" / f"applied-{name}.safetensors"
    save_adapter(str(path), adapter, name)
    return path


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_core_applies_what_was_trained(name, comfy, tmp_path, caplog):
    import nodes

    model = make_model(name)
    before = raw(models.denoised(model, *probe(name)), probe(name))
    adapter, output = trained(model, name, tmp_path)
    path = saved(comfy, adapter, name)
    caplog.set_level(logging.WARNING)
    applied_model, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text.lower()
    applied = raw(models.denoised(applied_model, *probe(name)), probe(name))
    assert (applied - output).norm() <= 1e-3 * (output - before).norm()
    assert (output - before).norm() >= 1e-2 * before.norm()


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_no_key_is_left_unread(name, tmp_path):
    from graft_pack.nodes.host.model.lora import unread_keys

    model = make_model(name)
    adapter, _ = trained(model, name, tmp_path, steps=1)
    assert unread_keys(model, None, adapter) == []
    assert unread_keys(model, None, {**adapter, "lora_unet_nowhere.lora_up.weight": torch.zeros(1)}) == [
        "lora_unet_nowhere.lora_up.weight"
    ]


@pytest.mark.parametrize("alpha", [1.0, 4.0, 16.0])
def test_alpha_is_in_the_file(alpha, tmp_path):
    """Without alpha, or with another one, the file would be applied at another strength."""
    import comfy.sd

    model = make_model("SD1")
    with models.in_training(model, "SD1", spread=0.1, alpha=alpha) as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
        output = models.trained_denoised(training, *probe("SD1"))
    applied_model, _ = comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0.0)
    assert models.distance(models.denoised(applied_model, *probe("SD1")), output) <= 1e-5


def test_the_same_file_in_diffusers(comfy, tmp_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    from tests.support import diffusers_host

    model = make_model("SD1")
    adapter, output = trained(model, "SD1", tmp_path)
    unet = diffusers_host.convert_sd1(model)
    before = diffusers_host.raw_output(unet, *probe("SD1"))
    assert models.distance(before, raw(models.denoised(model, *probe("SD1")), probe("SD1"))) <= 1e-5
    pipe = StableDiffusionPipeline(None, None, None, unet, DDPMScheduler(), None, None, requires_safety_checker=False)
    pipe.load_lora_weights(str(saved(comfy, adapter, "diffusers")))
    applied = diffusers_host.raw_output(unet, *probe("SD1"))
    assert (applied - output).norm() <= 1e-3 * (output - before).norm()


# diffusers' pipelines, which hold only a network here.
PIPELINES = {
    "SD3": lambda kinds, network: kinds.StableDiffusion3Pipeline(network, *[None] * 8),
    "Flux": lambda kinds, network: kinds.FluxPipeline(*[None] * 6, network),
}


@pytest.mark.parametrize("format", ["diffusers", "peft"])
@pytest.mark.parametrize("family", PIPELINES)
def test_a_transformers_file_in_diffusers_pipeline_and_back(family, format, tmp_path):
    """On every Linear layer: some are several in diffusers, some have their rows reordered."""
    import diffusers
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys
    from graft_pack.trainers.engine.trainable_modules import TrainableModules
    from graft_pack.trainers.methods import METHODS
    from peft import PeftModel

    from tests.support.published import PUBLISHED

    published = PUBLISHED[family]
    model = models.patcher(published.name)
    network, _ = published.network(model)
    x, sigma, one = probe(published.name)
    point = network, x, torch.tensor([sigma]), [one]
    path = str(tmp_path / "a" / "adapter_model.safetensors")
    fields = {"targets": "all linear", "block_ranks": ((r"blocks\.1\.", 2),), "alpha": 2.0}
    with models.in_training(model, published.name, spread=0.1, **fields) as training, torch.no_grad():
        adapter = training.plan.export(training.plan.trainables, 0).adapter
        output = training.denoiser.predict(*point[1:])
        before = published.run(*point)
        save_adapter(path, adapter, family, format)
        if format == "diffusers":
            PIPELINES[family](diffusers, network).load_lora_weights(path)
        else:
            PeftModel.from_pretrained(network, str(tmp_path / "a"))
        assert (published.run(*point) - output).norm() <= 1e-3 * (output - before).norm()
        assert (output - before).norm() >= 1e-2 * before.norm()
        back = load_adapter(path)
        assert unread_keys(model, None, back) == []
        # Start from other values, then load the file's.
        models.scatter(training.plan.trainables, 0.1, seed=5)
        parts = TrainableModules(METHODS["LoRA"], training.plan.recipe, training.host)
        parts.start(training.plan.trainables, back)
        assert models.distance(training.denoiser.predict(*point[1:]), output) <= 1e-5
    applied, _ = apply_adapter(model, None, back, 1.0, 0.0)
    assert models.distance(raw(models.denoised(applied, x, sigma, one), (x, sigma, one)), output) <= 1e-4


def test_a_transformers_file_of_diffusers_own_training_needs_the_rank_of_all_parts(tmp_path):
    """In diffusers q, k and v have an A each. Our joint layer expresses that only with the sum of their ranks."""
    from graft_pack.trainers.engine.trainable_modules import TrainableModules
    from graft_pack.trainers.errors import ModelError
    from graft_pack.trainers.methods import METHODS

    with models.in_training(make_model("SD3"), "SD3", spread=0.1) as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
        path = str(tmp_path / "a.safetensors")
        save_adapter(path, adapter, "a", "diffusers")
        back = load_adapter(path)
        back.native.tensors["transformer_blocks.0.attn.to_k.lora_A.weight"] += 1
        parts = TrainableModules(METHODS["LoRA"], training.plan.recipe, training.host)
        words = r"has rank 12 in joint_blocks\.0\.x_block\.attn\.qkv, but this run has rank 4"
        with pytest.raises(ModelError, match=words):
            parts.start(training.plan.trainables, back)


def test_a_flux_single_block_is_cut_by_diffusers_as_the_host_has_it():
    from diffusers import FluxPipeline

    widths = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    name = "lora_unet_single_blocks_0_linear1"
    down, up = torch.randn(2, 3072), torch.randn(sum(widths.values()), 2)
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    found = FluxPipeline.lora_state_dict(file)
    for part, expected in zip(widths, up.split(list(widths.values())), strict=True):
        path = f"transformer.single_transformer_blocks.0.{part}"
        assert torch.allclose(found[f"{path}.lora_B.weight"] @ found[f"{path}.lora_A.weight"], expected @ down)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_strength_zero_and_learning_rate_zero_change_nothing(name, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter

    model = make_model(name)
    before = models.denoised(model, *probe(name))
    adapter, _ = trained(model, name, tmp_path / "large")
    unmoved, _ = trained(model, name, tmp_path / "zero", learning_rate=0.0)
    for values, strength in ((adapter, 0.0), (unmoved, 1.0)):
        applied, _ = apply_adapter(model, None, values, strength, strength)
        assert torch.equal(models.denoised(applied, *probe(name)), before)


def test_learning_rate_zero_moves_no_trainable(tmp_path):
    with models.in_training(make_model("SD1"), "SD1", spread=0.1, **LARGE) as training:
        before = models.joined(training.plan.trainables.values())
        models.train(training, tmp_path, learning_rate=0.0, weight_decay=0.1)
        assert torch.equal(models.joined(training.plan.trainables.values()), before)


def test_an_adapter_of_another_family_is_refused(tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.trainers.errors import ModelError

    adapter, _ = trained(make_model("Flux"), "Flux", tmp_path, steps=1)
    with pytest.raises(ModelError, match="fits no layer"):
        apply_adapter(make_model("SD1"), None, adapter, 1.0, 1.0)


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path):
    adapter, _ = trained(make_model("SD1"), "SD1", tmp_path, steps=1)
    save_adapter(str(tmp_path / "a.safetensors"), adapter, "a")
    back = load_adapter(str(tmp_path / "a.safetensors"))
    assert back.keys() == adapter.keys()
    assert all(torch.equal(back[key], adapter[key]) for key in adapter)
    assert back.metadata["modelspec.title"] == "a"


def snapshot(module):
    """Return everything visible that could change in a module tree, except the identity of the weights."""
    return {
        "keys": list(module.state_dict()),
        "classes": [type(part) for part in module.modules()],
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
        "own": [sorted(set(vars(part)) - {"_forward_hooks"}) for part in module.modules()],
        "gradients": [parameter.requires_grad for parameter in module.parameters()],
    }


def modes():
    """Return the modes and switches of torch that code could leave behind."""
    stacks = len(_get_current_function_mode_stack()), len(_get_current_dispatch_mode_stack())
    return *stacks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_the_graphs_model_stays_as_it_was(name, interrupted, checkpointing, tmp_path):
    """The node calls it under inference mode, on weights that were loaded under it."""
    model = make_model(name)

    def report(event, payload):
        if interrupted and event == "step" and payload["step"] == 2:
            raise Stop

    with torch.inference_mode():
        before = models.denoised(model, *probe(name))
        seen = snapshot(model.model), dict(model.model_options), modes()
        try:
            with models.in_training(model, name, checkpointing, report=report, **LARGE) as training:
                models.train(training, tmp_path, steps=3)
                assert not interrupted
        except Stop:
            assert interrupted
        assert (snapshot(model.model), dict(model.model_options), modes()) == seen
        assert training.denoiser.module is None
        assert torch.equal(models.denoised(model, *probe(name)), before)


def storages(tensors):
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_no_weight_is_held_twice(name):
    model = make_model(name)
    with models.in_training(model, name) as training:
        graphs = storages(model.model.diffusion_model.state_dict().values())
        added = {id(parameter) for parameter in training.plan.trainables.values()}
        tree = training.denoiser.module
        private = storages([p for p in tree.parameters() if id(p) not in added] + list(tree.buffers()))
        assert sum(size for place, size in private.items() if place not in graphs) == 0
        assert len(private) == len(graphs)
        graph_parameters = {id(parameter) for parameter in model.model.diffusion_model.parameters()}
        assert not graph_parameters & {id(parameter) for parameter in tree.parameters()}


def test_only_the_adapter_is_trained():
    with models.in_training(make_model("SD1"), "SD1") as training:
        wanted = {id(p) for p in training.denoiser.module.parameters() if p.requires_grad}
        assert wanted == {id(p) for p in training.plan.trainables.values()}
        assert all(p.dtype == torch.float32 for p in training.plan.trainables.values())


def test_two_trainings_of_one_model_are_alike(tmp_path):
    """The first training leaves nothing that the second could find."""
    model = make_model("SD1")
    first, _ = trained(model, "SD1", tmp_path / "first")
    second, _ = trained(model, "SD1", tmp_path / "second")
    assert all(torch.equal(first[key], second[key]) for key in first)
