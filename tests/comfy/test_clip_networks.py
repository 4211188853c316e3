"""Tests of training on clips: latents with several frames."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.steps.step import batch_loss, fixed_losses

from docs.build import make_families
from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")

WAN = "WAN21_T2V"
SIDE = 4


def wave(number):
    """Return a latent clip [1, 16, 3, SIDE, SIDE]: a wave in each channel that moves from frame to frame."""
    source = torch.Generator().manual_seed(100 + number)
    phase = 6.28 * torch.rand(16, 1, 1, 1, generator=source)
    rates = torch.randn(3, 16, 1, 1, 1, generator=source)
    axes = torch.meshgrid(torch.arange(3), torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return 1.4 * torch.sin(phase + sum(rate * axis for rate, axis in zip(rates, axes, strict=True)))[None]


def clips(repeats):
    """Return four clips as dataset items, each with its own prompt."""

    def item(number):
        shown = Sample(wave(number), models.conditioning(WAN, number))
        return DatasetItem(f"clip {number}", (64, 64), repeats, lambda visit: shown)

    return [item(number) for number in range(4)]


def fresh_wan():
    """Return a tiny Wan with the weights of a network before its pretraining: no part of it drowns the others."""
    model = models.patcher(WAN)
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.model.diffusion_model.named_parameters():
            if weight.dim() > 1:
                is_gate = "modulation" in name or "time_projection" in name
                spread = 0.02 if is_gate else weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=source) * spread)
            else:
                weight.fill_(float("norm" in name and name.endswith("weight")))
    return model


def psnr(drawn, clip):
    return float(10 * torch.log10((clip.max() - clip.min()) ** 2 / ((drawn - clip) ** 2).mean()))


@pytest.mark.slow
def test_a_lora_fits_four_clips_and_the_host_draws_them(tmp_path):
    """The loss at fixed noise falls below a tenth. Each prompt draws its own clip, far nearer than the other three."""
    import comfy.sample
    import comfy.sd

    model = fresh_wan()
    settings = {"rank": 64, "alpha": 64.0, "targets": "linear + conv", "batch_size": 16, "schedule": "cosine"}
    with models.in_training(model, WAN, steps=500, learning_rate=1e-2, **settings) as training:
        training = replace(training, plan=replace(training.plan, train=clips(repeats=4)))
        recipe = training.plan.recipe
        before = float(fixed_losses(training.plan.train, recipe, training.host).mean())
        state = models.train(training, tmp_path)
        after = float(fixed_losses(training.plan.train, recipe, training.host).mean())
        adapter = training.plan.export(state.trainables, 0).adapter
    applied = comfy.sd.load_lora_for_models(model, None, dict(adapter), 1.0, 0.0)[0]
    found = torch.zeros(4, 4)
    for number in range(4):
        noise = comfy.sample.prepare_noise(wave(number), 7 + number)
        prompt = [[models.conditioning(WAN, number).tensors["cross_attn"], {}]]
        drawing = (applied, noise, 10, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise))
        with torch.inference_mode():
            drawn = applied.model.process_latent_in(comfy.sample.sample(*drawing, disable_pbar=True, seed=7))
        found[number] = torch.tensor([psnr(drawn, wave(other)) for other in range(4)])
    print(f"loss {before:.3f} to {after:.3f}; PSNR {found.tolist()}")
    assert after < 0.1 * before
    chance = found[~torch.eye(4, dtype=torch.bool)].max()
    assert found.diag().min() > chance + 6


MEMORY = {
    "checkpointing": {"checkpointing": True},
    "attention kept": {"checkpointing": True, "recompute": "all but attention"},
    "micro-batches": {"micro_batch": 1},
    "both": {"checkpointing": True, "micro_batch": 1},
}
VIDEO = [name for name, tiny in networks.CLASSES.items() if len(tiny.latent) == 4 and tiny.latent[1] > 1]


@pytest.mark.parametrize("way", MEMORY)
@pytest.mark.parametrize("name", VIDEO)
def test_memory_options_leave_the_gradient_of_clips(name, way):
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    model = models.patcher(name)
    found = []
    for options in ({}, MEMORY[way]):
        with models.in_training(model, name, spread=0.1, batch_size=2, **options) as training:
            found.append(models.joined(training.gradients()))
    assert models.distance(found[1], found[0]) <= 2e-5


def item_of(latent, weight=None):
    return DatasetItem("clip", (64, 64), 1, lambda visit: Sample(latent, models.conditioning(WAN), weight))


OBJECTIVES = {
    "noise offset": {"noise_offset": 0.1},
    "random noise offset": {"noise_offset": 0.1, "noise_offset_random_strength": "on", "adaptive_noise_scale": 0.05},
    "pyramid noise": {"pyramid_discount": 0.6},
    "input perturbation": {"input_perturbation": 0.1},
    "Huber": {"loss": "Huber"},
    "cosmap": {"weighting": "cosmap"},
    "shifted": {"timesteps": "shifted", "timestep_shift": 5.0},
    "resolution-shifted": {"timesteps": "resolution-shifted"},
}


@pytest.mark.parametrize("fields", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_takes_clips(fields):
    with models.in_training(models.patcher(WAN), WAN, objective=Objective(**fields)) as training:
        assert torch.isfinite(batch_loss(training.plan, training.host))


def test_a_still_mask_weighs_every_frame():
    """Half of each frame is left out: its latent and noise may be anything."""
    latent = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    weight = torch.ones(1, 1, 1, 8, 8)
    weight[..., 4:] = 0.0
    with models.in_training(models.patcher(WAN), WAN, batch_size=1) as training:

        def loss(weight):
            plan = replace(training.plan, train=[item_of(latent, weight)])
            return float(batch_loss(plan, training.host).detach())

        halves = [loss(weight), loss(1 - weight)]
        assert abs(sum(halves) / 2 - loss(None)) <= 1e-4 * loss(None)
        assert abs(halves[0] - halves[1]) > 1e-3


ANIMATED = ["WAN21_I2V", "HunyuanVideoI2V", "HunyuanVideoSkyreelsI2V", "HunyuanVideo15 I2V", "CogVideoX_I2V"]


@pytest.mark.parametrize("name", ANIMATED)
def test_a_clip_is_predicted_beside_its_first_frame_as_by_the_host(name):
    """A conditioning's pictures reach the network as in the host, at every visit, and matter."""
    if name.partition(" ")[0] not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    model = models.patcher(name)
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(1))
    conditionings = [models.conditioning(name, seed) for seed in (0, 1)]
    wanted = [models.denoised(model, x, 0.6, one) for one in conditionings]
    assert models.distance(*wanted) > 1e-2
    with models.in_training(model, name) as training:
        for _ in range(2):
            for one, host in zip(conditionings, wanted, strict=True):
                assert models.distance(models.trained_denoised(training, x, 0.6, one), host) <= 1e-5


def graph_with(file_name):
    """Return a graph in which node 4 trains on a loader's model, through a ModelSampling and a LoRA node."""
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": file_name, "weight_dtype": "default"}},
        "2": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["1", 0], "shift": 8.0}},
        "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["2", 0], "lora_name": "low_noise.safetensors"}},
        "4": {"class_type": "GraftTrainLoRA", "inputs": {"model": ["3", 0], "method": "LoRA"}},
    }


@pytest.mark.parametrize(
    "name, file_name, bounds",
    [
        (WAN, "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", (875, 1000)),
        (WAN, "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", (0, 875)),
        (WAN, "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf", (0, 875)),
        ("WAN21_I2V", "wan2.2_i2v_high_noise_14B_fp16.safetensors", (900, 1000)),
        (WAN, "wan2.1_t2v_1.3B_fp16.safetensors", (0, 1000)),
        ("WAN22_T2V", "high_noise.safetensors", (0, 1000)),
        ("Flux", "high_noise.safetensors", (0, 1000)),
    ],
)
def test_an_expert_of_wan_is_trained_on_its_own_timesteps(name, file_name, bounds, monkeypatch):
    from graft_pack.nodes.host.actions import train
    from graft_pack.nodes.host.jobs import provenance

    monkeypatch.setattr(provenance, "_executing_prompt", lambda: graph_with(file_name))
    model = models.patcher(name)
    recipe = train.with_expert_range(models.recipe("Wan"), model, "4")
    assert (recipe.objective.min_timestep, recipe.objective.max_timestep) == bounds
    chosen = models.recipe("Wan", objective=Objective(min_timestep=100))
    assert train.with_expert_range(chosen, model, "4") is chosen


def test_every_draw_of_an_expert_lies_in_its_range():
    from graft_pack.trainers.objective.timesteps import draw_levels

    with models.in_training(models.patcher(WAN), WAN) as training:
        for least, most in ((875, 1000), (0, 875)):
            objective = Objective(min_timestep=least, max_timestep=most)
            source = torch.Generator().manual_seed(0)
            shape = (200, *networks.CLASSES[WAN].latent)
            levels = (objective, training.denoiser.sigmas(), "flow", shape, source)
            sigma, _ = draw_levels(*levels)
            assert least <= 1000 * sigma.min() and 1000 * sigma.max() <= most


class Prompts:
    """A text encoder for drawing: every prompt is the conditioning of its seed."""

    def prompt(self, text):
        return [[models.conditioning(WAN, len(text)).tensors["cross_attn"], {}]]


def test_a_preview_has_the_frames_that_the_host_draws_and_decodes():
    import comfy.sample
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.protocols import PictureRequest

    model, vae, text = models.patcher(WAN), models.wan_vae(), Prompts()
    request = PictureRequest("a dog", (32, 48), 2, 1.0, "euler", "simple", 5, frames=9)
    denoiser = ComfyDenoiser(model, text, vae)
    with denoiser.training("fp32"):
        still, clip = denoiser.preview([replace(request, frames=1), request])
    assert still.size == (32, 48)
    assert [frame.size for frame in clip] == [(32, 48)] * 9
    latent = torch.zeros(1, 16, 3, 6, 4)
    noise = comfy.sample.prepare_noise(latent, 5)
    prompts = text.prompt("a dog"), text.prompt("")
    with torch.inference_mode():
        drawn = comfy.sample.sample(
            model, noise, 2, 1.0, "euler", "simple", *prompts, latent, disable_pbar=True, seed=5
        )
        frames = vae.decode(drawn)[0]
    for frame, wanted in zip(clip, frames, strict=True):
        assert abs(torch.tensor(list(frame.getdata())).float() / 255 - wanted.reshape(-1, 3)).max() <= 0.5 / 255 + 1e-3


def test_classes_that_take_clips_are_told_from_those_of_pictures():
    from graft_pack.nodes.host.model import families

    taking = set()
    for name in networks.CLASSES:
        if name in make_families.list_classes() and families.takes_clips(models.patcher(name)):
            taking.add(name)
    assert taking == set(VIDEO) & set(make_families.list_classes())


def test_cogvideox_is_drawn_at_the_scale_it_was_made_for():
    """The network sees latents of about unit size; ComfyUI's usual samplers start at several thousands."""
    from graft_pack.nodes.host.model.sampling import PromptSampler
    from graft_pack.trainers.protocols import PictureRequest

    if "CogVideoX_T2V" not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    model = models.patcher("CogVideoX_T2V")
    request = PictureRequest("a dog", (32, 48), 3, 1.0, "euler", "simple", 5, frames=9)
    with models.inputs_of(model.model.diffusion_model) as calls, torch.inference_mode():
        (latent,) = PromptSampler(model, Prompts(), models.wan_vae())._latents([request])
    assert latent.shape == (1, 16, 3, 6, 4)
    assert len(calls) == 3
    assert all(0.2 < args[0].std() < 5 for args, _ in calls)
