"""Tests of adapters applied per block and for a part of sampling, against the host's own predictions."""

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.formats.adapter import Adapter

from tests.support import models
from tests.support.adapters import differences, make_adapter, make_model

pytestmark = pytest.mark.usefixtures("comfy")

# A layer of an early and of a late block of each model.
BLOCKS = {"SD1": ("input_blocks.1", "output_blocks.3"), "Flux": ("double_blocks.0", "single_blocks.1")}
SIGMAS = {"SD1": (8.0, 4.0, 2.0, 1.0, 0.4, 0.0), "Flux": (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)}


def apply(model, adapter, clip=None, strength=1.0, **more):
    from graft_pack.nodes.adapter import GraftApplyAdapter

    return GraftApplyAdapter.execute(model, adapter, strength, strength, clip, **more).args


@pytest.fixture(scope="module", params=BLOCKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return make_model(name)


@pytest.fixture(scope="module")
def adapter(name):
    return make_adapter(name)


def test_a_strength_by_block_multiplies_that_of_its_layers(name, model, adapter):
    early, late = BLOCKS[name]
    whole = differences(apply(model, adapter, strength=0.8)[0])
    found = differences(apply(model, adapter, strength=0.8, block_strengths=f"{early}=0.5\n{late}=0\n")[0])
    seen = set()
    for key, value in whole.items():
        factor = 0.5 if early in key else 0.0 if late in key else 1.0
        seen.add(factor)
        if factor == 0.0:
            assert key not in found
        else:
            assert models.distance(found[key], factor * value) <= 1e-5, key
    assert seen == {0.0, 0.5, 1.0}


def test_the_first_pattern_counts_and_the_text_encoder_has_blocks_too():
    model, clip = make_model("SD1"), models.text("SD1")
    down, up = torch.randn(2, 48), torch.randn(48, 2)
    place = "lora_te_text_model_encoder_layers_{}_self_attn_q_proj.lora_{}.weight"
    ends = (("down", down), ("up", up))
    text = {place.format(layer, end): value for layer in range(2) for end, value in ends}
    adapter = Adapter({**make_adapter("SD1"), **text})
    _, out = apply(model, adapter, clip, block_strengths="layers.1.self_attn=0.25 encoder=2")
    found = [differences(out.patcher)[key] for key in sorted(out.patcher.patches)]
    assert models.distance(found[0], 2 * up @ down) <= 1e-5
    assert models.distance(found[1], 0.25 * up @ down) <= 1e-5


def test_a_pattern_in_no_path_is_refused_by_name(model, adapter):
    with pytest.raises(SettingsError, match="Graft Apply Adapter, input 'block_strengths'.*'midle_block'.*no layer"):
        apply(model, adapter, block_strengths="midle_block=0.5")
    with pytest.raises(SettingsError, match="not pattern=value with a value between -100"):
        apply(model, adapter, block_strengths="attn=nan")


def test_untouched_it_is_what_the_host_does(model, adapter):
    """With the new inputs at their defaults: the host's own list of patches, and no sampling wrapper."""
    import comfy.sd

    out, _ = apply(model, adapter, strength=0.7)
    host, _ = comfy.sd.load_lora_for_models(model, None, adapter, 0.7, 0.0)
    assert out.wrappers == host.wrappers
    assert out.hook_patches == host.hook_patches == {}
    mine, theirs = differences(out), differences(host)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def sample(model, name, cfg=1.0, hooks=None):
    """Return [(sigma, x, x0)] for each step of the host's own sampler."""
    import comfy.samplers

    seen = []
    one = models.conditioning(name, 9)
    tensors = dict(one.tensors)
    facts = {"width": 640, "height": 480, "guidance": 1.0}
    positive = [[tensors.pop("cross_attn"), {**facts, **tensors, **({"hooks": hooks} if hooks else {})}]]
    negative = [[torch.zeros_like(positive[0][0]), {**facts, **tensors}]]
    sigmas = torch.tensor(SIGMAS[name])

    def note(step, x0, x, total):
        seen.append((float(sigmas[step]), x.clone(), x0.clone()))

    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        noise = torch.randn(1, *models.FAMILIES[name].latent, generator=torch.Generator().manual_seed(3))
        guider.sample(
            noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, callback=note, seed=1
        )
    return seen


def predictions(model, name, steps):
    """Return a MODEL's predictions for the x of each step."""
    one = models.conditioning(name, 9)
    return [models.denoised(model, x, sigma, one) for sigma, x, _ in steps]


def holds(model, sigma, start, end):
    sampling = model.get_model_object("model_sampling")
    return sampling.percent_to_sigma(end) <= sigma <= sampling.percent_to_sigma(start)


@pytest.mark.parametrize("span", [(0.0, 0.5), (0.5, 1.0), (0.35, 0.75)], ids=str)
def test_within_the_range_it_acts_and_outside_it_does_not(name, model, adapter, span):
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    ranged, _ = apply(model, adapter, start_percent=span[0], end_percent=span[1])
    steps = sample(ranged, name)
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())
    with_it = predictions(apply(model, adapter)[0], name, steps)
    without = predictions(model, name, steps)
    inside = [holds(model, sigma, *span) for sigma, _, _ in steps]
    assert set(inside) == {True, False}
    for acts, (sigma, _, x0), on, off in zip(inside, steps, with_it, without, strict=True):
        effect = (on - off).norm()
        assert effect > 1e-4 * off.norm()
        assert (x0 - (on if acts else off)).norm() <= 1e-3 * effect, sigma


def test_two_ranges_and_an_adapter_for_all_of_it_add_up(name, model, adapter):
    """Both apply where both ranges overlap, on top of one that always applies; the host's weight hooks included."""
    import comfy.hooks

    others = [make_adapter(name, seed=seed) for seed in (1, 2)]
    always, _ = apply(model, others[0], strength=0.5)
    ranged, _ = apply(always, adapter, end_percent=0.75)
    ranged, _ = apply(ranged, others[1], start_percent=0.4)
    hooks = comfy.hooks.create_hook_lora(others[0], 0.25, 0.0)
    steps = sample(ranged, name, hooks=hooks)
    hooked, _ = apply(always, others[0], strength=0.25)
    cases = set()
    for sigma, x, x0 in steps:
        expected = hooked
        acts = holds(model, sigma, 0.0, 0.75), holds(model, sigma, 0.4, 1.0)
        cases.add(acts)
        for part, on in zip((adapter, others[1]), acts, strict=True):
            expected = apply(expected, part)[0] if on else expected
        assert models.distance(x0, models.denoised(expected, x, sigma, models.conditioning(name, 9))) <= 1e-5
    assert cases == {(True, False), (True, True), (False, True)}


def test_guidance_sees_the_same_weights_on_both_sides(model, name, adapter):
    ranged, _ = apply(model, adapter, start_percent=0.5)
    steps = sample(ranged, name, cfg=3.0)
    whole = sample(apply(model, adapter)[0], name, cfg=3.0)
    plain = sample(model, name, cfg=3.0)
    assert torch.equal(steps[0][2], plain[0][2])
    assert models.distance(steps[-1][2], whole[-1][2]) > 1e-4


def test_weights_are_patched_once_and_put_back_once(name, model, adapter, monkeypatch):
    """Steps outside the range change no weight; inside it only the first step does."""
    import comfy.model_patcher

    calls = []
    patch = comfy.model_patcher.ModelPatcher.patch_hooks

    def counted(self, hooks):
        calls.append(hooks is not None)
        return patch(self, hooks)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "patch_hooks", counted)
    ranged, _ = apply(model, adapter, start_percent=0.35, end_percent=0.75)
    sample(ranged, name, cfg=3.0)
    assert calls.count(True) == 1


def test_strength_zero_and_the_whole_range_are_the_ordinary_ways(model, adapter):
    assert apply(model, adapter, strength=0.0, start_percent=0.3)[0] is model
    assert apply(model, adapter, start_percent=0.0, end_percent=1.0)[0].wrappers == model.wrappers
    with pytest.raises(SettingsError, match="input 'start_percent'.*0.6 is not before end_percent 0.5"):
        apply(model, adapter, start_percent=0.6, end_percent=0.5)


def test_training_on_it_is_refused_by_name(name, model, adapter):
    ranged, _ = apply(model, adapter, end_percent=0.5)
    with pytest.raises(ModelError, match="a part of sampling, which training"):
        with models.in_training(ranged, name):
            pass
