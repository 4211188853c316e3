"""Tests of image to video: the network's inputs in training equal those of ComfyUI's own nodes and sampler."""

import functools
import importlib
import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import Conditioning, Host
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps.plan import Plan
from graft_pack.trainers.steps.predict import weights_of
from graft_pack.trainers.steps.step import batch_loss, crop_sample, fixed_losses
from PIL import Image

from docs.build import make_families
from tests.support import models
from tests.support.gradients import directional_error
from tests.support.videos import shade, write_video

pytestmark = pytest.mark.usefixtures("comfy")

SIGMA = 0.6
CONCAT = "v1 (concat)"


class Encoder:
    """A random convolution to latents of some size, of a clip's frames 0, 4, 8, ... each alone.

    ComfyUI builds LTX-Video's, Wan 2.2's and HunyuanVideo 1.5's own VAEs in their full size only.
    """

    def __init__(self, channels, factor):
        self._weight = torch.randn(channels, 3, factor, factor, generator=torch.Generator().manual_seed(7)) / factor
        self._factor = factor

    def encode(self, pixels):
        mean = torch.nn.functional.conv2d(pixels[::4].movedim(-1, 1) * 2 - 1, self._weight, stride=self._factor)
        return mean.movedim(0, 1)[None]

    def spacial_compression_encode(self):
        return self._factor


@dataclass(frozen=True)
class Node:
    """A node of ComfyUI that puts a picture before a clip of three latent frames.

    Attributes:
        path: module and class.
        model: key of `models.SIZES`.
        factor: pixels per side of a latent position.
        length: frames of the clip.
        more: further inputs.
    """

    path: str
    model: str
    factor: int = 8
    length: int = 9
    more: tuple = ()


# Nodes whose picture lies in the sampler's latent.
IN_LATENT = {
    "LTX-Video": Node("nodes_lt.LTXVImgToVideo", "LTXV", 32, 17, (("strength", 1.0),)),
    "LTX-2": Node("nodes_lt.LTXVImgToVideo", "LTXAV", 32, 17, (("strength", 1.0),)),
    "Wan 2.2 5B": Node("nodes_wan.Wan22ImageToVideoLatent", "WAN22_T2V", 16),
    "Cosmos": Node("nodes_cosmos.CosmosImageToVideoLatent", "CosmosI2V", 8, 17),
    "Cosmos-Predict2": Node("nodes_cosmos.CosmosPredict2ImageToVideoLatent", "CosmosI2VPredict2"),
}
# Nodes whose picture lies beside the clip, in the conditioning.
BESIDE = {
    "Wan": Node("nodes_wan.WanImageToVideo", "WAN21_I2V"),
    "Wan, first and last frame": Node("nodes_wan.WanFirstLastFrameToVideo", "WAN21_I2V"),
    "HunyuanVideo": Node("nodes_hunyuan.HunyuanImageToVideo", "HunyuanVideoI2V", more=(("guidance_type", CONCAT),)),
    "HunyuanVideo, custom": Node(
        "nodes_hunyuan.HunyuanImageToVideo", "HunyuanVideo", more=(("guidance_type", "custom"),)
    ),
    "HunyuanVideo 1.5": Node("nodes_hunyuan.HunyuanVideo15ImageToVideo", "HunyuanVideo15 I2V", 16),
    "Skyreels": Node("nodes_ip2p.InstructPixToPixConditioning", "HunyuanVideoSkyreelsI2V"),
}


def skip_without(node):
    if node.model.partition(" ")[0] not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")


def picture(node, seed=5):
    height, width = (node.factor * side for side in models.SIZES[node.model].latent[-2:])
    return torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(seed))


@functools.cache
def vae_of(node):
    channels = models.SIZES[node.model].latent[0]
    return models.wan_vae() if (channels, node.factor) == (16, 8) else Encoder(channels, node.factor)


@pytest.fixture(scope="module", autouse=True)
def _vaes_are_freed():
    """Free them while ComfyUI is there: its objects do not survive the end of the interpreter quietly."""
    yield
    vae_of.cache_clear()


def run_node(node, vae, model):
    """Run the node. Return (positive CONDITIONING, LATENT)."""
    from graft_pack.nodes.host.model import encoded_prompts, families

    values = encoded_prompts.values_of(models.conditioning(node.model).tensors, torch.device("cpu"))
    vision = values.pop("clip_vision_output", None)
    values = {name: value for name, value in values.items() if not name.startswith("concat_")}
    prompt = [[values.pop("cross_attn"), {"pooled_output": None, **values, **families.guidance(model)}]]
    _, height, width, _ = picture(node).shape
    given = {
        "positive": prompt,
        "negative": prompt,
        "vae": vae,
        "batch_size": 1,
        "length": node.length,
        "width": width,
        "height": height,
        **dict.fromkeys(("clip_vision_output", "clip_vision_start_image", "clip_vision_end_image"), vision),
        **dict.fromkeys(("image", "start_image", "pixels"), picture(node)),
        "end_image": picture(node, 8) if "Last" in node.path else None,
        **dict(node.more),
    }
    module, _, kind = node.path.partition(".")
    execute = getattr(importlib.import_module(f"comfy_extras.{module}"), kind).execute
    with torch.inference_mode():
        results = execute(**{name: given[name] for name in inspect.signature(execute).parameters}).result
    return (results[0] if len(results) > 1 else prompt), results[-1]


def sampled(model, positive, latent, x):
    """Return (x0, calls of the network) at x and SIGMA, as ComfyUI's sampler computes them in a step."""
    import comfy.sample
    import comfy.samplers

    found = []

    def step(denoise, start, sigmas, extra_args=None, callback=None, disable=None, **more):
        found.append(denoise(x, torch.full((1,), SIGMA), **extra_args))
        return start

    sigmas = torch.tensor([SIGMA, 0.0])
    network = model.model.diffusion_model
    with torch.inference_mode(), models.inputs_of(network) as calls:
        comfy.sample.sample_custom(
            model,
            torch.zeros_like(x),
            1.0,
            comfy.samplers.KSAMPLER(step),
            sigmas,
            positive,
            positive,
            latent["samples"],
            noise_mask=latent.get("noise_mask"),
            disable_pbar=True,
            seed=1,
        )
    return found[0].clone(), calls


def assert_same_inputs(calls, wanted):
    """Compare the arguments of a call of the network with those of the host's call."""
    (args, kwargs), (other, others) = calls[-1], wanted[-1]
    assert len(args) == len(other)
    names = {name for name, value in others.items() if value is not None} - {"transformer_options", "control"}
    assert names == {name for name, value in kwargs.items() if value is not None} - {"transformer_options", "control"}
    compared = 0
    for one, two in [*zip(args, other, strict=True), *((kwargs[name], others[name]) for name in sorted(names))]:
        both = (part if isinstance(part, (list, tuple)) else [part] for part in (one, two))
        for mine, theirs in zip(*both, strict=True):
            if torch.is_tensor(theirs):
                assert mine.shape == theirs.shape and models.distance(mine, theirs.clone()) <= 1e-5
                compared += 1
            else:
                assert mine == theirs
    assert compared >= 3


@pytest.mark.parametrize("name", IN_LATENT)
def test_a_first_frame_reaches_the_network_as_from_the_hosts_node(name):
    node = IN_LATENT[name]
    skip_without(node)
    model, vae = models.patcher(node.model), vae_of(node)
    positive, latent = run_node(node, vae, model)
    clip = torch.rand(node.length, *picture(node).shape[1:], generator=torch.Generator().manual_seed(6))
    clip[0] = picture(node)[0]
    with torch.inference_mode():
        encoded = vae.encode(clip).float()
    x = torch.randn(1, *models.SIZES[node.model].latent, generator=torch.Generator().manual_seed(1))
    wanted, calls = sampled(model, positive, latent, x)
    plain, _ = sampled(model, positive, {"samples": latent["samples"]}, x)
    with models.in_training(model, node.model) as training:
        assert training.denoiser.takes_first_frame
        first = training.denoiser.scale_latents(encoded.clone())[:, :, :1]
        one = replace(models.conditioning(node.model), first_frame=first)
        with models.inputs_of(training.denoiser.module) as mine:
            found = models.trained_denoised(training, x, SIGMA, one)
        assert_same_inputs(mine, calls)
    assert models.distance(found[:, :, 1:], wanted[:, :, 1:]) <= 1e-5
    assert models.distance(plain[:, :, 1:], wanted[:, :, 1:]) > 1e-2, "the frame matters"


@pytest.mark.parametrize("name", BESIDE)
def test_the_conditioning_of_the_hosts_node_reaches_the_network_as_in_the_host(name):
    from graft_pack.nodes.host.model.encoded_prompts import encoded_prompts

    node = BESIDE[name]
    skip_without(node)
    model = models.patcher(node.model)
    positive, latent = run_node(node, vae_of(node), model)
    x = torch.randn(1, *models.SIZES[node.model].latent, generator=torch.Generator().manual_seed(1))
    if latent["samples"].shape[2] == 1:
        latent = {"samples": torch.zeros_like(x)}
    wanted, calls = sampled(model, positive, latent, x)
    one = replace(models.conditioning(node.model), tensors=encoded_prompts([positive])[0].tensors)
    with models.in_training(model, node.model) as training:
        with models.inputs_of(training.denoiser.module) as mine:
            found = models.trained_denoised(training, x, SIGMA, one)
        assert_same_inputs(mine, calls)
    assert models.distance(found, wanted) <= 1e-5


def items_of(node, first=(True, True)):
    """Return two clips as dataset items; those chosen keep their first frame."""

    def item(number):
        shown = models.item(node.model, number).show(None)
        frame = shown.latent[:, :, :1] if first[number] else None
        shown = replace(shown, conditioning=replace(shown.conditioning, first_frame=frame))
        return DatasetItem(f"clip {number}", (64, 64), 1, lambda visit: shown)

    return [item(number) for number in range(2)]


@contextmanager
def training_of(node, *args, model=None, first=(True, True), **fields):
    skip_without(node)
    model = model or models.patcher(node.model)
    with models.in_training(model, node.model, *args, **fields) as training:
        yield replace(training, plan=replace(training.plan, train=items_of(node, first)))


every_node = pytest.mark.parametrize("node", IN_LATENT.values(), ids=list(IN_LATENT))


@every_node
def test_gradients_with_a_first_frame_are_those_of_finite_differences(node):
    skip_without(node)
    gradients = []
    for checkpointing in (False, True):
        model = models.patcher(node.model, torch.float64)
        with training_of(node, checkpointing, 0.1, model=model) as training, models.float64_throughout(training):
            gradients.append(models.joined(training.gradients()))
            for part in "AB":
                named = training.plan.trainables.items()
                parameters = [value for name, value in named if f"lora_{part}" in name]
                assert directional_error(training.losses, parameters, step=0.002)[0] <= 1e-5
    assert models.distance(gradients[1], gradients[0]) <= 1e-6


@every_node
def test_a_batch_of_clips_with_and_without_a_first_frame_is_predicted_row_by_row(node):
    with training_of(node, spread=0.1, first=(True, False)) as training:
        plan, host = training.plan, training.host
        both = fixed_losses(plan.train, plan.recipe, host)
        noise = torch.randn(2, *models.SIZES[node.model].latent, generator=torch.Generator().manual_seed(3))
        x_t, sigma = noise, torch.tensor([0.4, 0.7])
        conditionings = [item.show(None).conditioning for item in plan.train]
        with torch.no_grad():
            together = host.denoiser.predict(x_t, sigma, conditionings)
            alone = [
                host.denoiser.predict(x_t[row : row + 1], sigma[row : row + 1], [conditionings[row]]) for row in (0, 1)
            ]
        assert models.distance(together, torch.cat(alone)) <= 1e-6
        assert torch.isfinite(both).all()


@pytest.mark.parametrize("fields", [{}, {"objective": Objective(loss="Huber")}], ids=["native", "Huber"])
@every_node
def test_the_loss_leaves_the_first_frame_out(node, fields):
    """The latent that is noised may have any first frame: the network gets the clean one, and no loss compares it."""
    with training_of(node, batch_size=1, **fields) as training:
        shown = training.plan.train[0].show(None)
        found = []
        for change in (0.0, 3.0):
            latent = shown.latent.clone()
            latent[:, :, :1] += change
            other = DatasetItem("clip", (64, 64), 1, lambda visit, latent=latent: replace(shown, latent=latent))
            plan = replace(training.plan, train=[other])
            found.append(float(batch_loss(plan, training.host).detach()))
        assert found[0] == found[1]
        bare = replace(shown, conditioning=models.conditioning(node.model))
        plan = replace(training.plan, train=[DatasetItem("clip", (64, 64), 1, lambda visit: bare)])
        assert abs(float(batch_loss(plan, training.host).detach()) - found[0]) > 1e-4 * found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_node
def test_half_precision_with_a_first_frame_is_the_hosts_to_the_bit(node, dtype):
    skip_without(node)
    model = models.patcher(node.model, dtype)
    x = torch.randn(1, *models.SIZES[node.model].latent, generator=torch.Generator().manual_seed(1))
    vae = vae_of(node)
    positive, latent = run_node(node, vae, model)
    wanted, _ = sampled(model, positive, latent, x)
    with torch.inference_mode():
        encoded = vae.encode(picture(node)).float()
    with models.in_training(model, node.model, compute_dtype="auto") as training:
        first = training.denoiser.scale_latents(encoded.clone())
        one = replace(models.conditioning(node.model), first_frame=first)
        found = models.trained_denoised(training, x, SIGMA, one)
    assert torch.equal(found[:, :, 1:], wanted[:, :, 1:])


@every_node
def test_a_lora_learns_to_continue_first_frames(node, tmp_path):
    with training_of(node, steps=30, learning_rate=2e-2, rank=16, batch_size=2) as training:
        plan, host = training.plan, training.host
        before = float(fixed_losses(plan.train, plan.recipe, host).mean())
        models.train(training, tmp_path)
        after = float(fixed_losses(plan.train, plan.recipe, host).mean())
    print(f"loss {before:.4f} to {after:.4f}")
    assert after < 0.8 * before


def test_weights_of_masks_and_first_frames_meet_in_a_batch():
    latent = torch.randn(1, 48, 3, 4, 4)
    half = torch.ones(1, 1, 1, 4, 4)
    half[..., 2:] = 0.25
    kept = Conditioning({}, first_frame=latent[:, :, :1])
    samples = [Sample(latent, one, weight) for one in (Conditioning({}), kept) for weight in (None, half)]
    weights = weights_of(samples, torch.cat([latent] * 4))
    outside = weights_of(samples, torch.cat([latent] * 4), outside=True)
    assert weights.shape == outside.shape == (4, 1, 3, 4, 4)
    assert weights_of(samples[:1], latent) is None
    assert torch.equal(weights[1], half.expand(1, 1, 3, 4, 4)[0])
    assert torch.equal(outside[:2], 1 - weights[:2])
    assert not weights[2:, :, 0].any() and not outside[2:, :, 0].any()
    assert torch.equal(weights[2:, :, 1:], weights[:2, :, 1:])
    assert torch.equal(outside[2:, :, 1:], outside[:2, :, 1:])
    assert crop_sample(samples[2], 0.5).conditioning.first_frame.shape == (1, 48, 1, 2, 2)


@every_node
def test_a_sample_clip_continues_a_first_frame_as_with_the_hosts_node(node):
    import comfy.sample
    from graft_pack.nodes.host.model.sampling import PromptSampler
    from graft_pack.trainers.protocols import PictureRequest

    skip_without(node)
    model, vae = models.patcher(node.model), vae_of(node)
    positive, latent = run_node(node, vae, model)
    _, height, width, _ = picture(node).shape
    request = PictureRequest("", (width, height), 2, 1.0, "euler", "simple", 5, frames=node.length)
    with torch.inference_mode():
        first = model.model.process_latent_in(vae.encode(picture(node)).float())
        noise = comfy.sample.prepare_noise(latent["samples"], 5)
        drawing = (noise, 2, 1.0, "euler", "simple", positive, positive, latent["samples"])
        wanted = comfy.sample.sample(model, *drawing, disable_pbar=True, seed=5, noise_mask=latent["noise_mask"])
        sampler = PromptSampler(model, Prompts(positive), Clips(node))
        (plain,) = sampler._latents([request])
        (found,) = sampler._latents([replace(request, beside=Conditioning({}, first_frame=first))])
        (other,) = sampler._latents([replace(request, beside=Conditioning({}, first_frame=first[..., :2]))])
    assert models.distance(found, wanted) <= 1e-5
    assert models.distance(plain, wanted) > 1e-2
    assert torch.equal(plain, other), "a frame of another size is left out"


class Prompts:
    """A text encoder for drawing: every prompt is one CONDITIONING."""

    def __init__(self, conditioning):
        self._conditioning = conditioning

    def prompt(self, text):
        return self._conditioning


class Clips:
    """A VAE for drawing: it has the factors of a node's clips."""

    def __init__(self, node):
        self._factor = node.factor
        self.downscale_ratio = (lambda frames: 3, node.factor, node.factor)

    def spacial_compression_encode(self):
        return self._factor


def ltx_network():
    """Return a small network of LTX-Video's VAE."""
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    blocks = [["compress_all", 1]] * 3
    config = {"dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 128, "scaling_factor": 1.0}
    config |= {"blocks": blocks, "encoder_blocks": blocks, "decoder_blocks": blocks, "norm_layer": "pixel_norm"}
    config |= {"_class_name": "CausalVideoAutoencoder", "patch_size": 4, "latent_log_var": "uniform"}
    network = VideoVAE(config=config | {"use_quant_conv": False, "causal_decoder": False})
    with torch.no_grad():
        for statistics in network.buffers():
            statistics.fill_(1.0)
    return network


def wan22_network():
    """Return a small network of Wan 2.2's VAE."""
    from comfy.ldm.wan.vae2_2 import WanVAE

    shape = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    return WanVAE(dim=16, dec_dim=16, z_dim=48, **shape)


@pytest.mark.parametrize("build, frames, side", [(ltx_network, 17, 64), (wan22_network, 9, 32)])
def test_the_first_latent_of_a_clip_is_that_of_its_first_picture(build, frames, side):
    """So a clip's own latent holds what ComfyUI's nodes encode. Wan 2.1's VAE, which Cosmos shares, is tested below."""
    network = build()
    models.randomize(network, 0)
    pixels = 2 * torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(1)) - 1
    with torch.no_grad():
        clip, picture, last = (
            network.encode(pixels),
            network.encode(pixels[:, :, :1]),
            network.encode(pixels[:, :, -1:]),
        )
    assert clip.shape[2] == 3 and picture.shape[2] == 1
    assert models.distance(clip[:, :, :1], picture) <= 1e-5
    assert models.distance(clip[:, :, :1], last) > 1e-2


CLIPS = IN_LATENT["Cosmos-Predict2"]


def clips_in(folder, frames=9):
    """Return a dataset of two clips of 9 frames and a still."""
    if not folder.exists():
        folder.mkdir()
        for number in range(2):
            write_video(
                folder / f"{number}.mp4", 9, (64, 64), draw=lambda frame, size, at=number: shade(frame + at, size)
            )
        Image.fromarray(shade(30, (64, 64))).save(folder / "still.png")
    return scan_folder(str(folder), "", 64, 1, None, ScanOptions(frames=frames))


def prepared(training, folder, dataset=None, **fields):
    """Return (host, recipe, prepared dataset) of clips with the host's own VAE."""
    from graft_pack.nodes.host.model.vae import ComfyCodec

    host = replace(training.host, codec=ComfyCodec(vae_of(CLIPS)), text=models.Words(CLIPS.model))
    recipe = replace(training.plan.recipe, resolution=64, **fields)
    folders = Folders("", str(folder / "cache"), "", "")
    return host, recipe, prepare(dataset or clips_in(folder / "clips"), recipe, host, folders)


def test_a_clips_first_frame_is_its_first_picture_as_the_hosts_node_encodes_it(tmp_path):
    from comfy_extras.nodes_cosmos import CosmosPredict2ImageToVideoLatent

    dataset = clips_in(tmp_path / "clips")
    with models.in_training(models.patcher(CLIPS.model), CLIPS.model) as training:
        host, _, made = prepared(training, tmp_path, first_frame_probability=1.0)
        items = {item.name: item for item in made.training}
        assert items["still.png"].show(3).conditioning.first_frame is None
        for example in dataset.examples[:2]:
            (frame, *_) = example.source.frames(0, 9)
            pixels = torch.from_numpy(np.asarray(frame, np.float32) / 255)[None]
            given = {"vae": vae_of(CLIPS), "width": 64, "height": 64, "length": 9, "batch_size": 1}
            with torch.inference_mode():
                (latent,) = CosmosPredict2ImageToVideoLatent().execute(**given, start_image=pixels).result
                wanted = host.denoiser.scale_latents(latent["samples"].clone())[:, :, :1]
            for visit in (None, 3):
                shown = items[example.source.name].show(visit)
                assert shown.latent.shape == (1, 16, 3, 8, 8) and shown.weight is None
                assert shown.conditioning.first_frame.shape == (1, 16, 1, 8, 8)
                assert models.distance(shown.conditioning.first_frame, wanted) <= 1e-5


def test_the_probability_is_the_part_of_the_visits_with_a_first_frame(tmp_path):
    with models.in_training(models.patcher(CLIPS.model), CLIPS.model) as training:

        def drawn(**fields):
            *_, made = prepared(training, tmp_path, **fields)
            items = [item for item in made.training if item.frames > 1]
            assert len(items) == 2
            visits = (None, *range(200))
            return [[item.show(visit).conditioning.first_frame is not None for visit in visits] for item in items]

        found = drawn(first_frame_probability=0.25)
        assert found == drawn(first_frame_probability=0.25) != drawn(first_frame_probability=0.25, seed=1)
        assert found[0] != found[1]
        assert all(30 <= sum(row) <= 70 for row in found)
        assert not any(map(any, drawn(first_frame_probability=0.0)))
        assert all(map(all, drawn(first_frame_probability=1.0)))


def test_classes_whose_sampler_keeps_a_first_frame_are_told_from_others():
    from graft_pack.nodes.host.model import families

    here = [name for name in models.CLASSES if name in make_families.list_classes()]
    wanted = {node.model for node in IN_LATENT.values()} & set(here)
    assert {name for name in here if families.takes_first_frame(models.patcher(name))} == wanted


@pytest.mark.parametrize("name", ["WAN21_I2V", "CosmosT2V", "SD1"])
def test_other_classes_refuse_a_first_frame(name, tmp_path):
    with models.in_training(models.patcher(name), name) as training:
        with pytest.raises(SettingsError, match=r"first_frame_probability.*takes no first frame.*Wan I2V"):
            prepared(training, tmp_path, first_frame_probability=0.5)


def test_a_first_frame_without_clips_is_refused(tmp_path):
    with models.in_training(models.patcher(CLIPS.model), CLIPS.model) as training:
        clips_in(tmp_path / "clips")
        with pytest.raises(SettingsError, match="first_frame_probability.*has no clips"):
            prepared(training, tmp_path, clips_in(tmp_path / "clips", frames=0), first_frame_probability=0.5)


def test_sample_clips_continue_the_first_frames_of_the_dataset(tmp_path):
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.engine.previews import preview

    model, vae = models.patcher(CLIPS.model), vae_of(CLIPS)
    denoiser = ComfyDenoiser(model, Prompts([[torch.zeros(1, 7, 48), {"pooled_output": None}]]), vae)
    drawing = {"preview_steps": 1, "preview_cfg": 1.0, "preview_prompts": ("a", "b", "c --w 128 --h 64")}
    run = SimpleNamespace(
        save_samples=lambda step, pictures, rate: drawn.extend(pictures) or [], log=lambda event: None
    )
    drawn = []
    with denoiser.training("auto"), torch.no_grad():
        training = SimpleNamespace(
            host=Host(denoiser, None, None), plan=SimpleNamespace(recipe=models.recipe("general"))
        )
        host, recipe, made = prepared(training, tmp_path, first_frame_probability=1.0, **drawing)
        items = [item for item in made.training if item.frames > 1]
        with models.inputs_of(denoiser.module) as calls:
            plan = Plan(recipe=recipe, train=items, trainables={}, export=dict)
            preview(plan, run, host, 0)
        firsts = [item.show(None).conditioning.first_frame for item in items]
    assert [len(frames) for frames in drawn] == [9] * 3
    for (args, more), first in zip(calls, firsts, strict=False):
        assert more["denoise_mask"][:, :, 0].max() == 0 and more["denoise_mask"][:, :, 1:].min() == 1
        assert not args[1][:, 0].any() and args[1][:, 1:].all(), "timesteps by frame"
        assert models.distance(args[0][:, 16, 0], torch.ones_like(args[0][:, 16, 0])) == 0
        assert models.distance(args[0][:, :16, :1] / args[0][:, :16, :1].norm(), first / first.norm()) <= 1e-5
    assert "denoise_mask" not in calls[2][1], "another size"
