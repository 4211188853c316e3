"""Tests of model inputs beside noise and text: the inpaint mask, and the source image of an edit model."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.formats.adapter import Adapter, save_adapter
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import HOLE, SOURCE
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps import step
from graft_pack.trainers.steps.plan import Plan
from PIL import Image

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

# Each kind of input, and Flux's Kontext, which has Flux's own network.
TAKES = {
    "SD1 inpaint": HOLE,
    "FluxInpaint": HOLE,
    "SD15_instructpix2pix": SOURCE,
    "Flux": SOURCE,
    "QwenImage": SOURCE,
    "Omnigen2": SOURCE,
    "SD1": "",
    "SDXL": "",
    "SD3": "",
    "Chroma": "",
}
BESIDE = [name for name, takes in TAKES.items() if takes]
SHOWN = ["SD1 inpaint", "FluxInpaint", "SD15_instructpix2pix", "Flux"]


class Codec:
    """A random convolution to a family's channels, eight pixels per position, with a frame axis if it has one."""

    pixels_at_once = 0

    def __init__(self, name):
        shape = models.SIZES[name].latent
        self._weight = torch.randn(shape[0], 3, 8, 8, generator=torch.Generator().manual_seed(7)) * 0.2
        self._frames = len(shape) == 4
        self.calls = 0

    def encode(self, pixels):
        self.calls += 1
        mean = torch.nn.functional.conv2d(pixels.movedim(-1, 1) * 2 - 1, self._weight, stride=8)
        return (mean.unsqueeze(2) if self._frames else mean), None

    def fingerprint(self):
        return f"convolution {len(self._weight)}"


def grain(number, size=(64, 64)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


def half(size=(64, 64)):
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:, : size[0] // 2] = 255
    return mask


def dataset_for(name, masks=True):
    """Return two pictures, with masks or with source images."""
    pictures, texts = [grain(1), grain(2)], ["one", "two"]
    if TAKES[name] == HOLE:
        return from_arrays(pictures, texts, "", 64, [half()] * 2 if masks else [])
    return from_arrays(pictures, texts, "", 64, source_images=[grain(11), grain(12)])


def host_of(training, name):
    return replace(training.host, codec=Codec(name), text=models.Words(name))


def planned(training, name, folder, dataset=None):
    """Return the training with a dataset's items in place of random ones."""
    host = host_of(training, name)
    recipe = replace(training.plan.recipe, resolution=64)
    prepared = prepare(dataset or dataset_for(name), recipe, host, Folders("", str(folder), "", ""))
    return models.Training(training.denoiser, host, replace(training.plan, recipe=recipe, train=prepared.training))


@pytest.mark.parametrize("name", TAKES)
def test_a_model_says_what_it_takes(name):
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    assert ComfyDenoiser(models.patcher(name), None, models.SmallVae()).conditioning_kind == TAKES[name]


def from_core(name, codec, source, picture, mask):
    """Return the conditioning that core's own nodes add to a text."""
    from nodes import InpaintModelConditioning

    class Vae:
        def encode(self, pixels):
            return codec.encode(pixels)[0]

    def tensor(array):
        return torch.from_numpy(array.astype(np.float32) / 255.0)[None]

    bare = [[torch.zeros(1, 1, 1), {}]]
    if TAKES[name] == HOLE:
        given = {"pixels": tensor(picture), "vae": Vae(), "mask": tensor(mask)}
        made = InpaintModelConditioning().encode(bare, bare, **given)[0]
        return {key: made[0][1][key] for key in ("concat_mask", "concat_latent_image")}
    latent = codec.encode(tensor(source))[0]
    if "pix2pix" in name:
        return {"concat_latent_image": latent}
    from comfy_extras.nodes_edit_model import ReferenceLatent

    made = ReferenceLatent.execute(bare, {"samples": latent})
    return {"reference_latents": (made[0] if isinstance(made, tuple) else made.result[0])[0][1]["reference_latents"]}


@pytest.mark.parametrize("name", BESIDE)
def test_the_network_gets_what_cores_own_nodes_give_it(name, tmp_path):
    """From the pictures of a dataset to the network's input: further channels, or further latents."""
    model = models.patcher(name)
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(1))
    with models.in_training(model, name, batch_size=1) as training, torch.no_grad():
        made = planned(training, name, tmp_path)
        seen = {}
        for item, number in zip(made.plan.train, (1, 2), strict=True):
            one = item.show(3).conditioning
            with models.inputs_of(training.denoiser.module) as calls:
                training.denoiser.predict(x, torch.tensor([0.5]), [one])
            seen[number] = calls[0], one
        codec = made.host.codec
    for number, ((given, more), one) in seen.items():
        beside = from_core(name, codec, grain(10 + number), grain(number), half())
        told = replace(one, tensors={**one.tensors, **beside})
        with models.inputs_of(model.model.diffusion_model) as calls:
            models.denoised(model, x, 0.5, told)
        (expected, others) = calls[0]
        assert given[0].shape == expected[0].shape
        assert torch.allclose(given[0], expected[0], atol=1e-6)
        assert ("ref_latents" in more) == ("ref_latents" in others) == ("reference_latents" in beside)
        for ours, theirs in zip(more.get("ref_latents", []), others.get("ref_latents", []), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)
    one, other = (seen[number][0] for number in (1, 2))
    differs = one[0][0][:, x.shape[1] :], other[0][0][:, x.shape[1] :]
    if "ref_latents" in one[1]:
        differs = one[1]["ref_latents"][0], other[1]["ref_latents"][0]
    assert models.distance(*differs) > 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", BESIDE)
def test_gradients_beside_a_picture_are_those_of_finite_differences(name, checkpointing, tmp_path):
    with torch.inference_mode():
        model = models.patcher(name, torch.float64)
    with models.in_training(model, name, checkpointing, spread=0.1, batch_size=2) as training:
        made = planned(training, name, tmp_path)
        with models.float64_throughout(training):
            for part in "AB":
                parameters = [value for key, value in training.plan.trainables.items() if f"lora_{part}" in key]
                error, slope = directional_error(made.losses, parameters, step=0.005)
                assert abs(slope) > 1e-6
                assert error <= 1e-5


@pytest.mark.parametrize("name", SHOWN)
def test_it_learns_and_core_applies_what_was_trained(name, comfy, tmp_path):
    import nodes

    model = models.patcher(name)
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(9))
    fields = {"steps": 12, "learning_rate": 1e-2, "batch_size": 2, "targets": "all linear"}
    with models.in_training(model, name, **fields) as training:
        made = planned(training, name, tmp_path / "cache")
        one = made.plan.train[0].show(None).conditioning
        point = x, 0.6, one
        before = step.fixed_losses(made.plan.train, made.plan.recipe, made.host).mean()
        base = models.trained_denoised(made, *point)
        state = models.train(made, tmp_path)
        assert step.fixed_losses(made.plan.train, made.plan.recipe, made.host).mean() < 0.995 * before
        output = models.trained_denoised(made, *point)
        adapter = Adapter(made.plan.export(state.trainables, 0).adapter)
        # The extra conditioning matters: with another mask or source, the same noise gives another prediction.
        other = made.plan.train[1].show(None).conditioning
        moved = replace(one, sources=other.sources, masked_image_latent=other.masked_image_latent)
        assert models.distance(models.trained_denoised(made, x, 0.6, moved), output) > 1e-3
        beside = from_core(name, made.host.codec, grain(11), grain(1), half())
    path = comfy.base / "models" / "loras" / f"beside-{name}.safetensors"
    save_adapter(str(path), adapter, name)
    applied, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    told = replace(one, tensors={**one.tensors, **beside})
    assert (models.denoised(applied, x, 0.6, told) - output).norm() <= 1e-3 * (output - base).norm()
    assert (output - base).norm() >= 1e-2 * (base - x).norm()


def test_holes_are_drawn_where_there_is_no_mask_and_differ_from_turn_to_turn(tmp_path):
    name = "SD1 inpaint"
    with models.in_training(models.patcher(name), name, batch_size=1) as training:
        made = planned(training, name, tmp_path, dataset_for(name, masks=False))
        item = made.plan.train[0]
        shown = [item.show(turn) for turn in range(12)]
        again = planned(training, name, tmp_path, dataset_for(name, masks=False))
        assert again.host.codec.calls == 0, "found in the cache"
        assert torch.equal(again.plan.train[0].show(5).conditioning.inpaint_mask, shown[5].conditioning.inpaint_mask)
    holes = {one.conditioning.inpaint_mask.float().mean().item() for one in shown}
    assert len(holes) == 4
    assert 1.0 in holes, "the whole picture among them"
    assert all(one.weight is None for one in shown)
    for one in shown:
        assert one.conditioning.inpaint_mask.shape == (1, 1, 64, 64)
        assert set(one.conditioning.inpaint_mask.unique().tolist()) <= {0, 1}


def test_source_pictures_on_a_model_that_takes_none_are_refused(tmp_path):
    with models.in_training(models.patcher("SD1"), "SD1") as training:
        with pytest.raises(DatasetError, match=r"source pictures, but this model \(SD1\) takes none.*Kontext"):
            planned(training, "SD1", tmp_path, dataset_for("Flux"))


def test_a_run_is_known_by_its_source_pictures(tmp_path):
    """Other source images make another run; the same source images resume it."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.protocols import Host

    root = tmp_path / "d"
    (root / "before").mkdir(parents=True)
    for number in (1, 2):
        Image.fromarray(grain(number)).save(root / f"{number}.png")
        Image.fromarray(grain(10 + number)).save(root / "before" / f"{number}.png")
        (root / f"{number}.txt").write_text("make it so")
    runs = []
    for change in (False, False, True):
        if change:
            Image.fromarray(grain(13)).save(root / "before" / "2.png")
        dataset = scan_folder(str(root), "", 64, 1, None, ScanOptions(control_folder=str(root / "before")))
        assert [one.source.name for one in dataset.examples] == ["1.png", "2.png"]
        denoiser = ComfyDenoiser(models.patcher("Flux"), None, models.SmallVae())
        host = Host(denoiser, models.Words("Flux"), Codec("Flux"))
        places = (str(tmp_path / part) for part in ("runs", "cache", "loras", "emb"))
        recipe = models.recipe("Flux", steps=2, resolution=64, batch_size=2)
        runs.append(run_recipe(recipe, dataset, host, Folders(*places)))
    assert runs[0].run.name == runs[1].run.name != runs[2].run.name
    assert runs[1].resumed_from == 2
    assert runs[2].resumed_from == 0


class DrawingVae(models.SmallVae):
    """A VAE that decodes every latent to a black picture."""

    def decode(self, latent):
        return torch.zeros(1, 64, 64, 3)


@pytest.mark.parametrize("name", ["Flux", "SD1 inpaint"])
def test_previews_are_drawn_beside_the_first_examples(name, tmp_path):
    from graft_pack.trainers.engine.previews import preview

    encoder = models.text("Flux" if name == "Flux" else "SD1")
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.trainers.protocols import Host

    denoiser = ComfyDenoiser(models.patcher(name), ComfyText(encoder), DrawingVae())
    drawing = {"preview_steps": 1, "preview_cfg": 1.0, "preview_scheduler": "simple"}
    recipe = models.recipe(denoiser.family, resolution=64, preview_prompts=("a", "b", "c"), **drawing)
    run = SimpleNamespace(save_samples=lambda *given: [], log=lambda event: None)
    with denoiser.training("auto"), torch.no_grad():
        host = Host(denoiser, models.Words(name), Codec(name))
        prepared = prepare(dataset_for(name), recipe, host, Folders("", str(tmp_path), "", ""))
        items = prepared.training
        usual = Counter(item.bucket for item in items).most_common(1)[0][0]
        first = [item.show(None).conditioning for item in items if item.bucket == usual]
        assert len(first) == 2
        with models.inputs_of(denoiser.module) as calls:
            plan = Plan(recipe=recipe, train=items, trainables={}, export=dict, previews=prepared.previews)
            preview(plan, run, host, 0)
    assert len(calls) == 3
    for place, (given, more) in enumerate(calls):
        one = first[place % 2]
        if name == "Flux":
            assert models.distance(more["ref_latents"][0], denoiser.scale_latents(one.sources[0])) <= 1e-6
        else:
            assert models.distance(given[0][:, 5:], denoiser.scale_latents(one.masked_image_latent)) <= 1e-6


@pytest.mark.parametrize("guidance, expected", [(2.5, 2.5), (None, 3.5)])
def test_the_guidance_of_a_picture_reaches_the_model(guidance, expected):
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.trainers.protocols import PictureRequest

    denoiser = ComfyDenoiser(models.patcher("Flux"), ComfyText(models.text("Flux")), DrawingVae())
    with denoiser.training("auto"), torch.no_grad(), models.inputs_of(denoiser.module) as calls:
        denoiser.preview([PictureRequest("a", (64, 64), 1, 1.0, "euler", "simple", 0, guidance=guidance)])
    assert [float(more["guidance"][0]) for _, more in calls] == [expected]
