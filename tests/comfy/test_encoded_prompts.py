"""Tests of prompts that ComfyUI's own nodes have encoded: they train as its sampler would use them, or are refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.engine import job as jobs
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.errors import DatasetError, RunError
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import Conditioning, Host
from graft_pack.trainers.runs.folders import Folders

from docs.build import make_locales
from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

NODES = {node.define_schema().node_id: node for node in make_locales.list_nodes()}
# Of two lengths, so that captions, too, are encoded one by one: a batch rounds otherwise.
CAPTIONS = ["a red dog on a beach", "a small blue car " * 30]


class Codec:
    """A random convolution to a family's channels, eight pixels per position."""

    pixels_at_once = 0

    def __init__(self, name):
        channels = models.SIZES[name].latent[0]
        self._weight = torch.randn(channels, 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 0.2

    def encode(self, pixels):
        return torch.nn.functional.conv2d(pixels.movedim(-1, 1) * 2 - 1, self._weight, stride=8), None

    def fingerprint(self):
        return f"convolution {len(self._weight)}"


def core(kind, **inputs):
    """Return the first output of one of ComfyUI's own nodes, executed as in a graph."""
    import asyncio

    import nodes

    if kind not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.init_builtin_extra_nodes())
    made = nodes.NODE_CLASS_MAPPINGS[kind]
    with torch.inference_mode():
        result = getattr(made if hasattr(made, "define_schema") else made(), made.FUNCTION)(**inputs)
    return getattr(result, "result", result)[0]


def pictures(count=2):
    return [torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(1))]


def made(conditioning=None, captions=("",), count=2, **inputs):
    """Return the dataset of Graft Dataset from Images; each input as a graph passes it."""
    given = {"trigger": "", "resolution": 64, **inputs}
    given = {"images": pictures(count), "captions": list(captions), **{name: [value] for name, value in given.items()}}
    with torch.inference_mode():
        return NODES["GraftDatasetFromImages"].execute(**given, conditioning=conditioning).result[0]


def host_of(training, name, clip):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    return replace(training.host, codec=Codec(name), text=ComfyText(clip))


def folders_of(folder):
    return Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "emb")))


def planned(training, host, dataset, folder):
    prepared = prepare(dataset, training.plan.recipe, host, folders_of(folder))
    return models.Training(training.denoiser, host, replace(training.plan, train=prepared.training))


@pytest.mark.parametrize("name", ["SD1", "SDXL with text", "Flux"])
def test_loss_and_gradients_are_those_of_the_captions(name, tmp_path):
    clip = models.text(name)
    wired = made([core("CLIPTextEncode", clip=clip, text=text) for text in CAPTIONS])
    told = made(captions=CAPTIONS)
    with models.in_training(models.patcher(name), name, spread=0.1, batch_size=2) as training:
        host = host_of(training, name, clip)
        found = [planned(training, host, one, tmp_path) for one in (wired, told)]
        losses = [one.losses().item() for one in found]
        gradients = [models.joined(one.gradients()) for one in found]
        swapped = planned(training, host, made(captions=CAPTIONS[::-1]), tmp_path)
        assert models.distance(models.joined(swapped.gradients()), gradients[1]) > 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert models.distance(*gradients) <= 1e-6


def noise(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_of(name):
    return core("CLIPTextEncode", clip=models.text(name), text="a red dog")


def guided():
    return core("FluxGuidance", conditioning=text_of("Flux"), guidance=4.0)


def unguided():
    return core("FluxDisableGuidance", conditioning=text_of("Flux"))


def referring():
    conditioning = guided()
    for seed, side in ((1, 8), (2, 6)):
        latent = {"samples": noise(1, 16, side, 8, seed=seed)}
        conditioning = core("ReferenceLatent", conditioning=conditioning, latent=latent)
    kind = "FluxKontextMultiReferenceLatentMethod"
    return core(kind, conditioning=conditioning, reference_latents_method="index")


def editing():
    text = models.conditioning("QwenImage").tensors
    given = {"conditioning": [[text.pop("cross_attn"), text]], "latent": {"samples": noise(1, 16, 1, 6, 8)}}
    return core("ReferenceLatent", **given)


def attending():
    """Values as StyleModelApply sets them with a strength of the attention."""
    ((tensor, more),) = guided()
    mask = torch.linspace(-2, 0, tensor.shape[1] + 2)
    return [[torch.cat([tensor, noise(1, 2, tensor.shape[2])], dim=1), {**more, **_bias(mask)}]]


def _bias(mask):
    size = len(mask) + 16
    square = torch.zeros(1, size, size)
    square[:, : len(mask), : len(mask)] = mask
    return {"attention_mask": square, "attention_mask_img_shape": (4, 4)}


def sized():
    sizes = {"width": 900, "height": 800, "crop_w": 7, "crop_h": 9, "target_width": 640, "target_height": 512}
    return core("CLIPTextEncodeSDXL", clip=models.text("SDXL with text"), text_g="a dog", text_l="red", **sizes)


def looking():
    import comfy.clip_vision

    output = comfy.clip_vision.Output()
    output["image_embeds"] = noise(1, 1280)
    more = {"pooled_output": noise(1, 1280), "width": 512, "height": 512}
    given = {"conditioning": [[noise(1, 77, 48), more]], "clip_vision_output": output}
    return core("unCLIPConditioning", **given, strength=0.8, noise_augmentation=0.1)


def joined():
    return core("ConditioningConcat", conditioning_to=text_of("SD1"), conditioning_from=text_of("SD1"))


def whole_range():
    return core("ConditioningSetTimestepRange", conditioning=text_of("SD1"), start=0.0, end=1.0)


def filling():
    vae = SimpleNamespace(encode=lambda pixels: noise(1, 4, 8, 8), spacial_compression_encode=lambda: 8)
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:] = 1.0
    given = {"positive": text_of("SD1"), "negative": [], "vae": vae, "pixels": pictures(1)[0], "mask": mask}
    return core("InpaintModelConditioning", **given, noise_mask=False)


USED = {
    "guidance": ("Flux", guided),
    "no guidance": ("Flux", unguided),
    "reference latents": ("Flux", referring),
    "an edit model": ("QwenImage", editing),
    "attention bias": ("Flux", attending),
    "sizes": ("SDXL with text", sized),
    "clip vision": ("SDXL", looking),
    "two prompts in a row": ("SD1", joined),
    "whole range": ("SD1", whole_range),
    "inpainting": ("SD1 inpaint", filling),
}


def drawn(model, x, sigma, conditioning):
    """Return the x0 that ComfyUI's sampler computes from a CONDITIONING."""
    import comfy.model_management
    import comfy.sampler_helpers
    import comfy.samplers

    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)}
        conds = comfy.samplers.process_conds(model.model, x, conds, x.device, torch.zeros_like(x), None, 0)
        model.pre_run()
        level = torch.full((1,), sigma)
        found = comfy.samplers.calc_cond_batch(model.model, [conds["positive"]], x, level, model.model_options)
        model.cleanup()
        return found[0].clone()


@pytest.mark.parametrize("case", USED)
def test_training_uses_what_the_sampler_uses(case):
    from graft_pack.nodes.host.model.encoded_prompts import encoded_prompts

    name, make = USED[case]
    conditioning = make()
    (prompt,) = encoded_prompts([conditioning])
    model = models.patcher(name)
    x = noise(1, *models.SIZES[name].latent)
    with models.in_training(model, name) as training:
        one = Conditioning(prompt.tensors, (640, 480), (3, 0), (512, 512))
        ours = models.trained_denoised(training, x, 0.6, one)
        ((tensor, _),) = conditioning
        bare = Conditioning({**models.conditioning(name).tensors, "cross_attn": tensor.clone()}, (640, 480))
        plain = models.trained_denoised(training, x, 0.6, bare)
    assert models.distance(ours, drawn(model, x, 0.6, conditioning)) <= 1e-5
    if name != "SD1":
        assert models.distance(ours, plain) > 1e-4, "what is beside the text matters"


def combined():
    return core("ConditioningCombine", conditioning_1=text_of("SD1"), conditioning_2=text_of("SD1"))


def ranged():
    return core("ConditioningSetTimestepRange", conditioning=text_of("SD1"), start=0.0, end=0.5)


def placed():
    given = {"width": 32, "height": 32, "x": 0, "y": 0, "strength": 1.0}
    return core("ConditioningSetArea", conditioning=text_of("SD1"), **given)


def masked():
    given = {"mask": torch.ones(1, 64, 64), "strength": 1.0, "set_cond_area": "default"}
    return core("ConditioningSetMask", conditioning=text_of("SD1"), **given)


def weighted():
    return core("ConditioningSetAreaStrength", conditioning=text_of("SD1"), strength=0.5)


def boxed():
    clip = SimpleNamespace(encode_from_tokens=lambda tokens, return_pooled: (None, noise(1, 48)), tokenize=str)
    given = {"clip": clip, "gligen_textbox_model": object(), "text": "a"}
    return core("GLIGENTextBoxApply", conditioning_to=text_of("SD1"), **given, width=8, height=8, x=0, y=0)


def controlled():
    net = SimpleNamespace(copy=lambda: net, set_cond_hint=lambda *given, **more: net, set_previous_controlnet=print)
    given = {"conditioning": text_of("SD1"), "control_net": net, "image": pictures(1)[0], "strength": 1.0}
    return core("ControlNetApply", **given)


def hooked():
    import comfy.hooks

    return comfy.hooks.set_hooks_for_conditioning(text_of("SD1"), comfy.hooks.HookGroup())


def seen_twice():
    return [[noise(1, 77, 48), {"unclip_conditioning": 2 * looking()[0][1]["unclip_conditioning"]}]]


def several():
    return [[text_of("SD1")[0][0].repeat(3, 1, 1), {}]]


def unknown():
    return [[text_of("SD1")[0][0], {"ipadapter": object()}]]


def broken():
    return [[text_of("SD1")[0][0] * float("nan"), {}]]


def replaced():
    return [[text_of("SD1")[0][0], {"guiding_frame_index": 0}]]


def framed():
    return [[text_of("SD1")[0][0], {"keyframe_idxs": torch.zeros(1, 3, 8, 2)}]]


REFUSED = {
    replaced: "a first frame in the sampler's latent \\(v2\\)",
    framed: "guide frames",
    combined: "has 2 entries.*Conditioning \\(Concat\\)",
    ranged: "a range of timesteps",
    placed: "an area",
    masked: "a mask",
    weighted: "a strength",
    boxed: "GLIGEN boxes",
    controlled: "a ControlNet",
    hooked: "hooks",
    seen_twice: "several unCLIP images",
    several: "a batch of 3 prompts",
    unknown: "'ipadapter' of type object",
    broken: "not finite",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_training_has_no_place_for_is_refused_by_name(make):
    with pytest.raises(DatasetError, match=f"Graft Dataset from Images, input 'conditioning': .*{REFUSED[make]}"):
        made([make()])


@pytest.mark.parametrize(
    "inputs",
    [
        {"captions": ["a dog"]},
        {"trigger": "sks"},
        {"shuffle_tags": True},
        {"caption_dropout": 0.1},
        {"lines_are_variants": True},
    ],
    ids=lambda inputs: next(iter(inputs)),
)
def test_what_has_no_effect_on_encoded_prompts_is_refused(inputs):
    (name,) = inputs
    with pytest.raises(DatasetError, match=f"input '{name}': .*in place of captions, so {name} has no effect"):
        made([text_of("SD1")], **inputs)


def test_a_source_picture_in_the_prompt_stays_the_only_one():
    for inputs, name in (({"flip": True}, "flip"), ({"control_images": pictures()[0]}, "control_images")):
        with pytest.raises(DatasetError, match=f"input '{name}': .*holds a source picture"):
            made([referring()], **inputs)
    assert made([text_of("SD1")], flip=True).examples[0].handling.flip


def test_one_for_all_or_one_for_each_picture():
    one, other = ([[noise(1, 77, 48, seed=seed), {}]] for seed in (1, 2))
    shared = [example.encoded.digest for example in made([one], count=3).examples]
    assert len(set(shared)) == 1
    own = [example.encoded.digest for example in made([one, other], count=2).examples]
    assert own[0] == shared[0] != own[1]
    with pytest.raises(DatasetError, match="2 conditionings arrived for 3 pictures"):
        made([one, other], count=3)


def test_uninitialized_memory_names_no_run():
    """SD1's checkpoints lack the projection of the pooled output, and SD1 does not read that output."""
    pairs = [[[noise(1, 77, 768), {"pooled_output": noise(1, 768, seed=seed)}]] for seed in (1, 2)]
    assert made([pairs[0]]).fingerprint() == made([pairs[1]]).fingerprint()
    pairs = [[[noise(1, 77, 2048), {"pooled_output": noise(1, 1280, seed=seed)}]] for seed in (1, 2)]
    assert made([pairs[0]]).fingerprint() != made([pairs[1]]).fingerprint()


def trained(folder, conditioning, dataset=None, folders=None, **fields):
    """Run a recipe of the tiny Flux; return the result."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    encoder = ComfyText(models.text("Flux"))
    host = Host(ComfyDenoiser(models.patcher("Flux"), encoder, models.SmallVae()), encoder, Codec("Flux"))
    recipe = models.recipe("Flux", **{"steps": 2, "resolution": 64, "batch_size": 2, **fields})
    dataset = dataset or made([conditioning])
    folders = folders or folders_of(folder)
    return run_recipe(recipe, dataset, host, folders), (recipe, dataset, host, folders)


def test_a_run_is_known_by_its_conditioning(tmp_path):
    results = [trained(tmp_path, conditioning)[0] for conditioning in (guided(), guided(), unguided())]
    assert results[0].run.name == results[1].run.name != results[2].run.name
    assert [result.resumed_from for result in results] == [0, 2, 0]


def test_a_job_brings_the_conditioning_along(tmp_path):
    here, (recipe, dataset, host, folders) = trained(tmp_path / "here", referring())
    path = jobs.export_job(str(tmp_path / "jobs"), recipe, dataset, host, folders, {})
    job = jobs.read_job(path)
    assert all(example.encoded.tensors is None for example in job.dataset.examples)
    there, _ = trained(None, None, job.dataset, job.folders(folders_of(tmp_path / "there")))
    assert there.run.name == here.run.name
    assert there.losses == here.losses
    lost = replace(job, cache=str(tmp_path / "empty"))
    with pytest.raises(RunError, match="missing or damaged"):
        trained(None, None, lost.dataset, replace(lost.folders(folders), runs=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "fields",
    [{"text_encoder": True}, {"embedding_name": "my-word", "embedding_init": "dog", "embedding_templates": "object"}],
    ids=lambda fields: next(iter(fields)),
)
def test_no_text_encoder_learns_from_encoded_prompts(fields, tmp_path):
    with pytest.raises(DatasetError, match="2 pictures are encoded already, so no embedding and no text encoder"):
        trained(tmp_path, guided(), **fields)


def test_encoded_prompts_and_captions_train_together(tmp_path):
    """As two datasets that are combined, or as the class images of a subject."""
    from graft_pack.trainers.data import prior

    array = np.full((64, 64, 3), 99, np.uint8)
    classes = from_arrays([array], ["a dog"], "", 64)
    dataset = prior.add_class_images(prior.captioned(made([guided()]), "", "instance_prompt"), classes, 1.0)
    result, _ = trained(tmp_path, None, prior.add_prior_target(dataset, "a dog", 0.5))
    assert len(result.losses) == 2
