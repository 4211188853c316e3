"""Tests of the adapter tools against the host: its own loader applies their results to its own models."""

import logging

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import Adapter, load_adapter, save_adapter
from graft_pack.trainers.memory.tracking import TensorTracker
from graft_pack.trainers.tools.merge import weights_of

from tests.support import models
from tests.support.adapters import added, differences, make_adapter, make_model

pytestmark = pytest.mark.usefixtures("comfy")

LINEARS = {"targets": "all linear"}
ALL = {"targets": "linear + conv"}
# Types whose weight difference needs no model weights, on the layers that support them.
TYPES = {
    "LoRA": LINEARS,
    "LoRA with conv": ALL,
    "rsLoRA": LINEARS,
    "PiSSA": LINEARS,
    "LoHa": ALL,
    "LoKr": ALL,
    "OFT": LINEARS,
    "BOFT": LINEARS,
}
NEEDY = {"DoRA": ALL, "IA3": LINEARS}

_made = {}


def adapter_of(kind, name="SD1", seed=0, **fields):
    """Return an adapter of a type, made once."""
    key = kind, name, seed, tuple(fields.items())
    if key not in _made:
        chosen = {**TYPES, **NEEDY}[kind]
        _made[key] = make_adapter(name, seed, method=kind, rank=4, alpha=3.0, **{**chosen, **fields})
    return _made[key]


@pytest.fixture(scope="module")
def model():
    return make_model("SD1")


@pytest.fixture(scope="module")
def flux():
    return make_model("Flux")


def execute(node, *args, **fields):
    from graft_pack.nodes import tools

    return getattr(tools, node).execute(*args, **fields).args


def merge(a, b, weight_a=1.0, weight_b=1.0, method="weighted sum", rank=0, density=0.5, seed=0):
    return execute("GraftMergeAdapters", a, b, weight_a, weight_b, method, rank, density, seed)[0]


def resize(adapter, rank, energy=1.0):
    return execute("GraftResizeAdapter", adapter, rank, energy)[0]


def extract(tuned, base, rank=0, energy=1.0, conv="low-rank", rest="whole", **clips):
    return execute("GraftExtractAdapter", tuned, base, rank, energy, conv, rest, **clips)


def through_a_file(comfy, adapter, model, name, strength=1.0):
    """Save the adapter with Graft Save Adapter's writer; return what core's LoraLoader then adds to the weights."""
    import nodes

    path = comfy.base / "models" / "loras" / f"tools-{name}.safetensors"
    save_adapter(str(path), adapter, name)
    applied, _ = nodes.LoraLoader().load_lora(model, None, path.name, strength, 0.0)
    return differences(applied)


def assert_same(found, expected, bar=1e-5):
    """Check that each weight's difference is off by at most a fraction of the expected one."""
    assert {key for key, value in found.items() if value.norm() > 0} == {
        key for key, value in expected.items() if value.norm() > 0
    }
    for key, value in expected.items():
        assert (found[key] - value).norm() <= bar * value.norm(), key


def summed(*parts):
    """Return {key: sum of weight times difference}."""
    total = {}
    for differing, weight in parts:
        for key, value in differing.items():
            total[key] = total.get(key, 0) + weight * value
    return total


def assert_own(adapter):
    """Check that a LORA_MODEL's tensors are contiguous, float32, on the CPU, and share no storage."""
    tensors = list(adapter.values())
    assert all(one.is_contiguous() and one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)
    assert len({one.untyped_storage().data_ptr() for one in tensors}) == len(tensors)


# Merging


@pytest.mark.parametrize("kind", TYPES)
def test_the_host_applies_a_merged_file_as_it_applies_both(kind, model, comfy, caplog):
    a, b = adapter_of(kind), adapter_of("LoRA with conv", seed=1)
    found = merge(a, b, 0.7, -0.4)
    assert_own(found)
    caplog.set_level(logging.WARNING)
    expected = summed((added(model, a), 0.7), (added(model, b), -0.4))
    assert_same(through_a_file(comfy, found, model, kind), expected)
    assert "not loaded" not in caplog.text.lower()


@pytest.mark.parametrize("kind", TYPES)
def test_two_of_one_type_merge(kind, model):
    a, b = adapter_of(kind), adapter_of(kind, seed=1)
    assert_same(added(model, merge(a, b, 1.0, 0.5)), summed((added(model, a), 1.0), (added(model, b), 0.5)))


def test_flux_adapters_merge(flux, comfy):
    a, b = adapter_of("LoRA", "Flux"), adapter_of("LoKr", "Flux", targets="all linear", seed=1)
    expected = summed((added(flux, a), 0.5), (added(flux, b), 1.0))
    assert_same(through_a_file(comfy, merge(a, b, 0.5, 1.0), flux, "flux"), expected)


def test_layers_that_one_has_alone_are_kept(model):
    early = adapter_of("LoRA", block_ranks=(("output_blocks", 0),))
    late = adapter_of("LoRA", seed=1, block_ranks=(("input_blocks", 0),))
    found = merge(early, late, 1.0, 2.0)
    ours, theirs = added(model, early), added(model, late)
    assert ours.keys() - theirs.keys() and theirs.keys() - ours.keys() and ours.keys() & theirs.keys()
    assert_same(added(model, found), summed((ours, 1.0), (theirs, 2.0)))


@pytest.mark.parametrize("name", ["SD1", "Flux"])
@pytest.mark.parametrize("kind", ["LoRA", "LoKr", "DoRA"])
def test_no_tool_loses_norms_and_biases(kind, name, model, flux, comfy):
    """Merged, resized, extracted and reported are all of the tensors that training makes."""
    network = flux if name == "Flux" else model
    arguments = (("train_norm", True), ("train_bias", True))
    given = adapter_of(kind, name, targets="all linear", adapter_args=arguments)
    # A run's file names its type, by which readers know the formula of magnitudes.
    given = Adapter(given, {**given.metadata, "graft_recipe": f'{{"method": "{kind}"}}'})
    other = adapter_of("LoRA", name, seed=1)
    expected = added(network, given)
    assert any("norm" in key for key in expected) and any(key.endswith(".bias") for key in expected)
    assert_same(through_a_file(comfy, given, network, f"{kind} {name}"), expected)
    how = {} if kind != "DoRA" else {"model": network}
    merged = execute("GraftMergeAdapters", given, other, 0.5, 2.0, "weighted sum", 0, 0.5, 0, **how)[0]
    assert_same(added(network, merged), summed((expected, 0.5), (added(network, other), 2.0)))
    assert_same(added(network, execute("GraftResizeAdapter", given, 0, 1.0, **how)[0]), expected)
    assert_same(added(network, extract(apply(network, given), network)[0]), expected, 1e-4)
    report = inspect(given, network)[1]
    assert f"{len(given)} of {len(given)} keys" in report and "whole difference" in report


def test_text_encoders_are_merged_too(model):
    clip = models.text("SD1")
    place = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    general = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    text = {f"{place}.lora_down.weight": torch.randn(2, 48), f"{place}.lora_up.weight": torch.randn(48, 2)}
    whole = {f"{general}.diff": torch.randn(48, 48), f"{general}.diff_b": torch.randn(48)}
    a, b = Adapter({**adapter_of("LoRA"), **text}), Adapter(whole)
    expected = summed((added(model, a, clip), 0.5), (added(model, b, clip), 2.0))
    assert_same(added(model, merge(a, b, 0.5, 2.0), clip), expected)


def test_svd_is_the_sum_in_less(model):
    a, b = adapter_of("LoRA with conv"), adapter_of("LoRA with conv", seed=1)
    both = merge(a, merge(a, b, 1.0, 0.5))
    less = merge(a, merge(a, b, 1.0, 0.5), method="SVD")
    assert_same(added(model, less), added(model, both))
    assert sum(value.numel() for value in less.values()) < sum(value.numel() for value in both.values())


@pytest.mark.parametrize("method", ["TIES", "DARE", "DARE + TIES", "magnitude prune"])
def test_keeping_all_of_one_is_that_one(method, model):
    """At density 1, without conflicts, each method gives the sum; on layers of both, TIES gives another mean."""
    a, b = adapter_of("LoRA"), adapter_of("LoRA", seed=1)
    nothing = Adapter({name: torch.zeros_like(value) for name, value in b.items()})
    assert_same(added(model, merge(a, nothing, method=method, density=1.0)), added(model, a))
    whole = added(model, merge(a, b, method=method))
    assert models.distance(joined(whole), joined(summed((added(model, a), 1), (added(model, b), 1)))) > 0.1


def joined(differing):
    return models.joined(differing[key] for key in sorted(differing))


def test_what_is_known_only_beside_the_weights_is_refused_and_the_cure_works(model):
    """Applying both in turn and extracting the difference is exact for every type."""
    for kind in NEEDY:
        a, b = adapter_of(kind), adapter_of("LoRA", seed=1)
        with pytest.raises(ModelError, match="Graft Merge Adapters, input 'adapter_a'.*magnitudes.*Graft Extract"):
            merge(a, b)
        first = apply(model, a)
        both = apply(first, b)
        found, _ = extract(both, model)
        assert_same(added(model, found), differences(both), 1e-4)


def apply(model, adapter, clip=None, strength=1.0):
    from graft_pack.nodes.host.model.lora import apply_adapter

    applied, text = apply_adapter(model, clip, adapter, strength, strength)
    return applied if clip is None else (applied, text)


def test_adapters_of_different_models_are_refused_by_name(model):
    with pytest.raises(ModelError, match="Graft Merge Adapters, input 'adapter_b'.*different"):
        merge(adapter_of("LoRA"), adapter_of("LoRA", "Flux"))
    a = adapter_of("LoRA")
    wide = Adapter(
        {
            name: torch.cat([value, value], dim=1) if "attn2_to_k.lora_down" in name else value
            for name, value in a.items()
        }
    )
    with pytest.raises(ModelError, match=r"are for different models: the layer lora_unet_\w+attn2_to_k has the shape"):
        merge(a, wide)


# Resizing


@pytest.mark.parametrize("kind", TYPES)
def test_resizing_with_nothing_to_lose_changes_nothing(kind, model):
    """For full differences and products, the lossless rank is the layer's own."""
    given = adapter_of(kind)
    before = added(model, given)
    assert_same(added(model, resize(given, 0)), before, 0.0)
    assert_same(added(model, resize(given, 4096)), before)


@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_half_the_rank_is_the_best_of_half_the_rank(name, model, flux):
    given = adapter_of("LoRA", name)
    on = model if name == "SD1" else flux
    found = resize(given, 2)
    assert_own(found)
    after = added(on, found)
    for key, value in added(on, given).items():
        left = torch.linalg.svdvals(value.flatten(1).double())[2:].norm()
        assert (after[key] - value).double().norm() <= left * (1 + 1e-4)
    assert sum(value.numel() for value in found.values()) < 0.6 * sum(value.numel() for value in given.values())


def test_a_resized_adapter_is_saved_and_trained_on(model, comfy, tmp_path):
    found = resize(adapter_of("LoRA"), 2)
    assert_same(through_a_file(comfy, found, model, "resized"), added(model, found))
    assert {float(value) for name, value in found.items() if name.endswith("alpha")} == {2.0}
    path = str(tmp_path / "a.safetensors")
    save_adapter(path, found, "x", "diffusers")
    assert_same(added(model, load_adapter(path)), added(model, found))


def test_magnitudes_are_not_resized():
    with pytest.raises(ModelError, match="Graft Resize Adapter, input 'adapter'.*magnitudes"):
        resize(adapter_of("DoRA"), 2)


# Extracting


@pytest.mark.parametrize("kind", [*TYPES, *NEEDY])
def test_what_an_adapter_does_can_be_extracted_again(kind, model):
    """At full rank, for every type; the graph's weights stay unchanged."""
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    tuned = apply(model, adapter_of(kind))
    found, report = extract(tuned, model)
    assert_own(found)
    assert_same(added(model, found), differences(tuned), 1e-4)
    assert "100.0000%" in report
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_the_rank_it_had_is_enough(name, model, flux):
    on = model if name == "SD1" else flux
    tuned = apply(on, adapter_of("LoRA", name))
    found, _ = extract(tuned, on, rank=4)
    assert {value.shape[0] for key, value in found.items() if key.endswith("lora_down.weight")} == {4}
    assert_same(added(on, found), differences(tuned), 1e-4)


@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_another_checkpoint_predicts_alike_through_its_difference(name, model, flux):
    """All weights differ, including convolutions, norms, biases and parameters without a layer."""
    on = model if name == "SD1" else flux
    with torch.inference_mode():
        tuned = models.patcher(name, seed=1)
    found, report = extract(tuned, on)
    wanted, x, one = SIGMA[name], probe(name), models.conditioning(name, 9)
    target = models.denoised(tuned, x, wanted, one)
    assert models.distance(models.denoised(apply(on, found), x, wanted, one), target) <= 1e-4
    assert models.distance(models.denoised(on, x, wanted, one), target) > 1e-2
    assert "the same in both: 0" in report


SIGMA = {"SD1": 2.0, "Flux": 0.6}


def probe(name):
    return torch.randn(1, *models.FAMILIES[name].latent, generator=torch.Generator().manual_seed(9))


def test_patches_on_the_base_count_as_part_of_it(model):
    a, b = adapter_of("LoRA"), adapter_of("LoRA with conv", seed=1)
    base = apply(model, a, strength=0.5)
    found, _ = extract(apply(base, b), base)
    assert_same(added(model, found), added(model, b), 1e-4)


def test_weights_that_a_clone_has_patched_in_place_are_seen_through(model):
    """A loaded clone's LoRA sits in the shared weights, where a magnitude would give another difference."""
    import comfy.model_management

    tuned = apply(model, adapter_of("DoRA"))
    expected = differences(tuned)
    other = apply(model, adapter_of("LoRA", seed=1))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([other], force_patch_weights=True)
        found, _ = extract(tuned, model)
        comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    assert_same(added(model, found), expected, 1e-4)


def test_text_encoders_are_extracted_too(model):
    base = models.text("SD1")
    tuned = models.text("SD1", seed=1)
    found, report = extract(apply(model, adapter_of("LoRA")), model, clip_tuned=tuned, clip_base=base)
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_self_attn_q_proj.") for key in found)
    _, applied = apply(model, found, base)
    weights = dict(tuned.cond_stage_model.named_parameters())
    changed = differences(applied.patcher)
    before = dict(base.cond_stage_model.named_parameters())
    for key, value in changed.items():
        assert models.distance(before[key] + value, weights[key]) <= 1e-4, key
    # Weights that no host adapter can hold are named in the report; none of them affects conditioning.
    left = {key for key in weights if key not in changed and not torch.equal(weights[key], before[key])}
    assert all("logit_scale" in key or "text_projection" in key for key in left)
    assert all(key in report for key in left)
    with pytest.raises(ModelError, match="input 'clip_base'.*not connected"):
        extract(model, model, clip_tuned=tuned)


def test_convolutions_norms_and_biases_as_asked(model):
    with torch.inference_mode():
        tuned = models.patcher("SD1", seed=1)

    def ends(found, name):
        return {key.partition(".")[2] for key in found if key.startswith(f"{name}.")}

    conv, norm, linear = "lora_unet_conv_in", "lora_unet_conv_norm_out", "lora_unet_time_embedding_linear_1"
    low = {"lora_down.weight", "lora_up.weight", "alpha"}
    found, _ = extract(tuned, model, rank=2)
    assert (ends(found, conv), ends(found, norm)) == ({*low, "diff_b"}, {"diff", "diff_b"})
    found, _ = extract(tuned, model, rank=2, conv="whole", rest="leave out")
    assert (ends(found, conv), ends(found, norm), ends(found, linear)) == ({"diff"}, set(), low)
    found, report = extract(tuned, model, rank=2, conv="leave out", rest="leave out")
    assert ends(found, conv) == ends(found, norm) == set()
    assert "Differences left out" in report
    assert not any(key.endswith((".diff", ".diff_b")) for key in found)


def test_energy_says_how_much_is_kept(model):
    with torch.inference_mode():
        tuned = models.patcher("SD1", seed=1)
    found, report = extract(tuned, model, energy=0.6)
    share = float(report.split("Kept: ")[1].split("%")[0]) / 100
    wanted = {key: tuned.model.state_dict()[key] - value for key, value in model.model.state_dict().items()}
    got = added(model, found)
    lost = sum(float((got[key] - wanted[key]).double().square().sum()) for key in got)
    total = sum(float(wanted[key].double().square().sum()) for key in got)
    assert share == pytest.approx(1 - lost / total, abs=1e-4)
    assert 0.6 <= share < 0.8


def test_only_one_layer_is_held_at_a_time(model):
    """Besides the result, there is no whole copy of either model."""
    adapter = adapter_of("LoRA")
    tuned = apply(model, adapter)
    weights = list(model.model.parameters())
    with TensorTracker(passed_over=[*weights, *adapter.values()]) as live:
        extract(tuned, model, rank=2)
    assert live.peak < 0.5 * sum(weight.nbytes for weight in weights)


def test_what_cannot_be_extracted_is_refused_by_name(model, flux):
    with pytest.raises(ModelError, match="Graft Extract Adapter, input 'model_tuned'.*different architectures"):
        extract(flux, model)
    with pytest.raises(ModelError, match="same weights: there is nothing"):
        extract(model.clone(), model)
    tuned = apply(model, Adapter({"lora_unet_conv_in.diff": torch.ones(32, 4, 3, 3)}))
    with pytest.raises(ModelError, match="The options leave out all differences, such as lora_unet_conv_in"):
        extract(tuned, model, conv="leave out", rest="leave out")
    with pytest.raises(SettingsError, match="Graft Extract Adapter, input 'energy'"):
        extract(tuned, model, energy=0.0)
    from graft_pack.nodes.host.model.lora import apply_adapter

    ranged, _ = apply_adapter(model, None, adapter_of("LoRA"), 1.0, 0.0, (), (0.0, 0.5))
    with pytest.raises(ModelError, match="input 'model_tuned'.*a part of sampling only; extraction"):
        extract(ranged, model)


# Every layout that the host reads, checked by the host


def test_each_kind_of_layer_is_read_as_the_host_reads_it(model):
    """Includes layouts that training never writes: Tucker cores, alpha beside low-rank factors, a norm's own keys."""
    place = "diffusion_model.input_blocks.0.0"
    linear = "diffusion_model.time_embed.0"
    r = torch.randn
    layers = {
        "LoRA with a core": (place, {"lora_up.weight": r(32, 3, 1, 1), "lora_mid.weight": r(3, 3, 3, 3)}),
        "LoHa with cores": (place, {"hada_w1_a": r(3, 32), "hada_w1_b": r(3, 4), "hada_w2_a": r(3, 32)}),
        "LoKr, both low": (linear, {"lokr_w1_a": r(8, 2), "lokr_w1_b": r(2, 4), "lokr_w2_a": r(16, 2)}),
        "norm": ("diffusion_model.out.0", {"w_norm": r(32), "b_norm": r(32)}),
        "peft's names": (linear, {"lora_A.weight": r(3, 32), "lora_B.weight": r(128, 3)}),
    }
    more = {
        "LoRA with a core": {"lora_down.weight": r(3, 4, 1, 1), "alpha": torch.tensor(2.0)},
        "LoHa with cores": {
            "hada_w2_b": r(3, 4),
            "hada_t1": r(3, 3, 3, 3),
            "hada_t2": r(3, 3, 3, 3),
            "alpha": torch.tensor(2.0),
        },
        "LoKr, both low": {"lokr_w2_b": r(2, 8), "alpha": torch.tensor(0.5)},
    }
    for kind, (name, ends) in layers.items():
        given = Adapter({f"{name}.{end}": tensor for end, tensor in {**ends, **more.get(kind, {})}.items()})
        expected = added(model, given)
        assert expected and all(value.norm() > 0 for value in expected.values()), kind
        found = merge(given, given, 0.5, 0.25)
        assert_same(added(model, found), summed((expected, 0.75)))
        assert_same(added(model, resize(given, 4096)), expected)


# Inspecting


def inspect(adapter, model=None, clip=None):
    return execute("GraftInspectAdapter", adapter, model, clip)


@pytest.mark.parametrize("kind", [*TYPES, *NEEDY])
def test_the_report_says_what_it_is_and_that_it_fits(kind, model):
    given = adapter_of(kind)
    image, report = inspect(given, model)
    assert image.dtype == torch.float32 and image.shape[-1] == 3 and 0 <= image.min() < image.max() <= 1
    assert f"Fits the connected model (SD15): {len(given)} of {len(given)} keys." in report
    assert f"trained as {kind}" in report
    shown = {"PiSSA": "Rank: 8", "LoHa": "Rank: 4", "LoRA": "Rank: 4"}.get(kind, "")
    assert shown in report
    assert "Title: SD1 0" in report


def test_norms_are_those_of_what_the_host_adds(model):
    """Per block, named by the connected model's paths; without a model, as the file names them."""
    from graft_pack.nodes.host.model.lora import fit, path_of
    from graft_pack.trainers.tools import inspect as looking

    for kind in TYPES:
        given = adapter_of(kind)
        expected = {}
        for key, value in added(model, given).items():
            block = ".".join(path_of(key).split(".")[:2]).removesuffix(".0" if "middle" in key else "")
            block = "middle_block" if "middle" in key else block
            expected[block] = expected.get(block, 0.0) + float(value.double().square().sum())
        found = dict(looking.block_norms(looking.look(given, fit(model, None, given).paths)))
        for block, square in expected.items():
            if block.startswith(("input", "middle", "output")):
                assert found[block] == pytest.approx(square**0.5, rel=1e-4), (kind, block)
    assert "down_blocks.0" in dict(looking.block_norms(looking.look(adapter_of("LoRA"))))


def test_the_report_says_what_does_not_fit(model, flux):
    given = adapter_of("LoRA")
    assert "DOES NOT FIT the connected model (Flux): it has none of the adapter's" in inspect(given, flux)[1]
    wide = {
        name: torch.cat([value, value], dim=1) if "attn2_to_k.lora_down" in name else value
        for name, value in given.items()
    }
    report = inspect(Adapter(wide), model)[1]
    assert "DOES NOT FIT the connected model (SD15), which has the same layers in another size" in report
    down = next(tuple(value.shape) for name, value in wide.items() if "attn2_to_k.lora_down" in name)
    assert f"attn2.to_k.weight has the shape [{1536 * 2 // down[1]}, {down[1]}], the layer [" in report
    odd = Adapter({**given, "lora_unet_nowhere.alpha": torch.tensor(1.0), "strange": torch.ones(1)})
    report = inspect(odd, model)[1]
    assert f"{len(given)} of {len(given) + 2} keys" in report
    assert "2 keys fit no layer: lora_unet_nowhere.alpha, strange" in report
    assert "1 keys belong to no layer: strange" in report
    assert "Connect a model" in inspect(given)[1]


def test_text_parts_are_told_apart(model):
    place = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj"
    text = {}
    for layer in range(2):
        text[f"{place.format(layer)}.lora_down.weight"] = torch.randn(2, 48)
        text[f"{place.format(layer)}.lora_up.weight"] = torch.randn(48, 2)
    given = Adapter({**adapter_of("LoRA"), **text})
    layers = len(adapter_of("LoRA")) // 3
    alone, both = inspect(given, model)[1], inspect(given, model, models.text("SD1"))[1]
    assert f"Layers: {layers} of the model, 2 of text encoders" in both
    assert f"{len(given)} of {len(given)} keys" in both
    assert f"{len(given) - 4} of {len(given) - 4} keys" in alone
    assert "Ranks: 2 (2 layers), 4 (" in both


def test_metadata_is_told_and_oddities_do_not_stop_it():
    said = {
        "modelspec.trigger_phrase": "ohwx dog",
        "ss_sd_model_name": "base.safetensors",
        "ss_steps": "700",
        "graft_made": "[3]",
        "graft_recipe": "not json",
    }
    report = inspect(Adapter(adapter_of("LoRA"), said))[1]
    assert "Trigger: ohwx dog" in report and "Base: base.safetensors" in report and "Steps: 700" in report
    merged = merge(adapter_of("LoRA"), adapter_of("LoRA", seed=1), method="TIES")
    assert "Made by merge (" in (told := inspect(merged)[1]) and "of SD1 0 and SD1 1" in told
    assert "NOT FINITE" in inspect(Adapter({"x.diff": torch.tensor([[float("nan")]])}))[1]
    assert "changes nothing" in inspect(Adapter({"x.diff": torch.zeros(2, 2)}))[1]
    assert "No layers to apply" in inspect(Adapter({}))[1]


def test_the_picture_stays_small_for_large_models():
    from graft_pack.trainers.tools import plots

    rows = [(f"double_blocks.{index}", 1.0) for index in range(19)]
    rows += [(f"single_blocks.{index}", 2.0) for index in range(38)]
    found = plots.joined(rows, 36)
    assert len(found) <= 36
    assert found[0] == ("double_blocks.0-1", pytest.approx(2**0.5))
    assert sum(value**2 for _, value in found) == pytest.approx(19 + 4 * 38)
    assert plots.joined(rows[:5], 36) == rows[:5]


NAME = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"


def odd_parts(out, inputs):
    """Return one layer's tensors per layout, which fit each other and no layer of [out, inputs]."""
    one, two = torch.ones(2, 2), torch.ones
    small = {
        "hada_w1_a": two(out, 2),
        "hada_w1_b": two(2, inputs),
        "hada_w2_a": two(out, 2),
        "hada_w2_b": two(2, inputs),
    }
    lora = {"lora_up.weight": two(out, 2), "lora_down.weight": two(2, inputs)}
    tucker = {"hada_w1_a": two(2, out), "hada_w1_b": two(2, inputs), "hada_t1": two(2, 2, 3, 3)}
    tucker |= {name.replace("1", "2", 1): value for name, value in tucker.items()}
    return {
        "LoRA turned": {"lora_up.weight": two(out * 2, 2), "lora_down.weight": two(2, inputs // 2)},
        "LoRA with a kernel": {**lora, "lora_mid.weight": two(2, 2, 3, 3)},
        "LoHa": {**small, "hada_w1_a": two(out * 2, 2), "hada_w2_a": two(out * 2, 2)},
        "LoHa with a kernel": tucker,
        "LoKr": {"lokr_w1": one, "lokr_w2": two(out, inputs)},
        "LoKr in factors": {"lokr_w1": one, "lokr_w2_a": two(out, 1), "lokr_w2_b": two(1, inputs // 2)},
        "LoKr with a kernel": {
            "lokr_w1": one,
            "lokr_w2_a": two(2, out // 2),
            "lokr_w2_b": two(2, inputs // 2),
            "lokr_t2": two(2, 2, 3, 3),
        },
        "OFT": {"oft_blocks": torch.zeros(out, 2, 2)},
        "BOFT": {"oft_blocks": torch.zeros(1, out, 2, 2)},
        "BOFT of odd blocks": {"oft_blocks": torch.zeros(9, out // 2, 2, 2)},
        "OFT rescaled": {"oft_blocks": torch.zeros(out // 2, 2, 2), "rescale": two(out * 2, 1)},
        "GLoRA": {
            "a1.weight": two(inputs, 2),
            "a2.weight": two(2, inputs * 2),
            "b1.weight": two(out, 2),
            "b2.weight": two(2, inputs),
        },
        "DoRA of another length": {**lora, "dora_scale": two(out * 2, 1)},
        "DoRA of more dimensions": {**lora, "dora_scale": two(out, 1, 1, 1)},
        "difference": {"diff": two(out, inputs * 2)},
        "weight": {"set_weight": two(out * 2, inputs)},
        "weight of one number": {"set_weight": torch.ones(1)},
    }


@pytest.mark.parametrize("kind", odd_parts(8, 8))
def test_parts_of_another_size_are_named_in_every_layout(model, kind):
    out, inputs = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight.shape
    given = Adapter({f"{_host_name(model)}.{end}": value for end, value in odd_parts(out, inputs)[kind].items()})
    report = inspect(given, model)[1]
    assert "DOES NOT FIT the connected model (SD15)" in report
    assert f"the layer [{out}, {inputs}]" in report
    with pytest.raises(ModelError, match=rf"attn1.to_q.weight has .*the layer \[{out}, {inputs}\]"):
        apply_to(model, given)


def _host_name(model):
    import comfy.lora

    names = comfy.lora.model_lora_keys_unet(model.model, {})
    wanted = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    return next(name for name, key in names.items() if key == wanted and name.startswith("lora_unet_"))


def apply_to(model, given, clip=None):
    from graft_pack.nodes import adapter

    return adapter.GraftApplyAdapter.execute(model, given, 1.0, 1.0, clip).args


def test_whole_layers_of_every_type_fit(model):
    for kind in (*TYPES, *NEEDY):
        report = inspect(adapter_of(kind), model)[1]
        assert "Fits the connected model" in report, (kind, report)


def test_text_encoder_parts_of_another_size_are_refused(model):
    clip = models.text("SD1")
    key = next(
        name
        for name, _ in clip.cond_stage_model.named_parameters()
        if name.endswith("layers.0.self_attn.q_proj.weight")
    )
    out, inputs = dict(clip.cond_stage_model.named_parameters())[key].shape
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    given = Adapter(
        {f"{name}.lora_up.weight": torch.ones(out + 1, 2), f"{name}.lora_down.weight": torch.ones(2, inputs)}
    )
    with pytest.raises(ModelError, match=rf"q_proj.weight has the shape \[{out + 1}, {inputs}\], the layer \[{out}"):
        apply_to(model, given, clip)


@pytest.mark.parametrize(
    "ends, says",
    [
        ({"lokr_w1": (4, 4)}, "lokr_w2 is missing"),
        ({"lokr_w2": (4, 4)}, "lokr_w1 is missing"),
        ({"lokr_t2": (2, 2, 3, 3), "lokr_w1": (2, 2)}, "lokr_w2_a is missing"),
        ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4)}, "hada_w2_a is missing"),
        ({"hada_w2_a": (4, 2), "hada_w2_b": (2, 4)}, "hada_w1_a is missing"),
        ({"a1.weight": (4, 2), "a2.weight": (2, 4)}, "b1.weight is missing"),
        ({"oft_blocks": (4, 2)}, "oft_blocks has the shape .*must be square"),
        ({"lora_up.weight": (4, 2), "lora_down.weight": (2, 4), "dora_scale": (4,)}, "dora_scale has the shape"),
        (
            {"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2), "hada_w2_b": (2, 8)},
            "products .* do not fit each other",
        ),
    ],
)
def test_half_layers_are_refused_by_every_tool(model, ends, says):
    given = Adapter({f"{NAME}.{end}": torch.ones(shape) for end, shape in ends.items()})
    whole = adapter_of("LoRA")
    for act in (
        lambda: inspect(given, model),
        lambda: apply_to(model, given),
        lambda: merge(given, whole),
        lambda: execute("GraftResizeAdapter", given, 2, 1.0),
    ):
        with pytest.raises(ModelError, match=f"layer {NAME}, .*{says}"):
            act()


def average(a, b, width=0.0):
    return execute("GraftMergeAdapters", a, b, 1.0, 1.0, "average of saves", 0, 0.5, 0, average_width=width)[0]


def test_the_node_averages_the_saves_of_a_run(model, monkeypatch, tmp_path):
    """The widget's method reads the run's folder, and the host applies the result."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    folder = tmp_path / "graft" / "toy-00000001"
    (folder / "adapters").mkdir(parents=True)
    (folder / "recipe.json").write_text('{"recipe": {"steps": 4}, "saves_in_folder": true}')
    saves = [adapter_of("LoRA"), adapter_of("LoRA", seed=1)]
    for step, save in zip((2, 4), saves, strict=True):
        save_adapter(str(folder / "adapters" / f"step-{step:08d}.safetensors"), Adapter(dict(save)), "toy", "kohya")
    last = Adapter(dict(saves[1]), {"graft_run": "toy-00000001", "ss_steps": "4"})
    found = average(last, last, 0.28)
    share = weights_of([2, 4], 0.28)[0]
    for name, tensor in found.items():
        expected = share * saves[0][name] + (1 - share) * saves[1][name]
        assert torch.allclose(tensor, expected, atol=1e-6), name
    assert added(model, found).keys() == added(model, last).keys()
    with pytest.raises(ModelError, match="adapter_b is another adapter"):
        average(last, saves[0])
    with pytest.raises(ModelError, match="adapter_a is not from a run of Graft"):
        average(Adapter({}, {}), last)
    with pytest.raises(SettingsError, match="average_width is set, but method is SVD"):
        execute("GraftMergeAdapters", last, last, 1.0, 1.0, "SVD", 0, 0.5, 0, average_width=0.1)


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_a_preview_is_saved_beside_the_adapter(monkeypatch, tmp_path, format):
    import folder_paths
    from graft_pack.nodes.adapter import GraftSaveAdapter
    from graft_pack.trainers.errors import DatasetError
    from PIL import Image

    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    picture = torch.zeros(2, 4, 6, 3)
    picture[0, ..., 1] = 0.2
    adapter = adapter_of("LoRA")
    GraftSaveAdapter.execute(adapter, "one", format, preview=picture)
    saved = tmp_path / "loras" / "one_00001_.preview.png"
    with Image.open(saved) as image:
        assert image.size == (6, 4) and image.getpixel((0, 0)) == (0, 51, 0)
    GraftSaveAdapter.execute(adapter, "two", format)
    assert [path.name for path in tmp_path.rglob("*.png")] == [saved.name]
    with pytest.raises(DatasetError, match="input 'preview': .*numbers that are not finite"):
        GraftSaveAdapter.execute(adapter, "three", format, preview=picture / 0)
    assert not list(tmp_path.rglob("three*")), "nothing is written"


def test_a_report_lists_the_presets_of_the_models_family(flux, model):
    from graft_pack.nodes.tools import GraftInspectAdapter

    report = GraftInspectAdapter.execute(adapter_of("LoRA", "Flux"), flux).args[1]
    assert "Presets of targets for Flux: single blocks, double blocks, no context blocks" in report
    assert "Presets of targets" not in GraftInspectAdapter.execute(adapter_of("LoRA"), model).args[1]
