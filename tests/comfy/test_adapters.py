"""Tests that every adapter type passes on every kind of layer that supports it."""

import json
import os
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graft_pack.trainers.engine.gradient_check import check_gradient
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.formats import files
from graft_pack.trainers.formats.adapter import FORMATS, Adapter, load_adapter, save_adapter
from graft_pack.trainers.methods import ADAPTERS, METHODS
from graft_pack.trainers.recipe.options import TARGETS
from graft_pack.trainers.recipe.parsing import parse_arguments

from tests.support import diffusers_host, models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
SIGMA = 2.0
LARGE = {"steps": 3, "batch_size": 2, "rank": 4, "alpha": 4.0}
# Learning rates of types whose steps move a layer by much less or much more than a LoRA's.
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
    "GLoRA": LINEARS,
    "GLoRA conv": ALL,
}
# adapter_args of further cases: a type, a space and a name.
VARIANTS = {
    "LoRA tucker": "use_tucker=true",
    "LoRA fa": "lora_fa=true",
    "LoRA norm": "scale_weight_norms=0.3",
    "LoRA dropouts": "rank_dropout=0.3 module_dropout=0.2",
    "LoHa tucker": "use_tucker=true",
    "LoHa wd": "dora_wd=true",
    "LoHa dropouts": "rank_dropout=0.2 module_dropout=0.2",
    "LoKr both": "decompose_both=true",
    "LoKr factor": "factor=2 full_matrix=true",
    "LoKr tucker": "use_tucker=true decompose_both=true factor=4",
    "LoKr wd": "dora_wd=true",
    "LoRA beside": "train_norm=true train_bias=true scale_weight_norms=2",
    "DoRA beside": "train_norm=true train_bias=true",
    "LoHa beside": "train_norm=true train_bias=true rank_dropout=0.2",
    "LoKr beside": "train_norm=true train_bias=true",
    "GLoRA beside": "train_norm=true train_bias=true",
}
CASES |= {
    case: {**ALL, "rank": 2, "alpha": 3.0, "adapter_args": parse_arguments(text)} for case, text in VARIANTS.items()
}


BESIDE = [case for case in VARIANTS if case.endswith(" beside")]


def type_of(case):
    return case.partition(" ")[0] if case in VARIANTS else case if case in METHODS else case.removesuffix(" conv")


def fields_of(case, **more):
    """Return the recipe's fields of a case."""
    return {**LARGE, **CASES[case], "method": type_of(case), **more}


@dataclass(frozen=True, repr=False)
class Trained:
    """One short training.

    Attributes:
        output: the raw output in training after the last step.
        untouched: True if the weights of the graph's model are bit-identical afterwards.
    """

    recipe: Any
    adapter: Adapter
    trainables: dict
    output: torch.Tensor
    untouched: bool


def raw(denoised):
    return (X - denoised) / SIGMA


def output_of(model):
    return raw(models.denoised(model, X, SIGMA, models.conditioning("SD1", 9)))


def trained_output(training):
    return raw(models.trained_denoised(training, X, SIGMA, models.conditioning("SD1", 9)))


def weights(model):
    """Return the weights with nothing applied, because models that wait on one share its weights."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


@pytest.fixture(scope="module")
def model(comfy):
    """Return the tiny SD1 that all types train on; each type must leave it unchanged, or the next one's tests fail."""
    with torch.inference_mode():
        return models.patcher("SD1")


@pytest.fixture(scope="module")
def exact(comfy):
    """Return the same model in float64."""
    with torch.inference_mode():
        return models.patcher("SD1", torch.float64)


@pytest.fixture(scope="module")
def base(model):
    """Return its raw output."""
    return output_of(model)


def train(model, case, folder, **more):
    """Train a few large steps."""
    before = weights(model)
    rate = RATES.get(type_of(case), 2e-2)
    with models.in_training(model, "SD1", **fields_of(case, learning_rate=rate, **more)) as training:
        state = models.train(training, folder)
        output = trained_output(training)
        adapter = training.plan.export(state.trainables, 0).adapter
        recipe = training.plan.recipe
        if adapter.native is None:
            # The file of a run names its recipe.
            adapter = Adapter(adapter, {"graft_recipe": json.dumps({"method": recipe.method})})
    after = weights(model)
    same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    return Trained(recipe, adapter, state.trainables, output, same)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def done(case, model, base, tmp_path_factory):
    """Return the case's training, made once for all tests."""
    return train(model, case, tmp_path_factory.mktemp("run"))


def assert_applied(output, done, base):
    """Check DESIGN's bar: the error is at most a thousandth of the effect."""
    assert float((output - done.output).norm() / (done.output - base).norm()) <= 1e-3


def test_it_starts_without_effect_and_steps_have_one(case, done, base, exact):
    with models.in_training(exact, "SD1", **fields_of(case)) as training, models.float64_throughout(training):
        start = trained_output(training)
    assert models.distance(start, output_of(exact)) <= 1e-6
    assert models.distance(done.output, base) >= 1e-2


def test_the_graphs_weights_stay_as_they_were(done, model, base):
    assert done.untouched
    assert torch.equal(output_of(model), base)


def test_what_the_host_loads_from_the_file_is_what_was_trained(case, done, model, base, comfy):
    from graft_pack.nodes.host.model.lora import unread_keys

    import nodes

    path = comfy.base / "models" / "loras" / f"{case}.safetensors"
    save_adapter(str(path), done.adapter, case)
    assert unread_keys(model, None, done.adapter) == []
    applied, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    assert_applied(output_of(applied), done, base)


@pytest.fixture(scope="module")
def pruned(comfy):
    """Return a model whose layers each have a row of zeros, as in pruned or grown models."""
    with torch.inference_mode():
        found = models.patcher("SD1")
        for name, tensor in found.model.diffusion_model.state_dict().items():
            if tensor.dim() > 1 and "transformer_blocks" in name:
                tensor[0] = 0
    return found


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind in CASES])
def test_rows_of_zeros_in_the_base_are_trained_and_applied_like_others(kind, pruned, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter

    done = train(pruned, kind, tmp_path)
    assert models.distance(done.output, output_of(pruned)) >= 1e-2
    applied, _ = apply_adapter(pruned, None, done.adapter, 1.0, 1.0)
    assert_applied(output_of(applied), done, output_of(pruned))


def test_strength_zero_is_the_base(done, model, base):
    from graft_pack.nodes.host.model.lora import apply_adapter

    applied, _ = apply_adapter(model, None, done.adapter, 0.0, 0.0)
    assert torch.equal(output_of(applied), base)


def test_half_the_strength_is_half_the_difference(done, model):
    """This holds for weights: the host's patches are linear in the strength, including those of a magnitude."""
    from graft_pack.nodes.host.model.lora import apply_adapter

    held = []
    for strength in (0.5, 1.0):
        applied, _ = apply_adapter(model, None, done.adapter, strength, 0.0)
        held.append(merged(applied))
    before = weights(model)
    half, whole = (models.joined(one[name] - before[name] for name in sorted(before)) for one in held)
    assert models.distance(2 * half, whole) <= 1e-4


def merged(applied):
    """Return the weights with the patches merged, as core's CheckpointSave writes them."""
    import comfy.model_management

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([applied], force_patch_weights=True)
        found = {name: tensor.clone() for name, tensor in applied.model.state_dict().items()}
        applied.unpatch_model(applied.offload_device)
    return found


def test_merged_is_what_is_applied(done, model, base):
    from graft_pack.nodes.host.model.lora import apply_adapter

    applied, _ = apply_adapter(model, None, done.adapter, 1.0, 0.0)
    found = merged(applied)
    with torch.inference_mode():
        whole = models.patcher("SD1", seed=1)
        whole.model.load_state_dict(found)
    assert_applied(output_of(whole), done, base)
    assert torch.equal(output_of(model), base)


@pytest.fixture(scope="module")
def unet(model):
    """Return a factory of the same network in diffusers' form; a factory because loading an adapter changes it."""
    return lambda: diffusers_host.convert_sd1(model)


def diffusers_output(network):
    return diffusers_host.raw_output(network, X, SIGMA, models.conditioning("SD1", 9))


def test_peft_loads_the_folder_onto_the_model_as_published(case, done, base, unet, tmp_path):
    from peft import PeftModel

    folder = tmp_path / "adapter"
    if done.adapter.native is None:
        for format in ("peft", "diffusers"):
            with pytest.raises(ModelError, match=f"cannot save this adapter as '{format}'"):
                save_adapter(str(folder / "adapter_model.safetensors"), done.adapter, case, format)
        return
    save_adapter(str(folder / "adapter_model.safetensors"), done.adapter, case, "peft")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    network = unet()
    with warnings.catch_warnings():
        # peft warns about a key that matches no layer.
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Invalid `oft_block_size`|.*CUDA extension|Setting boft_n")
        loaded = PeftModel.from_pretrained(network, str(folder))
    assert_applied(diffusers_output(loaded.base_model.model), done, base)


def test_diffusers_loads_the_types_it_knows_and_the_others_are_refused(case, done, base, unet, tmp_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    path = tmp_path / "adapter.safetensors"
    if done.adapter.native is None:
        return
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
    from graft_pack.nodes.host.model.lora import apply_adapter

    path = str(tmp_path / "adapter" / "adapter_model.safetensors")
    if done.adapter.native is None:
        return
    save_adapter(path, done.adapter, case, "peft")
    back = load_adapter(path)
    assert torch.equal(joined(back.native.tensors), joined(done.adapter.native.tensors))
    # ComfyUI's keys cannot hold types that need the model's weights; Graft Apply Adapter computes those.
    assert bool(back) == (type_of(case) not in ("DoRA", "OFT", "BOFT", "IA3"))
    applied, _ = apply_adapter(model, None, back, 1.0, 0.0)
    assert_applied(output_of(applied), done, base)


def joined(tensors):
    return models.joined(tensors[name] for name in sorted(tensors))


# Convolutions train together with Linears if a type supports both.
EXACT = [case for case in CASES if CASES[case] is not LINEARS or f"{case} conv" not in CASES and case != "LoRA"]


@pytest.mark.parametrize("case", EXACT)
def test_gradients_are_those_of_finite_differences(case, exact):
    """At values away from the start, in fp64, where rounding hides no error."""
    # A core is one more factor. The difference's own error falls with the fourth power of its step.
    spread, step = (0.2, 0.005) if "tucker" in case else (0.05, 0.02)
    with models.in_training(exact, "SD1", examples=1, **fields_of(case, batch_size=1)) as training:
        with torch.no_grad():
            source = torch.Generator().manual_seed(1)
            for parameter in training.plan.trainables.values():
                parameter.data = parameter.data.double()
                parameter.add_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * spread)
        for stem, parameters in by_stem(training.plan.trainables).items():
            error, slope = directional_error(training.losses, parameters, step=step)
            assert slope > 1e-4, stem
            assert error <= 1e-5, stem


def by_stem(trainables):
    """Group the trainable parameters by peft's name for them; each group's gradient can be wrong on its own."""
    found = {}
    for name, parameter in trainables.items():
        found.setdefault(name.split(".default")[0].rpartition(".")[2], []).append(parameter)
    return found


RESUMED = {"steps": 3, "rank": 2, "alpha": 2.0, "batch_size": 2, "save_every": 1}


def run_session(folder, report=None, **fields):
    """Run a whole training over diffusers on two pictures."""
    return diffusers_host.run_session(folder, report, dataset=diffusers_host.make_dataset(2), **fields)


class Stopped(Exception):
    """The exception that interrupts a run in a test."""


def stop_at_two(event, payload):
    if event == "step" and payload["step"] == 2:
        raise Stopped


def short_fields(kind):
    """Return the method and the arguments of a type or a variant."""
    return {"method": type_of(kind), "adapter_args": parse_arguments(VARIANTS.get(kind, ""))}


@pytest.mark.parametrize("kind", [*ADAPTERS, *VARIANTS])
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    """A finished run also returns the same adapter when it is queued again."""
    fields = {**RESUMED, **short_fields(kind)}
    straight = run_session(tmp_path / "straight", **fields)
    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop_at_two, **fields)
    resumed = run_session(tmp_path / "parts", **fields)
    assert resumed.resumed_from == 2
    assert diffusers_host.same_state(diffusers_host.state_of(resumed), diffusers_host.state_of(straight))
    again = run_session(tmp_path / "parts", **fields)
    for one in (resumed, again):
        assert diffusers_host.same_tensors(one.adapter, straight.adapter)
        if straight.adapter.native is not None:
            assert diffusers_host.same_tensors(one.adapter.native.tensors, straight.adapter.native.tensors)


def test_what_pissa_drew_is_part_of_the_state(tmp_path, monkeypatch):
    """Another library or thread count may factor the weight differently; the run resumes from its saved factors."""
    fields = {**RESUMED, "method": "PiSSA"}
    straight = run_session(tmp_path / "straight", **fields)
    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop_at_two, **fields)
    finish = METHODS["PiSSA"].finish

    def otherwise(layer, recipe):
        finish(layer, recipe)
        layer.start_A.mul_(-1)
        layer.start_B.mul_(-1)

    monkeypatch.setattr(METHODS["PiSSA"], "finish", otherwise)
    resumed = run_session(tmp_path / "parts", **fields)
    assert diffusers_host.same_tensors(resumed.adapter, straight.adapter)


def test_dropout_is_repeated_by_a_resumed_run(tmp_path):
    fields = {**RESUMED, "dropout": 0.5, "validation_fraction": 0.5, "validate_every": 1}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    straight = run_session(tmp_path / "straight", **fields)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop_at_two, **fields)
    torch.manual_seed(2)
    resumed = run_session(tmp_path / "parts", **fields)
    assert diffusers_host.same_state(diffusers_host.state_of(resumed), diffusers_host.state_of(straight))
    without = run_session(tmp_path / "without", **{**fields, "dropout": 0.0})
    assert without.losses != straight.losses
    assert not diffusers_host.same_tensors(without.adapter, straight.adapter)


@pytest.mark.parametrize("kind", ["DoRA", "LoRA dropouts", "LoHa dropouts"])
def test_dropout_is_the_same_when_blocks_are_computed_again(kind, model):
    """The recomputation must use the forward's mask, or the gradient belongs to another network."""
    fields = short_fields(kind)
    dropped = fields if kind in VARIANTS else {**fields, "dropout": 0.5}
    fields = {**fields, "adapter_args": ()}
    from graft_pack.trainers.methods.dropout import dropping_out

    found = []
    for checkpointing in (False, True):
        with models.in_training(model, "SD1", checkpointing, spread=0.1, **dropped) as training:
            with dropping_out([training.denoiser.module], training.denoiser.device, training.plan.recipe, 0):
                found.append(models.joined(training.gradients()))
        with models.in_training(model, "SD1", checkpointing, spread=0.1, **fields) as training:
            assert models.distance(models.joined(training.gradients()), found[-1]) > 1e-2
    assert models.distance(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize("kind", [*ADAPTERS, "LoRA fa", "LoKr both", "LoKr factor", "LoKr wd", "LoHa wd", *BESIDE])
def test_training_goes_on_from_a_file(kind, tmp_path):
    """Training starts from the file's effect; types that a kohya file cannot hold are refused by name."""
    fields = {"rank": 2, "alpha": 2.0, "batch_size": 2, **short_fields(kind)}
    first = run_session(tmp_path, **fields, steps=2)
    for format in ("kohya", "peft") if first.adapter.native else ("kohya",):
        path = tmp_path / format / "adapter_model.safetensors"
        save_adapter(str(path), first.adapter, "first", format)
        more = {**fields, "start_from": str(path), "steps": 1, "learning_rate": 1e-12}
        if format == "kohya" and kind in ("DoRA", "DoRA beside", "OFT", "BOFT", "IA3", "LoHa wd", "LoKr wd"):
            # peft has no form of a LoHa or LoKr with magnitudes, nor of norms.
            cure = "peft folder" if kind in ADAPTERS else "Graft Apply Adapter"
            with pytest.raises(ModelError, match=f"does not have the tensors that {type_of(kind)} trains.*{cure}"):
                run_session(tmp_path, **more)
            continue
        second = run_session(tmp_path, **more)
        assert second.run.name != first.run.name
        assert models.distance(joined(second.adapter), joined(first.adapter)) <= 1e-5


def test_a_file_that_lacks_what_an_argument_adds_names_the_argument(tmp_path):
    """Tucker's core is merged into a kohya file, which therefore has none."""
    fields = {"rank": 2, "alpha": 2.0, "batch_size": 2, **short_fields("LoRA tucker"), "targets": "linear + conv"}
    path = tmp_path / "first.safetensors"
    save_adapter(str(path), run_session(tmp_path, **fields, steps=1).adapter, "first", "kohya")
    with pytest.raises(ModelError, match="lacks .*Leave use_tucker out of adapter_args"):
        run_session(tmp_path, **fields, start_from=str(path), steps=1)


@pytest.mark.parametrize(
    "made, wanted, named",
    [
        ("", "train_norm=true", "lacks .*norm.*Leave train_norm out of adapter_args"),
        ("", "train_bias=true", "lacks .*diff_b.*Leave train_bias out of adapter_args"),
        ("train_norm=true", "", "has layers that this run does not train, such as .*norm.*adapter_args"),
        ("train_bias=true", "", "changes the bias of LoRA layers, which this run cannot train"),
    ],
)
@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_norms_and_biases_of_a_file_are_those_of_the_run(made, wanted, named, format, tmp_path):
    if made == "train_norm=true" and format == "peft":
        pytest.skip("peft has no form of norms")
    fields = {"rank": 2, "alpha": 2.0, "batch_size": 2, "steps": 1}
    path = tmp_path / format / "adapter_model.safetensors"
    first = run_session(tmp_path / "first", **fields, adapter_args=parse_arguments(made))
    if made and format == "peft":
        # Only some layers of SD1's attention have a bias.
        with pytest.raises(ModelError, match="changes a bias, and peft has one for all or none"):
            save_adapter(str(path), first.adapter, "first", format)
        return
    save_adapter(str(path), first.adapter, "first", format)
    with pytest.raises(ModelError, match=named):
        run_session(tmp_path, **fields, start_from=str(path), adapter_args=parse_arguments(wanted))


OTHERS = ["SDXL", "SD3", "Flux"]
SOME = {"adapter_args": parse_arguments("train_norm=true train_bias=true"), "targets": "all linear", "rank": 2}


def point_of(name):
    """Return (latent, sigma, conditioning) of a prediction."""
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(3))
    return x, 0.6, models.conditioning(name, 9)


@pytest.mark.parametrize("name", OTHERS)
def test_core_applies_norms_and_biases_at_the_strength_that_training_has(name):
    """Without factors, so that the norms and biases make up the whole effect, and half the strength is half of it."""
    import comfy.sd
    from graft_pack.nodes.host.model.lora import unread_keys

    model, point = models.patcher(name), point_of(name)
    base = models.denoised(model, *point)
    with models.in_training(model, name, **SOME) as training:
        module, method = training.denoiser.module, METHODS["LoRA"]
        changed = {one: value for one, value in training.plan.trainables.items() if ".diff" in one}
        models.scatter(changed, 0.2)
        trained = []
        for strength in (1.0, 0.5):
            with method.scaled(module, strength):
                trained.append(models.trained_denoised(training, *point))
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    assert unread_keys(model, None, adapter) == []
    for strength, output in zip((1.0, 0.5), trained, strict=True):
        applied, _ = comfy.sd.load_lora_for_models(model, None, dict(adapter), strength, 0.0)
        error = (models.denoised(applied, *point) - output).norm() / (output - base).norm()
        assert float(error) <= 1e-4
    assert models.distance(trained[0], trained[1]) > 1e-2


@pytest.mark.parametrize("name", OTHERS)
def test_gradients_of_norms_and_biases_are_exact(name):
    """In fp64 against finite differences, and those of checkpointed blocks."""
    model, found = models.patcher(name, torch.float64), []
    for checkpointing in (False, True):
        with models.in_training(model, name, checkpointing, 0.05, 1, batch_size=1, **SOME) as training:
            with models.float64_throughout(training):
                found.append(models.joined(training.gradients()))
                stems = {} if checkpointing else by_stem(training.plan.trainables)
                assert checkpointing or len(stems) == 4
                for stem in (stem for stem in stems if stem.startswith("diff")):
                    error, slope = directional_error(training.losses, stems[stem], step=0.02)
                    assert slope > 1e-4, stem
                    assert error <= 1e-5, stem
    assert models.distance(*found) <= 1e-6


def test_the_norms_are_those_that_lycoris_trains(model, unet):
    """With its presets for attention and for whole blocks; its modules have diffusers' names."""
    from lycoris.kohya import LycorisNetworkKohya
    from lycoris.modules.norms import NormModule

    names = {}
    with models.in_training(model, "SD1") as training:
        for path, _ in training.denoiser.module.named_modules():
            names[path] = training.denoiser.adapter_name(path)
    for targets, blocks in (("all linear", []), ("attention", ["Transformer2DModel"])):
        blocks = blocks or ["Transformer2DModel", "ResnetBlock2D"]
        LycorisNetworkKohya.apply_preset({"unet_target_module": blocks, "text_encoder_target_module": []})
        network = LycorisNetworkKohya([], unet(), lora_dim=2, conv_lora_dim=2, train_norm=True)
        theirs = {module.lora_name for module in network.unet_loras if isinstance(module, NormModule)}
        chosen = targets_of(model, targets=targets, adapter_args=parse_arguments("train_norm=true"))
        ours = {names[path] for path in chosen if path not in targets_of(model, targets=targets)}
        assert theirs and ours == theirs


@pytest.mark.parametrize(
    "name, fields, named",
    [
        ("PixArtSigma", {"adapter_args": (("train_norm", True),)}, "no norm in or beside"),
        ("SD1", {"adapter_args": (("train_bias", True),), "target_patterns": ("attn1.to_q",)}, "no bias in or beside"),
    ],
)
def test_a_model_without_such_norms_or_biases_is_refused_by_name(name, fields, named):
    fields = {"targets": "patterns", "target_patterns": ("attn",), **fields}
    with pytest.raises(SettingsError, match=named) as caught, models.in_training(models.patcher(name), name, **fields):
        pass
    assert caught.value.input == "adapter_args"


def test_norms_that_are_more_than_numbers_are_refused_by_name():
    from graft_pack.trainers.methods.differences import add_to_norm

    norm = torch.nn.LayerNorm(4)
    norm.weight = torch.nn.Parameter(torch.ones(4).as_subclass(type("Packed", (torch.Tensor,), {})))
    with pytest.raises(ModelError, match="x.norm.weight is quantized.*Leave train_norm out"):
        add_to_norm("x.norm", norm)


@pytest.mark.parametrize("rank", [32, 64])
def test_a_glora_as_wide_as_its_layers_is_not_taken_for_one_of_lycoris_1(rank, model, base, comfy, tmp_path):
    """A square layer whose rank is its width fits both layouts; the file holds one more rank of zeros."""
    from graft_pack.nodes.host.model.lora import apply_adapter

    import nodes

    done = train(model, "GLoRA", tmp_path, rank=rank, alpha=7.0)
    path = comfy.base / "models" / "loras" / f"glora-{rank}.safetensors"
    save_adapter(str(path), done.adapter, "GLoRA")
    assert_applied(output_of(nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)[0]), done, base)
    back = load_adapter(str(path))
    assert_applied(output_of(apply_adapter(model, None, back, 1.0, 1.0)[0]), done, base)


@pytest.mark.parametrize("rank", [31, 32])
def test_training_goes_on_from_a_glora_as_wide_as_its_layers(rank, tmp_path):
    fields = {"rank": rank, "alpha": 7.0, "batch_size": 2, **short_fields("GLoRA")}
    first = run_session(tmp_path, **fields, steps=2)
    path = tmp_path / "first.safetensors"
    save_adapter(str(path), first.adapter, "first")
    second = run_session(tmp_path, **fields, start_from=str(path), steps=1, learning_rate=1e-12)
    assert models.distance(joined(second.adapter), joined(first.adapter)) <= 1e-5


def test_lora_fa_trains_b_alone(tmp_path):
    fields = {**RESUMED, **short_fields("LoRA fa")}
    start, end = (run_session(tmp_path / str(steps), **{**fields, "steps": steps}).adapter for steps in (1, 3))
    for name in start:
        assert torch.equal(start[name], end[name]) == (not name.endswith("lora_up.weight")), name


def test_a_norm_is_limited_as_sd_scripts_limits_it(tmp_path):
    """Its formula: B and A times the root of min(1, limit / |s B A|)."""
    fields = {**RESUMED, "alpha": 4.0, "learning_rate": 0.05}
    pairs = []
    for arguments in ("", "scale_weight_norms=0.45"):
        more = {"steps": 1, "adapter_args": parse_arguments(arguments)}
        adapter = run_session(tmp_path / str(len(pairs)), **{**fields, **more}).adapter
        parts = {name: value.flatten(1).double() for name, value in adapter.items() if name.endswith("weight")}
        pairs.append(parts)
    ups = [name for name in pairs[0] if name.endswith("lora_up.weight")]
    norms = []
    for up in ups:
        down = up.replace("_up.", "_down.")
        norms.append(float((2 * pairs[0][up] @ pairs[0][down]).norm()))
        ratio = min(1.0, 0.45 / norms[-1]) ** 0.5
        for name in (up, down):
            assert models.distance(pairs[1][name], pairs[0][name] * ratio) <= 1e-5
    assert min(norms) < 0.45 < max(norms)


def test_ranks_rows_and_modules_are_dropped_with_their_probability():
    from graft_pack.trainers.methods.dropout import StructureDropout

    torch.manual_seed(0)
    dropout = StructureDropout(0.25, 0.0)
    for shape, ranks in (((4000, 3, 8), (4000, 1, 8)), ((4000, 8, 2, 2), (4000, 8, 1, 1))):
        kept = dropout.ranks(torch.ones(shape))
        assert torch.equal(
            kept, kept.mean([axis for axis in (1, 2, 3)[: len(shape) - 1] if ranks[axis] == 1], True).expand(shape)
        )
        assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert float((kept == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    rows = dropout.rows(torch.ones(40000, 2))
    assert set(rows.unique().tolist()) == {0.0, 1.0} and torch.equal(rows[:, 0], rows[:, 1])
    assert float(rows.mean()) == pytest.approx(0.75, abs=0.02)
    module = StructureDropout(0.0, 0.5)
    whole = [float(module.ranks(torch.ones(2, 3)).mean()) for _ in range(200)]
    assert set(whole) == {0.0, 1.0} and 60 < sum(whole) < 140
    assert torch.equal(dropout.eval().ranks(rows), rows) and torch.equal(dropout.rows(rows), rows)


@pytest.mark.parametrize(
    "kind, text, named",
    [
        ("LoKr", "factors=8", "has 'factors'.*It takes factor, full_matrix, decompose_both, dora_wd"),
        ("LoRA", "factor=8", "which LoRA does not take.*It takes rank_dropout"),
        ("LoRA", "t_lora=true", "T-LoRA's rank depends on the timestep"),
        ("PiSSA", "eva=true", "It takes none"),
        ("LoKr", "factor=0", "factor is 0. Write factor= and a whole number from 1 to 4096"),
        ("LoKr", "factor=2.5", "a whole number"),
        ("LoKr", "full_matrix=1", "Write full_matrix= and true or false"),
        ("LoRA", "rank_dropout=1", "a number from 0 to 0.95"),
        ("LoRA", "rank_dropout=true", "a number from 0 to 0.95"),
        ("OFT", "factor=8", "It takes none"),
        ("DoRA", "lora_fa=true", "It takes eva, train_norm, train_bias"),
        ("PiSSA", "train_norm=true", "It takes none"),
        ("IA3", "train_bias=true", "It takes none"),
        ("LoRA", "train_norm=1", "Write train_norm= and true or false"),
    ],
)
def test_arguments_that_a_type_does_not_take_are_refused_by_name(kind, text, named):
    recipe = models.recipe("SD1", method=kind, rank=2, alpha=2.0, adapter_args=parse_arguments(text, "adapter_args"))
    with pytest.raises(SettingsError, match=named) as caught:
        METHODS[kind].check(recipe)
    assert caught.value.input == "adapter_args"


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_a_slider_refuses_magnitudes(kind):
    fields = {"method": kind, "rank": 2, "alpha": 2.0, "slider_strength": 1.0}
    METHODS[kind].check(models.recipe("SD1", **fields))
    with pytest.raises(SettingsError, match="dora_wd is set, but its effect is not proportional"):
        METHODS[kind].check(models.recipe("SD1", **fields, adapter_args=(("dora_wd", True),)))


def test_another_alpha_starts_with_the_same_effect(tmp_path):
    first = run_session(tmp_path / "first", rank=2, alpha=2.0, steps=2)
    path = tmp_path / "a.safetensors"
    save_adapter(str(path), first.adapter, "first")
    second = run_session(tmp_path / "second", rank=2, alpha=8.0, steps=1, learning_rate=1e-12, start_from=str(path))
    for name in first.adapter:
        if name.endswith(".alpha"):
            layer = name.removesuffix("alpha")
            effects = [
                float(one.adapter[name])
                * one.adapter[f"{layer}lora_up.weight"]
                @ one.adapter[f"{layer}lora_down.weight"]
                for one in (first, second)
            ]
            assert models.distance(effects[1], effects[0]) <= 1e-5


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"method": "rsLoRA"}, "has the type LoRA, but this run trains rsLoRA"),
        ({"method": "LoHa"}, "has the type LoRA, but this run trains LoHa"),
        ({"rank": 1}, "Use the rank and block_ranks"),
        ({"targets": "all linear"}, "no tensors for"),
        ({"targets": "patterns", "target_patterns": ("attn1",)}, "has layers that this run does not train"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_refused_by_name(fields, named, tmp_path):
    first = run_session(tmp_path / "first", rank=2, alpha=2.0, steps=1)
    path = tmp_path / "a.safetensors"
    save_adapter(str(path), first.adapter, "first")
    with pytest.raises(ModelError, match=named) as caught:
        run_session(tmp_path / "second", **{"rank": 2, "alpha": 2.0, "steps": 1, "start_from": str(path), **fields})
    assert caught.value.input == "start_from"
    runs = tmp_path / "second" / "runs"
    assert not [path for path in runs.iterdir() if path.is_dir()], "no run has begun"


def test_ranks_and_rates_by_block_and_lora_plus(model):
    """The scale stays the recipe's for any block rank; B's rate follows the ratio; rank 0 leaves a layer out."""
    fields = {
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 1e-3,
        "block_ranks": (("input_blocks", 2), (r"attn1\.to_v", 0)),
        "block_learning_rates": (("middle_block", 1e-5),),
        "lora_plus_ratio": 16.0,
    }
    with models.in_training(model, "SD1", **fields) as training:
        method = METHODS["LoRA"]
        groups = method.groups(training.plan.trainables, training.plan.recipe)
        adapter = training.plan.export(training.plan.trainables, 0).adapter
        shapes = {name: tuple(value.shape) for name, value in training.plan.trainables.items()}
    rates = {name: group.learning_rate for group in groups for name in group.names}
    assert rates.keys() == shapes.keys()
    for name, shape in shapes.items():
        assert "input_blocks" in name or "attn1.to_v" not in name
        rank = min(shape)
        assert rank == (2 if "input_blocks" in name else 4)
        base = 1e-5 if "middle_block" in name else 1e-3
        assert rates[name] == pytest.approx(base * (16 if "lora_B" in name else 1))
    for name, value in adapter.items():
        if name.endswith(".alpha"):
            down = adapter[name.replace("alpha", "lora_down.weight")]
            assert float(value) / down.shape[0] == 2.0
    config = adapter.native.config
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {2}
    assert set(config["alpha_pattern"].values()) == {4.0}


def test_blocks_of_other_ranks_load_in_peft_and_diffusers(model, base, unet, tmp_path):
    from diffusers import DDPMScheduler, StableDiffusionPipeline
    from peft import PeftModel

    done = train(model, "LoRA", tmp_path, block_ranks=(("input_blocks", 2),), alpha=8.0)
    save_adapter(str(tmp_path / "peft" / "adapter_model.safetensors"), done.adapter, "a", "peft")
    network = unet()
    PeftModel.from_pretrained(network, str(tmp_path / "peft"))
    assert_applied(diffusers_output(network), done, base)
    save_adapter(str(tmp_path / "a.safetensors"), done.adapter, "a", "diffusers")
    network = unet()
    pipe = StableDiffusionPipeline(
        None, None, None, network, DDPMScheduler(), None, None, requires_safety_checker=False
    )
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    assert_applied(diffusers_output(network), done, base)


def targets_of(model, kind="LoRA", **fields):
    """Return the layers that a recipe adapts."""
    recipe = models.recipe("SD1", method=kind, **fields)
    return METHODS[kind].targets(model.model.diffusion_model, family_of("SD1"), recipe)


def test_each_choice_of_targets_takes_in_the_one_before(model):
    found = [set(targets_of(model, targets=name)) for name in TARGETS[:4]]
    assert all(one < other for one, other in zip(found, found[1:], strict=False))
    assert all(".attn" in path for path in found[0])
    assert {path.rpartition(".")[2] for path in found[1] - found[0]} == {"proj", "2"}
    assert all(".ff.net." in path for path in found[1] - found[0])
    assert "time_embed.0" in found[2] - found[1]
    assert "input_blocks.0.0" in found[3] - found[2]


def test_patterns_choose_layers_of_any_kind(model):
    found = targets_of(model, targets="patterns", target_patterns=(r"attn2\.to_k", "^input_blocks.0.0$"))
    assert found[0] == "input_blocks.0.0"
    assert all("attn2.to_k" in path for path in found[1:])
    assert len(found) > 2


@pytest.mark.parametrize("kind", ["PiSSA", "OFT", "BOFT", "IA3"])
def test_kinds_of_layers_without_a_right_file_are_refused_by_name(kind, model):
    with pytest.raises(SettingsError, match=f"{kind} does not support a convolution such as input_blocks") as caught:
        targets_of(model, kind, targets="linear + conv")
    assert caught.value.input == "targets"
    assert "LoRA with conv" in caught.value.cure


@pytest.mark.parametrize(
    "fields",
    [{"targets": "patterns", "target_patterns": ("attn1", "atn2")}, {"block_ranks": (("atn2", 2),)}],
    ids=["target", "rank"],
)
def test_a_pattern_that_chooses_nothing_is_refused_by_name(fields, tmp_path):
    with pytest.raises(SettingsError, match="'atn2'.*no layer"):
        run_session(tmp_path, **fields)


def test_rank_zero_leaves_layers_out(tmp_path):
    """The same holds in a whole run, where a pattern that selects nothing would be refused."""
    whole = run_session(tmp_path / "whole")
    less = run_session(tmp_path / "less", block_ranks=(("attn1", 0),))
    assert set(less.adapter) == {name for name in whole.adapter if "attn1" not in name}
    assert less.adapter


def test_kinds_that_rank_zero_leaves_out_are_not_refused(model):
    left_out = (("in_layers|out_layers|skip_connection|proj_in|proj_out|op|conv|input_blocks.0.0|out.2", 0),)
    found = targets_of(model, "PiSSA", targets="linear + conv", block_ranks=left_out)
    assert found
    assert found == [path for path in targets_of(model, "PiSSA", targets="all linear") if path in found]


def test_boft_takes_the_largest_block_that_divides_all_layers(model):
    with models.in_training(model, "SD1", method="BOFT", rank=5) as training:
        sizes = {parameter.shape[-1] for name, parameter in training.plan.trainables.items() if "boft_R" in name}
    assert sizes == {4}
    layers = {"a": torch.nn.Linear(9, 2), "b": torch.nn.Linear(4, 2)}
    with pytest.raises(SettingsError, match="a block of 2 to 5 inputs that divides the widths of all layers .4, 9."):
        METHODS["BOFT"].config(models.recipe("SD1", method="BOFT", rank=5), layers, {})


def test_ia3_scales_the_inner_activation_of_a_feed_forward_part(model):
    """And the outputs of all others (the paper's section 3.3): one as a full difference, the others as a magnitude."""
    with models.in_training(model, "SD1", **fields_of("IA3")) as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    ends = {}
    for name in adapter:
        layer, _, end = name.partition(".")
        ends.setdefault(layer, set()).add(end)
    assert all(("diff" in found) == ("ff_net_2" in layer) for layer, found in ends.items())


@pytest.mark.parametrize("kind", ["PiSSA", "OFT", "IA3"])
def test_the_self_check_holds_where_the_start_is_not_zero(kind, model):
    """Run the gradient check that a user of an unknown model family gets before step 1."""
    with models.in_training(model, "SD1", method=kind) as training:
        assert check_gradient(training.losses, training.plan.trainables) <= 5e-3


# Key sets as other trainers write them, for one attention and one text layer of a tiny SD1.
PLACE = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
DIFFUSERS_PLACE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT, FLAT_DIFFUSERS = PLACE.replace(".", "_"), DIFFUSERS_PLACE.replace(".", "_")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
FOREIGN = {
    "kohya": (f"lora_unet_{FLAT_DIFFUSERS}.", DOWN_UP, True),
    "kohya, model's own names": (f"lora_unet_{FLAT}.", DOWN_UP, True),
    "OneTrainer": (f"lora_unet_{FLAT_DIFFUSERS}.", DOWN_UP, True),
    "OneTrainer, with points": (f"lora_unet.{DIFFUSERS_PLACE}.", DOWN_UP, True),
    "OneTrainer, OMI": (f"unet.{PLACE}.", DOWN_UP, True),
    "ai-toolkit": (f"lora_unet_{FLAT}.", DOWN_UP, True),
    "ai-toolkit, newer": (f"diffusion_model.{PLACE}.", ("lora_A.weight", "lora_B.weight"), False),
    "diffusers": (f"unet.{DIFFUSERS_PLACE}.", ("lora_A.weight", "lora_B.weight"), False),
    "diffusers, older": (f"unet.{DIFFUSERS_PLACE}.", ("lora.down.weight", "lora.up.weight"), False),
    "diffusers, oldest": (
        f"unet.{DIFFUSERS_PLACE.replace('.to_q', '.processor.to_q')}_lora.",
        ("down.weight", "up.weight"),
        False,
    ),
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_files_of_other_trainers_load_and_apply(layout, model, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter, unread_keys

    start, ends, with_alpha = FOREIGN[layout]
    source = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 32, generator=source), torch.randn(32, 2, generator=source)
    tensors = {start + ends[0]: down, start + ends[1]: up}
    if with_alpha:
        tensors[f"{start}alpha"] = torch.tensor(1.0)
    if layout.startswith("OneTrainer"):
        tensors["bundle_emb.cat.clip_l"] = torch.zeros(1, 48)
    path = tmp_path / "a.safetensors"
    files.write_tensors(str(path), tensors, {})
    adapter = load_adapter(str(path))
    assert unread_keys(model, None, adapter) == []
    if layout != "ai-toolkit, newer" and layout != "diffusers, oldest":
        # Keys that the host reads only by luck get the names that training starts from and tools expect.
        assert {name.partition(".")[2] for name in adapter} <= {*DOWN_UP, "alpha"}
    applied, _ = apply_adapter(model, None, adapter, 1.0, 0.0)
    changed, before = merged(applied), weights(model)
    name = f"diffusion_model.{PLACE}.weight"
    expected = up @ down * (0.5 if with_alpha else 1.0)
    assert models.distance(changed[name] - before[name], expected) <= 1e-5
    assert all(torch.equal(changed[other], before[other]) for other in before if other != name)


@pytest.mark.parametrize(
    "place, flux",
    [
        ("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight", True),
        ("lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight", True),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", True),
        ("base_model.model.single_transformer_blocks.0.attn.to_k.lora_A.weight", False),
    ],
)
def test_names_of_flux_files_are_left_to_the_host(place, flux):
    """The names of ai-toolkit, OneTrainer and kohya stay; peft's are converted to the first."""
    from graft_pack.nodes.host.model.lora import unread_keys
    from graft_pack.trainers.formats.convert import host_names, host_tensors
    from graft_pack.trainers.formats.peft_format import PeftAdapter

    pair = {"lora_A": "lora_B", "lora_down": "lora_up"}
    stem = next(name for name in pair if name in place)
    width = 64
    up = torch.randn(3 * width if "qkv" in place else width, 2)
    tensors = {place: torch.randn(2, width), place.replace(stem, pair[stem]): up}
    if flux:
        found = host_names(tensors)
        assert found == tensors
    else:
        held = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        found = host_tensors(PeftAdapter("LoRA", {}, held, False, {next(iter(held)).split(".lora_")[0]: 1.0}))
    assert unread_keys(models.patcher("Flux"), None, found) == []


def test_a_peft_file_without_its_configuration_is_refused(model, tmp_path):
    """Its alpha is in the configuration: without it the adapter would be applied at a strength that nobody chose."""
    path = tmp_path / "a" / "adapter_model.safetensors"
    with models.in_training(model, "SD1") as training:
        save_adapter(str(path), training.plan.export(training.plan.trainables, 0).adapter, "a", "peft")
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="adapter_config.json"):
        load_adapter(str(path))


def test_what_lost_its_form_on_the_way_is_converted_or_refused(done, case, model, base, unet, tmp_path):
    """A kohya file has all that peft needs, except where its values depend on the model's weights."""
    from peft import PeftModel

    plain = Adapter(dict(done.adapter), {"graft_recipe": f'{{"method": "{type_of(case)}"}}'})
    path = tmp_path / "x" / "adapter_model.safetensors"
    if case == "LoKr tucker":
        # peft decomposes the first factor of all layers or of none.
        with pytest.raises(ModelError, match="has another type than .*connect the training node itself"):
            save_adapter(str(path), plain, case, "peft")
        return
    if type_of(case) in ("DoRA", "OFT", "BOFT", "IA3") or done.adapter.native is None:
        for format in ("diffusers", "peft"):
            with pytest.raises(ModelError, match=f"'{format}'.*(ComfyUI's formula.*the model|no form for)"):
                save_adapter(str(path), plain, case, format)
        assert list(tmp_path.iterdir()) == []
        return
    save_adapter(str(path), plain, case, "peft")
    # The tests before leave their adapters in the model's weights.
    weights(model)
    network = unet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(network, str(path.parent))
    assert_applied(diffusers_output(loaded.base_model.model), done, base)


def test_an_adapter_that_is_not_finite_is_not_saved(tmp_path):
    broken = Adapter({"lora_unet_x.alpha": torch.tensor(float("nan"))})
    with pytest.raises(ModelError, match="lora_unet_x.alpha is not finite"):
        save_adapter(str(tmp_path / "a.safetensors"), broken, "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["OFT", "IA3", "LoKr"])
def test_another_architecture_is_refused_by_name(case, model, tmp_path):
    from graft_pack.nodes.host.model.lora import apply_adapter

    adapter = train(model, case, tmp_path, steps=1).adapter
    with pytest.raises(ModelError, match="fits no layer of the connected model .*Flux"):
        apply_adapter(models.patcher("Flux"), None, adapter, 1.0, 1.0)


@pytest.mark.parametrize("case", ["LoRA", "BOFT"])
def test_another_size_of_the_same_architecture_is_refused_by_name(case, model, tmp_path):
    """For example SD1's files on SD2: the names match, and the host would only skip them."""
    import comfy.model_patcher
    from graft_pack.nodes.host.model.lora import apply_adapter

    adapter = train(model, case, tmp_path, steps=1).adapter
    config = models.FAMILIES["SD1"].build()
    config.unet_config["context_dim"] = 64
    config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    other = comfy.model_patcher.ModelPatcher(config.get_model({}, "", device="cpu"), cpu, cpu)
    with pytest.raises(ModelError, match="made for another model: its part for .*attn2.* (has the shape|numbers)"):
        apply_adapter(other, None, adapter, 1.0, 1.0)


def test_a_saved_file_says_what_it_was_made_with_and_shows_it(tmp_path):
    import base64
    import io
    import json

    from PIL import Image

    result = diffusers_host.run_session(
        tmp_path, method="LoHa", steps=2, preview_prompts=("a red picture",), preview_steps=1
    )
    metadata = result.adapter.metadata
    assert metadata["ss_network_module"] == "lycoris.kohya"
    assert json.loads(metadata["ss_network_args"]) == {"algo": "loha"}
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert json.loads(metadata["graft_recipe"])["method"] == "LoHa"
    assert result.run.name.endswith(metadata["graft_identity"][:8])
    head, data = metadata["modelspec.thumbnail"].split(",")
    assert head == "data:image/jpeg;base64"
    assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 256


def test_the_nodes_save_each_format_and_load_it_again(done, case, model, base, comfy, monkeypatch):
    """Saved under a chosen name in output/loras, it is listed at once, and a training can start from it."""
    import folder_paths
    from graft_pack.nodes.adapter import GraftLoadAdapter, GraftSaveAdapter
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.nodes.options import GraftAdapterOptions

    if case not in ("LoRA", "LoKr conv", "OFT"):
        return
    # ComfyUI's main.py does this at its start.
    known, endings = folder_paths.folder_names_and_paths["loras"]
    mine = str(comfy.base / "output" / "loras")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*known, mine], endings))
    for format in FORMATS:
        prefix = f"mine/{case} {format}".replace(" ", "-")
        if case != "LoRA" and format == "diffusers":
            with pytest.raises(ModelError, match="Graft Save Adapter.*input 'format'.*does not know"):
                GraftSaveAdapter.execute(done.adapter, prefix, format)
            continue
        path = GraftSaveAdapter.execute(done.adapter, prefix, format).args[0]
        name = os.path.relpath(path, comfy.base / "output" / "loras")
        assert name == f"{prefix}_00001_" + ("/adapter_model.safetensors" if format == "peft" else ".safetensors")
        assert GraftLoadAdapter.validate_inputs(adapter_name=name) is True
        assert GraftAdapterOptions.validate_inputs(start_from=name) is True
        assert GraftAdapterOptions.fingerprint_inputs(name) == GraftLoadAdapter.fingerprint_inputs(name)
        assert load_adapter(path).metadata["modelspec.title"] == f"{os.path.basename(prefix)}_00001"
        back = GraftLoadAdapter.execute(name).args[0]
        applied, _ = apply_adapter(model, None, back, 1.0, 0.0)
        assert_applied(output_of(applied), done, base)


def test_the_option_node_hands_on_what_was_set():
    from graft_pack.nodes.options import GraftAdapterOptions
    from graft_pack.trainers.recipe.options import OPTIONS

    unset = {name: option.unset for name, option in OPTIONS["adapter"].items()}
    assert GraftAdapterOptions.execute(**unset).args[0] == {}
    found = GraftAdapterOptions.execute(**{**unset, "type": "LoKr", "block_ranks": "attn2=2"}).args[0]
    assert found == {("adapter", "type"): "LoKr", ("adapter", "block_ranks"): "attn2=2"}
    with pytest.raises(SettingsError, match="Graft Adapter Options, input 'block_ranks'.*not pattern=value"):
        GraftAdapterOptions.execute(**{**unset, "block_ranks": "attn2"})
    assert "no adapter 'gone'" in GraftAdapterOptions.validate_inputs(start_from="gone")
    assert GraftAdapterOptions.validate_inputs(start_from="auto") is True
