"""Tests of models that edit pictures: several source pictures, and prompts that the text encoder reads with them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine.previews import preview
from graft_pack.trainers.errors import DatasetError, ModelError, SettingsError
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps.plan import Plan
from PIL import Image

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

CONTROLS = ("control", "control_2", "control_3")
# Classes of the host that take the latents of source pictures, some of them in newer versions only.
EDITING = [
    *("Flux", "FluxSchnell", "Flux2", "Omnigen2", "QwenImage"),
    *("ZImage", "ZImagePixelSpace", "Boogu", "Krea2", "MageFlow", "JoyImage", "LongCatImage"),
]
PLUS = "QwenImage", "TextEncodeQwenImageEditPlus"
# Networks with a text encoder that sees pictures, and the host's node for both.
NODES = [
    ("QwenImage", "TextEncodeQwenImageEdit"),
    PLUS,
    ("LongCatImage", "TextEncodeQwenImageEdit"),
    ("Boogu", "TextEncodeBooguEdit"),
    ("JoyImage", "TextEncodeJoyImageEdit"),
    ("MageFlow", "TextEncodeMageFlowEdit"),
]


class PatchVae:
    """The parts of a VAE that encode: a random convolution, one position for each square of pixels."""

    latent_dim = 2
    vae_dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, name):
        shape = models.SIZES[name].latent
        self._side, self._frames = 64 // shape[-1], len(shape) == 4
        self.first_stage_model = torch.nn.Conv2d(3, shape[0], self._side, self._side, bias=False)
        torch.nn.init.normal_(self.first_stage_model.weight, 0, 0.1, torch.Generator().manual_seed(7))

    def spacial_compression_encode(self):
        return self._side

    def encode(self, pixels):
        latent = self.first_stage_model(pixels.movedim(-1, 1) * 2 - 1).detach()
        return latent.unsqueeze(2) if self._frames else latent

    def decode(self, latent):
        return torch.zeros(1, 64, 64, 3)


def patcher(name, dtype=None):
    from graft_pack.nodes.host.model import families

    with torch.inference_mode():
        try:
            model = models.patcher(name, dtype)
        except AttributeError:
            pytest.skip("this ComfyUI has no such class")
    if families.image_conditioning(model) != families.REFERENCE:
        pytest.skip("the class takes no source pictures in this ComfyUI")
    return model


def tensor(path):
    """Return a picture file as the host's loader does."""
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).astype(np.float32) / 255.0)[None]


@pytest.fixture
def pairs(tmp_path):
    """Return make(count, ...): pictures, each with so many source pictures, as a dataset."""
    root = tmp_path / "pairs"

    def grain(path, number):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.RandomState(number).randint(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)

    def make(*counts, **handling):
        for number, count in enumerate(counts):
            grain(root / f"{number}.png", number)
            (root / f"{number}.txt").write_text(f"make (picture {number}:1.5) red")
            for place in range(count):
                grain(root / CONTROLS[place] / f"{number}.png", 10 * (place + 1) + number)
        folders = [str(root / name) if max(counts) > place else "" for place, name in enumerate(CONTROLS)]
        options = ScanOptions(control_folder=folders[0], more_control_folders=tuple(folders[1:]), sources_optional=True)
        return scan_folder(str(root), "", 64, 1, None, options)

    make.root = root
    return make


def prepared(training, name, dataset, folder, **fields):
    """Return the training with a dataset's items in place of random ones."""
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.nodes.host.model.vae import ComfyCodec

    text = ComfyText(models.text(name)) if "prompt_node" in fields else models.Words(name)
    host = replace(training.host, codec=ComfyCodec(PatchVae(name)), text=text)
    recipe = replace(training.plan.recipe, resolution=64, **fields)
    made = prepare(dataset, recipe, host, Folders("", str(folder), "", "", picture_of=lambda given: given))
    plan = replace(training.plan, recipe=recipe, train=made.training, previews=made.previews)
    return models.Training(training.denoiser, host, plan)


def from_node(node, clip, vae, prompt, pictures, size=(64, 64), negative=None):
    """Return what the host's node gives for a prompt, as a graph calls it."""
    import importlib

    module = {"Qwen": "qwen", "Boogu": "boogu", "JoyIma": "joyimage", "MageFl": "mage"}
    ending = next(value for key, value in module.items() if node.startswith(f"TextEncode{key}"))
    kind = getattr(importlib.import_module(f"comfy_extras.nodes_{ending}"), node)
    given = {"clip": clip, "prompt": prompt, "vae": vae}
    if ending == "qwen":
        plus = node.endswith("Plus")
        given |= {f"image{place if plus else ''}": one for place, one in enumerate(pictures, 1)}
    else:
        name = "image{}" if ending == "joyimage" else "image_{}"
        given["images"] = {name.format(place): one for place, one in enumerate(pictures, 1)}
    if ending in ("boogu", "mage"):
        given["negative_prompt"] = ""
    if ending == "mage":
        given["width"], given["height"] = size
    found, values = kind.execute(**given).result[0][0]
    return {"cross_attn": found, **{key: value for key, value in values.items() if value is not None}}


@pytest.mark.parametrize("count", range(4))
@pytest.mark.parametrize("name, node", NODES, ids=[f"{name} {node}" for name, node in NODES])
def test_the_conditioning_is_that_of_the_hosts_node(name, node, count, pairs, tmp_path):
    if node == "TextEncodeQwenImageEdit" and count > 1:
        pytest.skip("the node takes one picture")
    model = patcher(name)
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(1))
    with models.in_training(model, name, batch_size=1) as training, torch.no_grad():
        dataset = pairs(*[count] * (2 if count == 1 else 1))
        made = prepared(training, name, dataset, tmp_path / "cache", prompt_node=node)
        shown = [item.show(3) for item in made.plan.train]
        outputs = [models.trained_denoised(training, x, 0.5, one.conditioning) for one in shown]
    clip, vae = models.text(name), PatchVae(name)
    for number, one in enumerate(shown):
        pictures = [tensor(pairs.root / CONTROLS[place] / f"{number}.png") for place in range(count)]
        with torch.no_grad():
            expected = from_node(node, clip, vae, f"make (picture {number}:1.5) red", pictures)
        ours = dict(one.conditioning.tensors)
        if one.conditioning.sources:
            ours["reference_latents"] = list(one.conditioning.sources)
        assert ours.keys() == expected.keys() and ("reference_latents" in ours) == (count > 0)
        for key, value in expected.items():
            parts = (ours[key], value) if isinstance(value, list) else ([ours[key]], [value])
            for mine, theirs in zip(*parts, strict=True):
                assert mine.shape == theirs.shape
                assert (mine.float() - theirs.float()).abs().max() <= 1e-5, key
        if count < 2:
            told = replace(one.conditioning, tensors=expected, sources=())
            assert models.distance(outputs[number], models.denoised(model, x, 0.5, told)) <= 1e-5


def test_a_mirrored_picture_is_encoded_with_its_mirrored_sources(pairs, tmp_path):
    from graft_pack.trainers.data.examples import Augmentation

    name, node = PLUS
    dataset = pairs(1, 1)
    examples = tuple(replace(one, handling=Augmentation(flip=True)) for one in dataset.examples)
    with models.in_training(patcher(name), name, batch_size=1) as training, torch.no_grad():
        dataset = replace(dataset, examples=examples)
        made = prepared(training, name, dataset, tmp_path / "cache", prompt_node=node)
        shown = [made.plan.train[0].show(visit).conditioning for visit in range(8)]
        clip, vae = models.text(name), PatchVae(name)
        picture = tensor(pairs.root / "control" / "0.png")
        both = [from_node(node, clip, vae, "make (picture 0:1.5) red", [one]) for one in (picture, picture.flip(2))]
    kinds = []
    for one in shown:
        errors = [float((one.tensors["cross_attn"] - other["cross_attn"]).abs().max()) for other in both]
        latents = [float((one.sources[0] - other["reference_latents"][0]).abs().max()) for other in both]
        kinds.append(errors.index(min(errors)))
        assert min(errors) <= 1e-5 and latents[kinds[-1]] <= 1e-5 < max(latents)
    assert set(kinds) == {0, 1}


def test_every_class_that_takes_source_pictures_is_listed():
    from graft_pack.nodes.host.model import families

    taking = set()
    for name in models.CLASSES:
        try:
            model = models.patcher(name)
        except AttributeError:
            # This ComfyUI has no such class.
            continue
        if families.image_conditioning(model) == families.REFERENCE:
            taking.add(name)
    assert taking and taking <= set(EDITING)


@pytest.mark.parametrize("name", EDITING)
def test_gradients_with_none_to_three_source_pictures_are_exact(name, pairs, tmp_path):
    model = patcher(name, torch.float64)
    with models.in_training(model, name, checkpointing=True, spread=0.1, batch_size=4) as training:
        made = prepared(training, name, pairs(0, 1, 2, 3), tmp_path / "cache")
        assert [len(item.show(None).conditioning.sources) for item in made.plan.train] == [0, 1, 2, 3]
        with models.float64_throughout(training):
            for part in "AB":
                parameters = [value for key, value in training.plan.trainables.items() if f"lora_{part}" in key]
                error, slope = directional_error(made.losses, parameters, step=0.005)
                assert abs(slope) > 1e-6
                assert error <= 1e-5


@pytest.mark.parametrize("name", EDITING)
def test_the_prediction_beside_none_to_three_pictures_is_the_hosts(name, pairs, tmp_path):
    from comfy_extras.nodes_edit_model import ReferenceLatent

    model = patcher(name)
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(1))
    with models.in_training(model, name, batch_size=1) as training, torch.no_grad():
        made = prepared(training, name, pairs(0, 1, 2, 3), tmp_path / "cache")
        shown = [item.show(None).conditioning for item in made.plan.train]
        outputs = [models.trained_denoised(training, x, 0.5, one) for one in shown]
    vae = PatchVae(name)
    for count, one in enumerate(shown):
        conditioning = [[one.tensors["cross_attn"], {}]]
        for place in range(count):
            latent = vae.encode(tensor(pairs.root / CONTROLS[place] / f"{count}.png"))
            conditioning = ReferenceLatent.execute(conditioning, {"samples": latent}).result[0]
        told = replace(one, tensors={**one.tensors, **conditioning[0][1]}, sources=())
        assert models.distance(outputs[count], models.denoised(model, x, 0.5, told)) <= 1e-5


def drawn(name, prompts, dataset, folder, **fields):
    """Draw sample pictures, each in one step; return the inputs of the network in each."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.nodes.host.model.vae import ComfyCodec
    from graft_pack.trainers.protocols import Host

    vae = PatchVae(name)
    text = ComfyText(models.text(name))
    denoiser = ComfyDenoiser(patcher(name), text, vae)
    drawing = {"preview_steps": 1, "preview_cfg": 1.0, "preview_scheduler": "simple"}
    recipe = models.recipe(denoiser.family, resolution=64, preview_prompts=prompts, **drawing, **fields)
    run = SimpleNamespace(save_samples=lambda *given: [], log=lambda event: None)
    host = Host(denoiser, text, ComfyCodec(vae))
    with denoiser.training("auto"), torch.no_grad():
        made = prepare(dataset, recipe, host, Folders("", str(folder), "", ""))
        with models.inputs_of(denoiser.module) as calls:
            plan = Plan(recipe=recipe, train=made.training, trainables={}, export=dict, previews=made.previews)
            preview(plan, run, host, 0)
    return calls, denoiser


@pytest.mark.parametrize("node", ["CLIPTextEncode", PLUS[1]])
def test_sample_pictures_have_the_sources_of_the_dataset_or_of_their_prompt(node, pairs, tmp_path):
    name, dataset = PLUS[0], pairs(2, 2)
    named = [str(pairs.root / "control" / f"{number}.png") for number in (1, 0, 1)]
    prompts = ("blue", "green", "red " + " ".join(f"--c {path}" for path in named))
    calls, denoiser = drawn(name, prompts, dataset, tmp_path / "cache", prompt_node=node)
    files = [[pairs.root / folder / f"{number}.png" for folder in CONTROLS[:2]] for number in (0, 1)] + [named]
    clip, vae = models.text(name), PatchVae(name)
    for (_, more), prompt, paths in zip(calls, ("blue", "green", "red"), files, strict=True):
        pictures = [tensor(path) for path in paths]
        with torch.no_grad():
            if node == "CLIPTextEncode":
                latents = [vae.encode(one) for one in pictures]
                text = clip.encode_from_tokens(clip.tokenize(prompt))
            else:
                told = from_node(node, clip, vae, prompt, pictures)
                text, latents = told["cross_attn"], told["reference_latents"]
        assert len(more["ref_latents"]) == len(paths)
        for ours, theirs in zip(more["ref_latents"], latents, strict=True):
            assert models.distance(ours, denoiser.scale_latents(theirs)) <= 1e-5
        assert models.distance(more["context"], text) <= 1e-5


@pytest.mark.parametrize(
    "name, node, counts, words",
    [
        ("QwenImage", "TextEncodeQwenImageEdit", (2,), "2 source pictures, but TextEncodeQwenImageEdit takes one"),
        ("SD15_instructpix2pix", None, (2,), "but this model .* takes one"),
        ("Flux", "TextEncodeQwenImageEdit", (1,), "this text encoder .* does not see pictures"),
    ],
)
def test_what_a_model_or_node_does_not_take_is_refused(name, node, counts, words, pairs, tmp_path):
    fields = {} if node is None else {"prompt_node": node}
    with models.in_training(models.patcher(name), name) as training:
        with pytest.raises((DatasetError, ModelError), match=words):
            prepared(training, name, pairs(*counts), tmp_path / "cache", **fields)


@pytest.mark.parametrize(
    "name, fields, count, words",
    [
        ("QwenImage", {"prompt_node": "TextEncodeQwenImageEdit"}, 1, "has 2 --c, but TextEncode.* takes one"),
        ("SD1", {}, 0, "has a --c, but this model .* takes none"),
    ],
)
def test_an_error_of_named_sources_names_the_prompts(name, fields, count, words, pairs, tmp_path):
    fields = {**fields, "preview_prompts": ("a --c 0.png --c 1.png",)}
    with models.in_training(models.patcher(name), name) as training:
        with pytest.raises(SettingsError, match=words) as caught:
            prepared(training, name, pairs(count, count), tmp_path / "cache", **fields)
    assert caught.value.input == "prompts" and "control_folder" not in str(caught.value)


def test_pictures_cannot_be_encoded_while_the_text_encoder_is_trained():
    from graft_pack.trainers.engine.validation import check_recipe

    with pytest.raises(SettingsError, match="prompt_node is TextEncodeQwenImageEdit, but"):
        check_recipe(models.recipe("Qwen-Image", prompt_node="TextEncodeQwenImageEdit", text_encoder=True))


@pytest.mark.parametrize("node, warned", [("CLIPTextEncode", True), (PLUS[1], False)])
def test_a_text_encoder_that_could_see_the_sources_is_named(node, warned, pairs, tmp_path):
    told = []
    with models.in_training(patcher(PLUS[0]), PLUS[0], report=lambda *event: told.append(event)) as training:
        from graft_pack.nodes.host.model.text_encoder import ComfyText
        from graft_pack.nodes.host.model.vae import ComfyCodec

        text, codec = ComfyText(models.text(PLUS[0])), ComfyCodec(PatchVae(PLUS[0]))
        host = replace(training.host, text=text, codec=codec)
        recipe = replace(training.plan.recipe, resolution=64, prompt_node=node)
        prepare(pairs(1, 1), recipe, host, Folders("", str(tmp_path / "cache"), "", ""))
    kinds = [row["kind"] for event, payload in told if event == "warnings" for row in payload["warnings"]]
    assert ("sources" in kinds) == warned
