"""Tests of loss, gradients and conditioning against diffusers and against the host itself, on the same weights."""

import pytest
import torch
from graft_pack.trainers.steps import step
from graft_pack.trainers.steps.plan import Plan

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

KINDS = {"epsilon": "eps", "v_prediction": "v_prediction"}
LARGE = {"steps": 5, "learning_rate": 1e-2, "batch_size": 2, "max_grad_norm": 0.0}


def model_of(prediction_type):
    """Return a tiny SD1 MODEL, with core's node upstream for v-prediction."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(models.patcher("SD1"), KINDS[prediction_type], False)[0]


def by_adapter_name(training_or_denoiser, tensors):
    """Return the trainable tensors by the layer's name in the adapter file and by factor."""
    named = {}
    for name, tensor in tensors.items():
        path, factor = name.split(".lora_")
        named[training_or_denoiser.adapter_name(path), factor[0]] = tensor
    return named


def adapt(unet, recipe, values):
    """Put peft's LoRA with given values on a diffusers UNet; return its trainable parameters by adapter name."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.methods import METHODS

    from tests.support.diffusers_host import DiffusersDenoiser

    method = METHODS["LoRA"]
    trainables = by_adapter_name(
        DiffusersDenoiser(unet), method.inject(unet, method.targets(unet, family_of("SD1"), recipe), recipe)
    )
    assert trainables.keys() == values.keys()
    with torch.no_grad():
        for key, parameter in trainables.items():
            parameter.copy_(values[key])
    return trainables


def reference(unet, scheduler, x0, noise, t, context):
    """Return the loss of each sample as diffusers' own training scripts compute it."""
    output = unet(scheduler.add_noise(x0, noise, t), t, context).sample
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(x0, noise, t)
    return torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))


def min_snr(scheduler, t, gamma):
    """Return the weights by which diffusers' training scripts multiply each sample's loss."""
    from diffusers.training_utils import compute_snr

    snr = compute_snr(scheduler, t)
    cut = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
    return cut / (snr if scheduler.config.prediction_type == "epsilon" else snr + 1)


@pytest.mark.parametrize("gamma", [0, 5.0], ids=["native", "min-SNR"])
@pytest.mark.parametrize("prediction_type", KINDS)
def test_loss_and_gradients_are_those_of_diffusers(prediction_type, gamma):
    from diffusers import DDPMScheduler
    from graft_pack.trainers.objective.options import Objective

    from tests.support import diffusers_host

    scheduler = DDPMScheduler(prediction_type=prediction_type, **diffusers_host.SCHEDULE)
    objective = Objective(weighting="min-SNR", min_snr_gamma=gamma) if gamma else Objective()
    model = model_of(prediction_type)
    unet = diffusers_host.convert_sd1(model)
    with models.in_training(model, "SD1", spread=0.1, examples=4, batch_size=4, objective=objective) as training:
        shown = [item.show(0) for item in training.plan.train]
        batch = next(step.micro_batches(shown, training.plan.recipe, training.host))
        x0, noise, sigma = batch.x0, batch.noise, batch.sigma
        losses = step.losses_of(training.host, batch)
        losses.mean().backward()
        values = by_adapter_name(training.denoiser, training.plan.trainables)
    t = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()[None] - sigma[:, None]).abs().argmin(1)
    trainables = adapt(unet, training.plan.recipe, values)
    context = torch.cat([one.conditioning.tensors["cross_attn"] for one in shown])
    theirs = reference(unet, scheduler, x0, noise, t, context)
    if gamma:
        theirs = theirs * min_snr(scheduler, t, gamma)
    theirs.mean().backward()
    assert len(set(t.tolist())) == 4
    assert torch.allclose(losses, theirs, rtol=1e-4, atol=0)
    for key, parameter in trainables.items():
        assert models.distance(values[key].grad, parameter.grad) <= 1e-4, key


@pytest.mark.parametrize("family", ["SDXL", "SD3", "Flux"])
def test_other_families_too_have_diffusers_loss_and_the_gradient_of_every_weight(family):
    """diffusers' networks with the same weights, its own scripts' targets; gradients compared in diffusers' layout."""
    from tests.support.published import PUBLISHED, picked

    published = PUBLISHED[family]
    model = models.patcher(published.name)
    network, places = published.network(model)
    whole = {"method": "all weights", "targets": "all weights", "max_grad_norm": 0.0}
    with models.in_training(model, published.name, examples=3, batch_size=3, **whole) as training:
        shown = [item.show(0) for item in training.plan.train]
        conditionings = [one.conditioning for one in shown]
        batch = next(step.micro_batches(shown, training.plan.recipe, training.host))
        x0, noise, sigma = batch.x0, batch.noise, batch.sigma
        losses = step.losses_of(training.host, batch)
        losses.mean().backward()
        gradients = {
            name: value.grad.clone() for name, value in training.plan.trainables.items() if value.grad is not None
        }
    flow = sigma.view(-1, 1, 1, 1)
    noised, target = (x0 + flow * noise, noise) if family == "SDXL" else (flow * noise + (1 - flow) * x0, noise - x0)
    output = published.run(network, noised, sigma, conditionings)
    theirs = torch.nn.functional.mse_loss(output, target, reduction="none").mean((1, 2, 3))
    theirs.mean().backward()
    assert torch.allclose(losses, theirs, rtol=1e-4, atol=0)
    compared = 0
    for name, parameter in network.named_parameters():
        place = places[name]
        if (place if isinstance(place, str) else place[0]) not in gradients or parameter.grad is None:
            continue
        ours = picked(gradients, place)
        assert models.distance(ours, parameter.grad) <= 1e-4 or parameter.grad.norm() <= 1e-6, name
        compared += 1
    assert compared >= 0.9 * len(places)


def test_a_training_takes_the_same_way_on_both_hosts(tmp_path):
    """The whole loop over ComfyUI and over diffusers: the same losses and the same adapter."""
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.methods import METHODS
    from graft_pack.trainers.protocols import Host

    from tests.support import diffusers_host

    model = models.patcher("SD1")
    denoiser = diffusers_host.DiffusersDenoiser(diffusers_host.convert_sd1(model))
    with models.in_training(model, "SD1", spread=0.05, **LARGE) as training:
        values = by_adapter_name(training.denoiser, {k: v.clone() for k, v in training.plan.trainables.items()})
        ours = models.train(training, tmp_path / "ours")
        adapter = training.plan.export(ours.trainables, 0).adapter
    recipe = training.plan.recipe
    with denoiser.training("auto"):
        method = METHODS["LoRA"]
        trainables = method.inject(denoiser.module, method.targets(denoiser.module, family_of("SD1"), recipe), recipe)
        with torch.no_grad():
            for key, parameter in by_adapter_name(denoiser, trainables).items():
                parameter.copy_(values[key])
        export = models.exporter(method, recipe, denoiser.adapter_name)
        plan = Plan(recipe=recipe, train=training.plan.train, trainables=trainables, export=export)
        other = models.Training(denoiser, Host(denoiser, None, None), plan)
        theirs = models.train(other, tmp_path / "theirs")
        other_adapter = plan.export(theirs.trainables, 0).adapter
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert adapter.keys() == other_adapter.keys()
    assert models.distance(models.joined(other_adapter.values()), models.joined(adapter.values())) <= 1e-3


@pytest.fixture(scope="module")
def clip(comfy, tiny_base):
    """Return the tiny base's text encoder as CheckpointLoaderSimple gives it."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(tiny_base), output_vae=False, output_model=False)[1]


LONG = "a " + "very " * 80 + "large red circle on a blue background"


@pytest.mark.parametrize(
    "caption", ["a large red circle on a blue background", "", "\u00dcn\u00efcode, 1girl; solo!", LONG]
)
def test_captions_condition_as_the_hosts_own_node(caption, clip):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    from nodes import CLIPTextEncode

    ours = ComfyText(clip).encode(caption)
    theirs, more = CLIPTextEncode().encode(clip, caption)[0][0]
    assert models.distance(ours["cross_attn"], theirs) <= 1e-5
    assert models.distance(ours["pooled_output"], more["pooled_output"]) <= 1e-5
    assert not any(tensor.is_inference() for tensor in ours.values())


def test_parentheses_in_a_caption_are_letters(clip):
    """The host's node reads escaped ones this way, and unescaped ones as weights."""
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    from nodes import CLIPTextEncode

    ours = ComfyText(clip).encode("hatsune miku (vocaloid)")["cross_attn"]
    escaped = CLIPTextEncode().encode(clip, "hatsune miku \\(vocaloid\\)")[0][0][0]
    weighted = CLIPTextEncode().encode(clip, "hatsune miku (vocaloid)")[0][0][0]
    assert models.distance(ours, escaped) <= 1e-5
    assert models.distance(ours, weighted) > 1e-3


def test_clip_skip_is_part_of_the_text_encoder(clip):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    from nodes import CLIPSetLastLayer, CLIPTextEncode

    skipping = CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    ours = ComfyText(skipping).encode("a red circle")["cross_attn"]
    theirs = CLIPTextEncode().encode(skipping, "a red circle")[0][0][0]
    assert models.distance(ours, theirs) <= 1e-5
    assert models.distance(ours, ComfyText(clip).encode("a red circle")["cross_attn"]) > 1e-4
    assert ComfyText(skipping).fingerprint() != ComfyText(clip).fingerprint()


@pytest.mark.parametrize("caption, count", [("", 0), ("red circle", 2), ("a (b)", 4), (LONG, 88)])
def test_tokens_are_counted_without_frame(caption, count, clip):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    assert ComfyText(clip).count_tokens(caption) == count
