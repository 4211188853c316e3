"""Tests of full fine-tuning: exact gradients of every kind of weight, applied as trained, an unchanged MODEL."""

import logging
import os
from contextlib import nullcontext

import pytest
import torch
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve, summarize
from graft_pack.trainers.engine.trainable_modules import TrainableModules
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.formats import files
from graft_pack.trainers.formats.adapter import LazyAdapter, load_adapter, save_adapter
from graft_pack.trainers.methods import METHODS

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}
LARGE = {**FULL, "steps": 4, "learning_rate": 2e-3, "batch_size": 2}
SIGMA = {"SD1": 2.0, "SDXL": 2.0, "Flux": 0.6}
# By dtype: the bar, and a finite-difference step whose rounding and curvature errors are both far below it.
BARS = {torch.float64: (1e-5, 0.002), torch.float32: (1e-3, 0.03)}


def make_model(name, dtype=torch.float32):
    with torch.inference_mode():
        return models.patcher(name, dtype)


def probe(name):
    x = torch.randn(1, *models.FAMILIES[name].latent, generator=torch.Generator().manual_seed(9))
    return x, SIGMA[name], models.conditioning(name, 9)


def raw(denoised, point):
    x, sigma, _ = point
    return (x - denoised) / sigma


def output_of(model, name):
    return raw(models.denoised(model, *probe(name)), probe(name))


def trained(model, name, folder, **fields):
    """Return (adapter, raw output in training, final state) after a few large steps."""
    with models.in_training(model, name, **{**LARGE, **fields}) as training:
        state = models.train(training, folder)
        output = raw(models.trained_denoised(training, *probe(name)), probe(name))
        return training.plan.export(state.ema or state.trainables, 0).adapter, output, state


def kinds(training):
    """Group the trainable parameters by kind: matrices, convolutions, norms, biases, and parameters of no layer."""
    found = {"matrix": [], "convolution": [], "norm": [], "bias": []}
    for name, parameter in training.plan.trainables.items():
        if name.endswith(".bias"):
            found["bias"].append(parameter)
        elif parameter.dim() == 1:
            found["norm"].append(parameter)
        else:
            found["convolution" if parameter.dim() == 4 else "matrix"].append(parameter)
    return {kind: parameters for kind, parameters in found.items() if parameters}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", BARS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_gradients_are_those_of_finite_differences(name, dtype, checkpointing):
    bar, step = BARS[dtype]
    with models.in_training(make_model(name, dtype), name, checkpointing, **FULL) as training:
        with models.float64_throughout(training) if dtype is torch.float64 else nullcontext():
            found = kinds(training)
            assert set(found) >= {"matrix", "norm", "bias"}
            assert ("convolution" in found) == (name != "Flux")
            for kind, parameters in found.items():
                error, slope = directional_error(training.losses, parameters, step=step)
                assert error <= bar, kind
                assert abs(slope) > 1e-6, kind


@pytest.mark.parametrize("name", models.FAMILIES)
def test_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        with models.in_training(make_model(name), name, checkpointing, **FULL) as training:
            found.append(models.joined(training.gradients()))
    assert models.distance(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("name", models.FAMILIES)
def test_every_weight_is_trained_and_has_a_gradient(name):
    model = make_model(name)
    with models.in_training(model, name, **FULL) as training:
        names = {name for name, _ in model.model.diffusion_model.named_parameters()}
        assert set(training.plan.trainables) == names
        assert all(gradient.any() for gradient in training.gradients())


@pytest.mark.parametrize("name", models.FAMILIES)
def test_core_applies_what_was_trained(name, comfy, tmp_path, caplog):
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys

    import nodes

    model = make_model(name)
    before = output_of(model, name)
    adapter, output, _ = trained(model, name, tmp_path)
    path = comfy.base / "models" / "loras" / f"whole-{name}.safetensors"
    save_adapter(str(path), adapter, name)
    caplog.set_level(logging.WARNING)
    applied, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text.lower()
    assert (output_of(applied, name) - output).norm() <= 1e-3 * (output - before).norm()
    assert (output - before).norm() >= 1e-2 * before.norm()
    assert unread_keys(model, None, adapter) == []
    half, _ = apply_adapter(model, None, load_adapter(str(path)), 0.5, 0.0)
    assert 0.1 < models.distance(output_of(half, name) - before, output - before) < 0.9
    none, _ = apply_adapter(model, None, adapter, 0.0, 0.0)
    assert torch.equal(output_of(none, name), before)


class Stop(Exception):
    """The exception that interrupts training in a test."""


@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_graphs_model_stays_as_it_was(name, interrupted, tmp_path):
    """The node calls it under inference mode, on weights that were loaded under it."""
    model = make_model(name)

    def report(event, payload):
        if interrupted and event == "step" and payload["step"] == 2:
            raise Stop

    with torch.inference_mode():
        before = models.denoised(model, *probe(name))
        weights = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        try:
            with models.in_training(model, name, report=report, **LARGE) as training:
                models.train(training, tmp_path)
                assert not interrupted
        except Stop:
            assert interrupted
        after = model.model.state_dict()
        assert list(after) == list(weights)
        assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())
        assert torch.equal(models.denoised(model, *probe(name)), before)


@pytest.mark.parametrize("name", models.FAMILIES)
def test_switched_off_the_frozen_base_answers(name, tmp_path):
    x, sigma, one = probe(name)
    model = make_model(name)
    level = torch.full((1,), sigma)
    with models.in_training(model, name, method="LoRA") as training, torch.no_grad():
        base = training.denoiser.predict(x, level, [one])
    with models.in_training(model, name, True, **LARGE) as training:
        models.train(training, tmp_path)
        with torch.no_grad():
            moved = training.denoiser.predict(x, level, [one])
            with training.plan.switched_off():
                assert torch.equal(training.denoiser.predict(x, level, [one]), base)
            assert torch.equal(training.denoiser.predict(x, level, [one]), moved)
    assert models.distance(moved, base) > 1e-2


def test_frozen_weights_are_shared_and_trained_ones_held_once():
    model = make_model("SD1")
    with models.in_training(model, "SD1", **FULL) as training:
        tree = training.denoiser.module
        graphs = {tensor.untyped_storage().data_ptr() for tensor in model.model.diffusion_model.state_dict().values()}
        frozen = {tensor.untyped_storage().data_ptr() for tensor in tree.buffers()}
        copies = {one.untyped_storage().data_ptr() for one in training.plan.trainables.values()}
        assert frozen == graphs
        assert not copies & graphs
        assert len(copies) == len(training.plan.trainables) == sum(1 for _ in tree.parameters())


PARTS = {
    "attention": ({"targets": "attention"}, lambda path: ".attn" in path and ".to_" in path),
    "norms": ({"targets": "patterns", "target_patterns": (r"norm\d?$",)}, lambda path: "norm" in path),
    "one block": (
        {"targets": "patterns", "target_patterns": ("middle_block",)},
        lambda path: path.startswith("middle_block"),
    ),
    "all but one block": (
        {"block_learning_rates": (("input_blocks", 0.0),)},
        lambda path: not path.startswith("input_blocks"),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_can_be_chosen_and_nothing_else_gets_a_key(part, tmp_path):
    fields, belongs = PARTS[part]
    model = make_model("SD1")
    adapter, _, _ = trained(model, "SD1", tmp_path, **fields)
    paths = {key.removeprefix("diffusion_model.").rpartition(".")[0] for key in adapter}
    every = {path for path, layer in model.model.diffusion_model.named_modules() if layer._parameters}
    assert paths == {path for path in every if belongs(path)} and paths < every
    assert all(adapter[key].any() for key in adapter)


def test_rates_of_blocks(tmp_path):
    fields = {"block_learning_rates": (("middle_block", 1e-5),)}
    adapter, _, _ = trained(make_model("SD1"), "SD1", tmp_path, steps=1, **fields)
    # AdamW's first step is as long as the rate wherever the gradient is not negligible.
    slow = {key: float(adapter[key].abs().max()) for key in adapter}
    fast = [slow.pop(key) for key in list(slow) if ".middle_block" not in key]
    assert slow and max(slow.values()) <= 1.1e-5
    assert sum(largest > 1e-3 for largest in fast) >= 0.9 * len(fast)


def test_a_pattern_that_chooses_nothing_is_refused():
    for fields in (
        {"targets": "patterns", "target_patterns": ("middle_block", "nosuch")},
        {"block_learning_rates": (("nosuch", 1e-5),)},
    ):
        with pytest.raises(SettingsError, match="nosuch"):
            with models.with_text("SD1", **{**FULL, **fields, "text_encoder_rank": 0}):
                pass


def test_quantized_weights_are_refused():
    class Packed(torch.Tensor):
        pass

    layer = torch.nn.Linear(4, 4)
    layer._parameters["weight"] = torch.nn.Parameter(torch.zeros(4, 4).as_subclass(Packed), requires_grad=False)
    with pytest.raises(ModelError, match="inner.weight is quantized.*original"):
        METHODS["all weights"].targets(
            torch.nn.ModuleDict({"inner": layer}), family_of("SD1"), models.recipe("SD1", **FULL)
        )


def test_a_weight_of_two_layers_is_trained_once_and_named_twice():
    tree = torch.nn.ModuleDict({"a": torch.nn.Embedding(3, 2), "b": torch.nn.Linear(2, 3)})
    tree["b"].weight = tree["a"].weight
    method = METHODS["all weights"]
    recipe = models.recipe("SD1", **FULL)
    trainables = method.inject(tree, method.targets(tree, family_of("SD1"), recipe), recipe)
    assert list(trainables) == ["a.weight", "b.bias"]
    assert tree["a"].weight is tree["b"].weight is trainables["a.weight"]
    with torch.no_grad():
        trainables["a.weight"].add_(0.5)
    found = method.export(trainables, recipe, "x.{}".format, tree)
    expected = {"x.a.diff", "x.b.diff", "x.b.diff_b"}
    assert set(found) == expected
    taken = found.taken()
    assert set(taken) == expected
    assert torch.allclose(taken["x.a.diff"], torch.full((3, 2), 0.5))
    assert torch.equal(taken["x.a.diff"], taken["x.b.diff"]) and taken["x.a.diff"] is not taken["x.b.diff"]


def test_what_is_handed_on_at_the_end_is_the_file(tmp_path):
    """The adapter replaces the trained weights in place; the export computes it tensor by tensor."""
    with models.in_training(make_model("SD1"), "SD1", **LARGE) as training:
        state = models.train(training, tmp_path)
        lazy = training.plan.export(state.trainables, 0).adapter
        assert isinstance(lazy, LazyAdapter)
        save_adapter(str(tmp_path / "a.safetensors"), lazy, "a")
        read, _ = files.read_tensors(str(tmp_path / "a.safetensors"))
        places = {tensor.data_ptr() for tensor in state.trainables.values()}
        taken = lazy.taken()
    assert {tensor.data_ptr() for tensor in taken.values()} == places
    assert read.keys() == taken.keys()
    assert all(torch.equal(read[key], taken[key]) for key in taken)


def begin(training, adapter):
    """Give the trainable parameters a file's values, as a run does."""
    TrainableModules(METHODS["all weights"], training.plan.recipe, training.host).start(
        training.plan.trainables, adapter
    )


def test_it_goes_on_from_a_file(tmp_path):
    model = make_model("SD1")
    adapter, output, _ = trained(model, "SD1", tmp_path / "first")
    save_adapter(str(tmp_path / "a.safetensors"), adapter, "a")
    start = load_adapter(str(tmp_path / "a.safetensors"))
    with models.in_training(model, "SD1", **FULL) as training:
        begin(training, start)
        found = raw(models.trained_denoised(training, *probe("SD1")), probe("SD1"))
        assert models.distance(found, output) <= 1e-5
        text = {**start, "text_encoders.clip_l.x.diff": torch.zeros(1)}
        with pytest.raises(
            ModelError, match="layers that this run does not train, such as text_encoders.clip_l.x.diff"
        ):
            begin(training, type(start)(text))
    other = {"targets": "attention", "start_from": "a.safetensors"}
    lora = {"diffusion_model.middle_block.0.lora_up.weight": torch.zeros(1)}
    with models.in_training(model, "SD1", **{**FULL, **other}) as training:
        for tensors, metadata, words in (
            (start, {}, "has layers that this run does not train"),
            (lora, {}, "has no differences of whole weights"),
            ({}, {}, "has no differences of whole weights"),
            ({"diffusion_model.x.diff": torch.zeros(1)}, {}, "has no keys such as"),
            (start, {"graft_recipe": '{"method": "LoRA"}'}, "has the type LoRA, not whole weights"),
        ):
            with pytest.raises(ModelError, match=words) as caught:
                begin(training, type(start)(tensors, metadata))
            assert caught.value.input == "start_from"


def settled(rank=0, method="all weights", family="SD1", rate=0.0, **options):
    chosen = Options()
    for name, value in options.items():
        kind = "optimizer" if name in ("ema_decay", "max_grad_norm", "optimizer") else "adapter"
        chosen = chosen.adding(kind, {name: value})
    return resolve(chosen, family_of(family), RecipeInputs(method, 10, rate, rank, 1, 0, 64, ""))


def test_defaults_are_those_of_the_field():
    plain = settled()
    assert (plain.learning_rate, plain.ema_decay, plain.max_grad_norm) == (5e-6, 0.999, 0.0)
    assert (plain.weight_dtype, plain.targets, plain.rank, plain.alpha) == ("fp32", "all weights", 0, 0.0)
    assert settled(family="SDXL").learning_rate == 1e-6
    assert settled(rate=3e-5).learning_rate == 3e-5
    # A DreamBooth node's rank has no effect on it.
    assert settled(rank=16) == plain
    assert settled(optimizer="AdamWScheduleFree").ema_decay == 0.0
    asked = settled(ema_decay=0.0, max_grad_norm=1.0)
    assert (asked.ema_decay, asked.max_grad_norm) == (0.0, 1.0)
    lora = settled(16, "LoRA")
    assert (lora.learning_rate, lora.ema_decay, lora.max_grad_norm) == (1e-4, 0.0, 1.0)
    assert "weight_dtype" not in lora.deciding() and "weight_dtype" not in plain.deciding()
    assert settled(weight_dtype="bf16").deciding()["weight_dtype"] == "bf16"
    assert "on all weights in fp32" in summarize(plain)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"alpha": 4.0}, "alpha"),
        ({"dropout": 0.1}, "dropout"),
        ({"block_ranks": "middle=3"}, "block_ranks"),
        ({"lora_plus_ratio": 4.0}, "lora_plus_ratio"),
        ({"type": "LoHa"}, "type"),
        ({"weight_dtype": "bf16", "optimizer": "Prodigy"}, "weight_dtype"),
        ({"weight_dtype": "bf16", "optimizer": "AdamWScheduleFree"}, "weight_dtype"),
        ({"weight_dtype": "bf16", "method": "LoRA", "rank": 4}, "weight_dtype"),
    ],
    ids=str,
)
def test_what_has_no_effect_is_refused(options, word):
    with pytest.raises(SettingsError, match=word) as caught:
        settled(**options)
    assert caught.value.input == word


def test_other_forms_than_the_hosts_are_refused(tmp_path):
    adapter, _, _ = trained(make_model("SD1"), "SD1", tmp_path, steps=1)
    for kind in ("diffusers", "peft"):
        with pytest.raises(ModelError, match=kind):
            save_adapter(str(tmp_path / "x" / "a.safetensors"), adapter, "a", kind)
    assert not os.path.exists(tmp_path / "x")


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
def test_dtypes_of_base_weights_and_activations_go_together(base, weights, compute, tmp_path):
    model = make_model("SD1", base)
    fields = {"compute_dtype": compute, "weight_dtype": weights, "steps": 1, "batch_size": 1}
    adapter, output, state = trained(model, "SD1", tmp_path, **fields)
    assert {tensor.dtype for tensor in state.trainables.values()} == {
        torch.bfloat16 if weights == "bf16" else torch.float32
    }
    assert all(tensor.dtype == torch.float32 for slots in state.optimizer.values() for tensor in slots.values())
    assert output.isfinite().all()
    assert all(adapter[key].dtype == torch.float32 for key in adapter)
    assert sum(bool(adapter[key].any()) for key in adapter) > 0.9 * len(adapter)
