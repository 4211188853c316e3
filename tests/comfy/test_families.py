"""Tests of every model class that the host loads: it trains with exact gradients, or it is listed with a reason."""

import math
import re
from contextlib import contextmanager

import pytest
import torch
from graft_pack.trainers.engine.gradient_check import check_gradient
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.families import (
    CONTENT,
    DOUBLE,
    FAMILIES,
    GENERAL,
    NO_CONTEXT,
    SINGLE,
    STYLE,
    family_of,
)
from graft_pack.trainers.memory import autograd, checkpointing
from graft_pack.trainers.methods import METHODS

from docs.build import make_families
from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def row(name):
    """Return the measurements of a class, made once for all tests here."""
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    return make_families.measure(name)


every_class = pytest.mark.parametrize("name", networks.CLASSES)


def test_no_class_of_the_host_is_left_out_silently(comfy):
    """A class of a newer host fails here until it is trained or listed."""
    here = set(make_families.list_classes())
    groups = [set(networks.CLASSES), set(networks.ALIKE), set(networks.LEFT_OUT)]
    assert here - set.union(*groups) == set()
    assert sum(map(len, groups)) == len(set.union(*groups)), "named twice"
    assert set(networks.REFUSED) <= set(networks.LEFT_OUT)


@pytest.mark.parametrize("name", networks.ALIKE)
def test_what_is_said_to_differ_in_sizes_only_does(name, comfy):
    """The host builds the same model from it, with the same objective and the same latents."""
    import comfy.supported_models

    one = getattr(comfy.supported_models, name)
    other = getattr(comfy.supported_models, networks.ALIKE[name])
    for part in ("get_model", "model_type", "latent_format", "sampling_settings", "unet_extra_config"):
        assert getattr(one, part) == getattr(other, part), part


@every_class
def test_gradients_are_those_of_finite_differences(name, row):
    assert row.plain <= 1e-5
    assert row.checkpointed <= 1e-5
    assert row.apart <= 1e-6


@every_class
def test_it_learns_three_steps_and_core_applies_what_was_trained(name, row):
    assert len(row.losses) == 3
    assert all(map(math.isfinite, row.losses))
    assert row.effect >= 1e-2
    assert row.applied <= 1e-3
    assert row.unread == []


def layers_of_attention(module):
    """Return the paths of Linear layers in modules that the host calls attention; blocks hold more than attention."""
    found = set()
    for path, part in module.named_modules():
        kind = type(part).__name__.lower()
        if "attention" in kind and "block" not in kind:
            found |= {f"{path}.{inner}" for inner, layer in part.named_modules() if isinstance(layer, torch.nn.Linear)}
    return found


def chosen(name, targets):
    """Return (module, family, paths) that a choice of targets selects on a class."""
    from graft_pack.nodes.host.model.families import family_name

    model = models.patcher(name)
    family = family_of(family_name(model))
    recipe = models.recipe(family.name, targets=targets)
    return (
        model.model.diffusion_model,
        family,
        set(METHODS["LoRA"].targets(model.model.diffusion_model, family, recipe)),
    )


# Attention classes outside the network's blocks, and attention under other class names.
NOT_IN_BLOCKS = re.compile(
    r"^(pooler|llm_adapter|t5_y_embedder|(video|audio)_embeddings_connector)\.|\.audio_|_to_audio_"
)
IN_ONE = re.compile(r"single_blocks\.\d+\.linear[12]$|^blocks\.\d+\.(q|k|v|attn_out)$")


@every_class
def test_the_attention_of_a_described_family_is_what_the_host_calls_so(name, comfy):
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    module, family, paths = chosen(name, "attention")
    linear = {path for path, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)}
    if family == GENERAL:
        assert paths == linear
        return
    wanted = {path for path in layers_of_attention(module) if not NOT_IN_BLOCKS.search(path)}
    assert {path for path in paths if not IN_ONE.search(path)} == wanted
    more = chosen(name, "attention + feed-forward")[2] - paths
    assert more, "no feed-forward layer"
    assert not more & layers_of_attention(module)
    assert all(re.search(r"blocks|layers|refiner", path) for path in more)


def test_every_description_is_of_a_class_here(comfy):
    from graft_pack.nodes.host.model.families import family_name

    known = {family_name(models.patcher(name)) for name in networks.CLASSES if name in make_families.list_classes()}
    # v is read from the sampling object; the others came with a newer host.
    assert set(FAMILIES) - known <= {"SD2 v", "Anima", "CogVideoX", "Kandinsky 5"}


@pytest.mark.parametrize("name, told", [("Flux", 1.0), ("FluxInpaint", 1.0), ("Chroma", 0.0), ("ChromaRadiance", 0.0)])
def test_a_network_distilled_to_be_guided_is_told_no_guidance(name, told):
    x = torch.randn(1, *networks.CLASSES[name].latent)
    with models.in_training(models.patcher(name), name) as training:
        with models.inputs_of(training.denoiser.module) as calls:
            training.denoiser.predict(x, torch.tensor([0.5]), [models.conditioning(name)])
    assert calls[0][1]["guidance"].tolist() == [told]


@pytest.mark.parametrize("name, few", [("FluxSchnell", True), ("Flux", False), ("SD15", False)])
def test_a_model_distilled_to_few_steps_is_warned_of(name, few, caplog):
    with models.in_training(models.patcher(name), name):
        assert ("distilled to draw in a few steps" in caplog.text) == few


def test_an_lcm_node_upstream_is_warned_of(caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    model = ModelSamplingDiscrete().patch(models.patcher("SD1"), "lcm", False)[0]
    with models.in_training(model, "SD1"):
        assert "latent consistency" in caplog.text


def test_a_model_without_description_says_so(caplog):
    caplog.set_level("INFO")
    with models.in_training(models.patcher("Omnigen2"), "Omnigen2"):
        assert "no description of the model class Omnigen2" in caplog.text
    caplog.clear()
    with models.in_training(models.patcher("SD1"), "SD1"):
        assert "no description" not in caplog.text


# Classes without convolutions between their blocks.
TRANSFORMERS = [name for name in networks.CLASSES if not name.startswith(("SD1", "SD2", "SDXL", "Stable"))]


@contextmanager
def one_block(name, **fields):
    """Yield a class's checkpointed Training, its last block with trainable parameters, and their names."""
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    with models.in_training(make_families.load(name, torch.float32), name, True, **fields) as training:
        paths = {id(part): path for path, part in training.denoiser.module.named_modules()}
        for block in reversed(autograd.blocks_of(training.denoiser.module)):
            names = [one for one in training.plan.trainables if one.startswith(f"{paths[id(block)]}.")]
            if names:
                break
        yield training, block, names


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_self_check_finds_the_block_whose_gradient_is_wrong(name, trials):
    """One block returns four fifths of its gradient and is found; a correct network passes."""
    with one_block(name) as (training, block, names):
        if trials(training.denoiser.family == GENERAL.name, True):
            check_gradient(training.losses, training.plan.trainables)
        forward = block.forward

        def wrong(*args, **kwargs):
            found = forward(*args, **kwargs)
            for part in found if isinstance(found, (tuple, list)) else [found]:
                if torch.is_tensor(part) and part.requires_grad:
                    part.register_hook(lambda gradient: 0.8 * gradient)
            return found

        block.forward = wrong
        with pytest.raises(ModelError, match=r"The gradient through this model is wrong: .*%.* in ") as raised:
            check_gradient(training.losses, training.plan.trainables)
        blocks = re.findall(r"% in (\w+(?:\.\w+)*)", str(raised.value))
        assert len(blocks) == 3 or any(one.startswith(f"{block}.") for one in names for block in blocks)


@pytest.mark.parametrize("name", ["FluxInpaint", "Chroma", "ChromaRadiance"])
def test_the_self_check_finds_the_cure_missing_in_one_block(name):
    """The cure is removed from each block's recomputation in turn; the check reports exactly the wrong gradients."""

    class Uncured(checkpointing._Checkpointed):
        def _run(self, modes, products, *args, **kwargs):
            return self.forward(*args, **kwargs)

    with one_block(name, spread=0.02) as (training, *_):
        exact = models.joined(training.gradients())
        found = 0
        for block in autograd.blocks_of(training.denoiser.module):
            cured = block.forward
            block.forward = Uncured(cured.forward)
            off = models.distance(models.joined(training.gradients()), exact)
            if off > 0.05:
                found += 1
                with pytest.raises(ModelError, match="is wrong"):
                    check_gradient(training.losses, training.plan.trainables)
            elif off == 0:
                check_gradient(training.losses, training.plan.trainables)
            block.forward = cured
        assert found


@pytest.mark.parametrize("word, said", [("SVDQW4A4Linear", "Nunchaku"), ("NunchakuFluxTransformer", "Nunchaku")])
def test_formats_that_hide_their_weights_are_refused_by_name(word, said):
    from graft_pack.nodes.host.model.checks import check_sockets

    model = models.patcher("SD1")
    check_sockets(model, object(), object())
    model.model.diffusion_model.out.append(type(word, (torch.nn.Identity,), {})())
    with pytest.raises(ModelError, match=f"format {said}.*Load the original"):
        check_sockets(model, object(), object())


def quantized(name, scaled):
    """Return (MODEL with fp8 weights, MODEL with the same values in float32), as the host loads such files."""
    config = networks.SIZES[name].build()
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    if scaled:
        if not hasattr(type(config), "scaled_fp8"):
            pytest.skip("this ComfyUI reads scaled fp8 otherwise")
        config.scaled_fp8 = torch.float8_e4m3fn
    low = models.patched(config.get_model({}, "", device="cpu"))
    plain = models.patcher(name)
    wide = dict(plain.model.diffusion_model.named_parameters())
    with torch.no_grad():
        for path, part in low.model.diffusion_model.named_modules():
            scale = getattr(part, "scale_weight", None)
            if scale is not None:
                scale.copy_(torch.tensor(0.37))
            for key, value in part.named_parameters(prefix=path, recurse=False):
                if key in wide:
                    factor = 0.37 if scale is not None and key.endswith(".weight") else 1.0
                    value.copy_((wide[key] / factor).to(value.dtype))
                    wide[key].copy_(value.float() * factor)
    return low, plain


@pytest.mark.parametrize("scaled", [False, True], ids=["fp8", "scaled fp8"])
@pytest.mark.parametrize("name, method", [("SD1", "LoRA"), ("Flux", "LoRA"), ("SD1", "DoRA")])
def test_an_adapter_on_fp8_weights_is_trained_as_on_the_same_numbers_in_fp32(name, method, scaled):
    if method == "DoRA" and not scaled:
        refused = pytest.raises(ModelError, match="DoRA reads the base's weights")
        with refused, models.in_training(quantized(name, scaled)[0], name, method=method):
            pass
        return
    found = []
    for model in quantized(name, scaled):
        with models.in_training(model, name, spread=0.1, method=method) as training:
            found.append((training.losses().detach(), models.joined(training.gradients())))
        dtypes = {value.dtype for value in training.plan.trainables.values()}
        assert dtypes == {torch.float32}
    (low, low_gradients), (plain, gradients) = found
    assert torch.allclose(low, plain, rtol=1e-5)
    assert models.distance(low_gradients, gradients) <= 1e-5


@pytest.mark.parametrize("name", networks.REFUSED)
def test_what_cannot_be_trained_is_refused(name):
    """The refusal comes before the first step: at loading, or from the gradient check of undescribed models."""
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    with pytest.raises(ModelError, match="IMG_TO_IMG|This model has no gradient"):
        with models.in_training(make_families.load(name, torch.float32), name) as training:
            check_gradient(training.losses, training.plan.trainables)


def test_models_page_lists_exactly_these_classes():
    page = make_families.PAGE.read_text(encoding="utf-8")
    assert list(make_families.read_rows(page)) == list(networks.CLASSES)
    for name in (*networks.ALIKE, *networks.LEFT_OUT):
        assert f"`{name}`" in page, name


# Parts of the paths of layers that see the text alone.
CONTEXT = re.compile(r"txt_|context_block|\.add_[qkv]_proj|to_add_out|_t$|\.ff_t\.")


@pytest.mark.parametrize("name", ["Flux", "Flux2", "Chroma", "SD3", "QwenImage", "HiDream", "AuraFlow", "SDXL"])
def test_presets_select_the_named_blocks_of_attention_and_feed_forward(name, comfy):
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    _, family, whole = chosen(name, "attention + feed-forward")
    paths = {preset: chosen(name, preset)[2] for preset in family.presets}
    assert paths
    assert all(layers and layers < whole for layers in paths.values())
    for preset in {SINGLE, DOUBLE} & set(paths):
        assert paths[preset] == {path for path in whole if path.startswith(preset.partition(" ")[0])}
    if NO_CONTEXT in paths:
        assert paths[NO_CONTEXT] == {path for path in whole if not CONTEXT.search(path)}


def test_content_and_style_are_the_layers_of_b_lora(comfy):
    """By diffusers' names they are the attention of up_blocks.0.attentions.0 and .1."""
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(models.patcher("SDXL").model.model_config.unet_config)
    published = {ours.removesuffix(".weight"): theirs for theirs, ours in names.items()}
    attention = chosen("SDXL", "attention")[2]
    for place, preset in enumerate((CONTENT, STYLE)):
        wanted = {path for path in attention if published[path].startswith(f"up_blocks.0.attentions.{place}.")}
        assert wanted
        assert chosen("SDXL", preset)[2] == wanted
