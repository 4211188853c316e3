"""Tests that each sample of a batch uses its own caption and sizes, and nothing of the other samples."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.scan import scan_folder
from graft_pack.trainers.memory.autograd import OutOfPlace
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps import step as forward
from graft_pack.trainers.steps.plan import Plan
from PIL import Image

from tests.support import models
from tests.support.diffusers_host import TinyCodec

pytestmark = pytest.mark.usefixtures("comfy")

SIGMAS = {"SD1": [0.3, 1.0, 3.0, 9.0], "SDXL": [0.3, 1.0, 3.0, 9.0], "Flux": [0.1, 0.4, 0.7, 0.95]}


def batch_of(name, count=4):
    """Return x [count, C, h, w], sigma [count], conditionings."""
    x = torch.randn(count, *models.FAMILIES[name].latent, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor(SIGMAS[name][:count]), [models.conditioning(name, seed) for seed in range(count)]


@pytest.mark.parametrize("name", models.FAMILIES)
def test_each_row_gets_its_own_caption(name):
    x, sigma, conditionings = batch_of(name)
    with models.in_training(models.patcher(name), name) as training:
        with models.inputs_of(training.denoiser.module) as calls:
            training.denoiser.predict(x, sigma, conditionings)
    assert len(calls) == 1, "one pass for the batch: its cost grows with the batch, not with its square"
    context = calls[0][1]["context"]
    assert context.shape[0] == 4
    for row, one in enumerate(conditionings):
        assert torch.equal(context[row], one.tensors["cross_attn"][0])


@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_each_row_gets_its_own_pooled_vector(name):
    x, sigma, conditionings = batch_of(name)
    with models.in_training(models.patcher(name), name) as training:
        with models.inputs_of(training.denoiser.module) as calls:
            training.denoiser.predict(x, sigma, conditionings)
    width = models.FAMILIES[name].pooled
    for row, one in enumerate(conditionings):
        assert torch.equal(calls[0][1]["y"][row, :width], one.tensors["pooled_output"][0])


def test_sdxl_gets_six_sizes_of_each_picture():
    """Height, width, top, left, target height, target width, each embedded as the host embeds a timestep."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

    x, sigma, conditionings = batch_of("SDXL")
    sizes = [((640, 480), (3, 5), (512, 448)), ((1000, 2000), (0, 7), (64, 128))]
    for row, (original, crop, target) in enumerate(sizes):
        conditionings[row] = replace(conditionings[row], original_size=original, crop=crop, target_size=target)
    with models.in_training(models.patcher("SDXL"), "SDXL") as training:
        with models.inputs_of(training.denoiser.module) as calls:
            training.denoiser.predict(x, sigma, conditionings)
    for row, (original, crop, target) in enumerate(sizes):
        numbers = [original[1], original[0], crop[1], crop[0], target[1], target[0]]
        expected = Timestep(256)(torch.tensor(numbers, dtype=torch.float32)).flatten()
        assert torch.allclose(calls[0][1]["y"][row, 1280:], expected)


def test_sdxl_pictures_of_three_shapes_bring_their_own_sizes(tmp_path):
    """From the files to the network's input: each row of each batch has the six numbers of its own picture."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

    sizes = {"wide": (128, 64), "tall": (64, 160), "square": (96, 96)}
    for number, (name, size) in enumerate(sizes.items()):
        pixels = np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    dataset = scan_folder(str(tmp_path), "", 64, 1)
    with models.in_training(models.patcher("SDXL"), "SDXL", batch_size=2, resolution=64) as training:
        host = replace(training.host, codec=TinyCodec(), text=Wide())
        prepared = prepare(dataset, training.plan.recipe, host, Folders("", str(tmp_path / "cache"), "", ""))
        plan = Plan(recipe=training.plan.recipe, train=prepared.training, trainables={}, export=dict)
        with models.inputs_of(training.denoiser.module) as calls:
            for step, (_, batch) in zip(range(6), plan.batches(0), strict=False):
                shown = plan.samples(batch)
                for part in forward.micro_batches(shown, plan.recipe, host, forward.BatchRows(step)):
                    forward.losses_of(host, part)
    seen = {}
    for _, given in calls:
        for caption, numbers in zip(given["context"][:, 0, 0].tolist(), given["y"][:, 1280:], strict=True):
            seen.setdefault(Wide.captions[round(caption)], []).append(numbers)
    assert sorted(seen) == sorted(sizes)
    # Height and width of the file; top and left of the crop (96 x 48 is cropped to 80 x 48, 38 x 96 to 32 x 96, 64 x 64
    # stays); height and width of the crop.
    expected = {"wide": (64, 128, 0, 8, 48, 80), "tall": (160, 64, 0, 3, 96, 32), "square": (96, 96, 0, 0, 64, 64)}
    for name, rows in seen.items():
        numbers = Timestep(256)(torch.tensor(expected[name], dtype=torch.float32)).flatten()
        for row in rows:
            assert torch.allclose(row, numbers), name


class Wide:
    """A text encoder as wide as the tiny SDXL's; its first value identifies a caption."""

    captions = ["wide", "tall", "square"]

    def encode(self, caption):
        context = torch.full((1, 77, 48), float(self.captions.index(caption)))
        return {"cross_attn": context, "pooled_output": torch.zeros(1, 1280)}

    def form(self, caption):
        return None

    def count_tokens(self, caption):
        return 1

    def fingerprint(self):
        return "wide"


@pytest.mark.parametrize("name", models.FAMILIES)
def test_a_batch_predicts_what_its_members_do(name):
    x, sigma, conditionings = batch_of(name)
    with models.in_training(models.patcher(name), name, spread=0.1) as training, torch.no_grad():
        whole = training.denoiser.predict(x, sigma, conditionings)
        for row in range(4):
            one = training.denoiser.predict(x[row : row + 1], sigma[row : row + 1], conditionings[row : row + 1])
            assert models.distance(whole[row], one[0]) <= 1e-5


@pytest.mark.parametrize("name", models.FAMILIES)
def test_captions_of_different_length_share_a_batch(name):
    """Captions that the host cannot join run in separate groups, and their results come back in order."""
    x, sigma, conditionings = batch_of(name)
    tokens, width = models.FAMILIES[name].context
    for row, length in ((0, 2 * tokens), (2, tokens + 3)):
        context = torch.randn(1, length, width, generator=torch.Generator().manual_seed(row))
        conditionings[row] = replace(conditionings[row], tensors={**conditionings[row].tensors, "cross_attn": context})
    with models.in_training(models.patcher(name), name, spread=0.1) as training, torch.no_grad():
        whole = training.denoiser.predict(x, sigma, conditionings)
        for row in range(4):
            one = training.denoiser.predict(x[row : row + 1], sigma[row : row + 1], conditionings[row : row + 1])
            assert models.distance(whole[row], one[0]) <= 1e-5


@pytest.mark.parametrize("name", models.FAMILIES)
def test_another_caption_changes_only_its_own_row(name):
    """The prediction and the gradient."""
    changed = 1
    found = []
    for caption in (changed, 17):
        x, sigma, conditionings = batch_of(name)
        conditionings[changed] = models.conditioning(name, caption)
        with models.in_training(models.patcher(name), name, spread=0.1) as training:
            parameters = list(training.plan.trainables.values())
            with OutOfPlace():
                output = training.denoiser.predict(x, sigma, conditionings)
            squares = output.square().flatten(1).mean(1)
            rows = [torch.autograd.grad(square, parameters, retain_graph=True) for square in squares]
            found.append((output.detach(), [models.joined(row) for row in rows]))
    (before, gradients_before), (after, gradients_after) = found
    for row in range(4):
        moved = models.distance(after[row], before[row])
        turned = models.distance(gradients_after[row], gradients_before[row])
        assert (moved > 1e-3) == (row == changed), (row, moved)
        assert (turned > 1e-3) == (row == changed), (row, turned)
        assert row == changed or max(moved, turned) <= 1e-5


def test_what_was_in_memory_before_names_no_run(tiny_base):
    """A checkpoint of SD1 has no text_projection for CLIP, so the host leaves uninitialized memory in it."""
    import comfy.sd
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = comfy.sd.load_checkpoint_guess_config(str(tiny_base), output_vae=False, output_clip=True)[1]
    text = ComfyText(clip)
    before = text.fingerprint(), text.encode("a toy")
    weights = clip.cond_stage_model.clip_l.transformer
    with torch.no_grad():
        weights.text_projection.weight.fill_(float("nan"))
    found = text.encode("a toy")
    assert text.fingerprint() == before[0]
    assert torch.equal(found["cross_attn"], before[1]["cross_attn"])
    assert all(tensor.isfinite().all() for tensor in found.values())
    with torch.no_grad():
        weights.text_model.final_layer_norm.weight.add_(1.0)
    assert text.fingerprint() != before[0]
