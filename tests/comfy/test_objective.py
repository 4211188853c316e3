"""Tests that the loss is the model's own: each of core's ModelSampling nodes upstream is obeyed or refused."""

import functools
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.objective.noise import spread_sigmas
from graft_pack.trainers.objective.targets import parameterization

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

EDM = {"sigma_max": 120.0, "sigma_min": 0.002}

# Core's node, its inputs, a family that it fits, and the objective that it selects.
NODES = [
    ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": False}, "SD1", "eps"),
    ("ModelSamplingDiscrete", {"sampling": "eps", "zsnr": True}, "SD1", "eps"),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, "SD1", "v"),
    ("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": True}, "SDXL", "v"),
    ("ModelSamplingDiscrete", {"sampling": "x0", "zsnr": False}, "SD1", "x0"),
    ("ModelSamplingDiscrete", {"sampling": "lcm", "zsnr": False}, "SD1", "eps"),
    ("ModelSamplingContinuousEDM", {"sampling": "v_prediction", **EDM}, "SD1", "v"),
    ("ModelSamplingContinuousEDM", {"sampling": "edm", **EDM}, "SD1", "edm"),
    ("ModelSamplingContinuousEDM", {"sampling": "edm_playground_v2.5", **EDM}, "SDXL", "edm"),
    ("ModelSamplingContinuousEDM", {"sampling": "eps", **EDM}, "SD1", "eps"),
    ("ModelSamplingContinuousEDM", {"sampling": "cosmos_rflow", **EDM}, "SD1", "flow"),
    ("ModelSamplingContinuousV", {"sampling": "v_prediction", "sigma_max": 500.0, "sigma_min": 0.03}, "SD1", "v"),
    ("ModelSamplingStableCascade", {"shift": 2.0}, "SD1", "eps"),
    ("ModelSamplingSD3", {"shift": 3.0}, "Flux", "flow"),
    ("ModelSamplingAuraFlow", {"shift": 1.73}, "Flux", "flow"),
    ("ModelSamplingFlux", {"max_shift": 1.15, "base_shift": 0.5, "width": 512, "height": 512}, "Flux", "flow"),
    (None, {}, "SD1", "eps"),
    (None, {}, "SDXL", "eps"),
    (None, {}, "Flux", "flow"),
]


def name_of(case):
    return "-".join(str(part) for part in case[:1] + case[2:3] + tuple(case[1].values()))


@functools.cache
def base_of(name):
    """Return one MODEL per family for all tests here; they patch clones only."""
    return models.patcher(name)


@pytest.fixture(scope="module", autouse=True)
def forget_bases():
    yield
    base_of.cache_clear()


def made_by(case):
    """Return the MODEL of a case of NODES."""
    node, inputs, name, _ = case
    return through(node, inputs, base_of(name))


def through(node, inputs, model):
    """Return a MODEL as core's node passes it on."""
    from comfy_extras import nodes_model_advanced

    if node is None:
        return model
    made = nodes_model_advanced.NODE_CLASS_MAPPINGS[node]()
    return getattr(made, made.FUNCTION)(model, **inputs)[0]


def kind_of(denoiser):
    return parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)


def test_every_such_node_of_core_is_tried_here(comfy):
    from comfy_extras import nodes_model_advanced

    known = {name for name in nodes_model_advanced.NODE_CLASS_MAPPINGS if name.startswith("ModelSampling")}
    assert known == {node for node, *_ in NODES if node}


@pytest.mark.parametrize("case", NODES, ids=name_of)
def test_the_target_is_what_the_host_turns_into_the_latent(case):
    """calculate_denoised of the native target gives back x0, at noise levels from one end to the other."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    name, kind = case[2:]
    denoiser = ComfyDenoiser(made_by(case), None, models.SmallVae())
    assert denoiser.parameterization == kind
    sigma = spread_sigmas(denoiser.sigmas(), 7).double()
    source = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 7, *models.FAMILIES[name].latent, generator=source).double()
    x_t = denoiser.add_noise(x0, noise, sigma)
    target = kind_of(denoiser).target(x0, noise, sigma.view(-1, 1, 1, 1))
    found = denoiser._sampling.calculate_denoised(sigma, target, x_t)
    assert torch.equal(denoiser.denoised(target, x_t, sigma), found)
    for row in range(7):
        assert models.distance(found[row], x0[row]) <= 1e-5


@pytest.mark.parametrize("case", NODES, ids=name_of)
def test_the_prediction_is_the_one_that_the_host_samples_with(case):
    """In training as in sampling, the same scaled input, timestep and conditioning reach the network."""
    model, name = made_by(case), case[2]
    with models.in_training(model, name) as training:
        sigma = float(spread_sigmas(training.denoiser.sigmas(), 5)[2])
        x = torch.randn(1, *models.FAMILIES[name].latent, generator=torch.Generator().manual_seed(3)) * (1 + sigma)
        one = models.conditioning(name, 5)
        ours = models.trained_denoised(training, x, sigma, one)
    assert models.distance(ours, models.denoised(model, x, sigma, one)) <= 1e-5


@pytest.mark.parametrize("case", NODES, ids=name_of)
def test_the_loss_is_measured_against_that_target(case):
    """The loop's loss, rebuilt from the parts that the tests above compare with the host."""
    from graft_pack.trainers.steps import step

    with models.in_training(made_by(case), case[2], spread=0.05) as training:
        plan, denoiser = training.plan, training.denoiser
        shown = [item.show(0) for item in plan.train]
        batch = next(step.micro_batches(shown, plan.recipe, training.host))
        x0, noise, sigma = batch.x0, batch.noise, batch.sigma
        with torch.no_grad():
            raw = denoiser.predict(denoiser.add_noise(x0, noise, sigma), sigma, [one.conditioning for one in shown])
        target = kind_of(denoiser).target(x0, noise, sigma.view(-1, 1, 1, 1))
        losses = step.losses_of(training.host, batch)
        assert torch.allclose(losses, ((raw - target) ** 2).mean((1, 2, 3)), rtol=1e-5)
        losses.sum().backward()
        gradients = models.joined(p.grad for p in plan.trainables.values())
    assert torch.isfinite(gradients).all()
    assert gradients.norm() > 0


@pytest.mark.parametrize("case", NODES, ids=name_of)
def test_other_objectives_follow_the_model_too(case):
    """Levels are the model's own, weightings without a meaning are refused, and losses equal the formulas."""
    from graft_pack.trainers.errors import SettingsError
    from graft_pack.trainers.objective.options import Objective
    from graft_pack.trainers.objective.timesteps import level_times
    from graft_pack.trainers.steps import step

    kind = case[3]
    snr = Objective(timesteps="shifted", timestep_shift=2.0, weighting="min-SNR", input_perturbation=0.1)
    flow = Objective(timesteps="resolution-shifted", weighting="cosmap", input_perturbation=0.1)
    objective, other = (flow, snr) if kind == "flow" else (snr, flow)
    objective.check(kind)
    with pytest.raises(SettingsError, match=f"this one predicts {kind}"):
        other.check(kind)
    with models.in_training(made_by(case), case[2], spread=0.05, objective=objective) as training:
        denoiser = training.denoiser
        shown = [item.show(0) for item in training.plan.train]
        batch = next(step.micro_batches(shown, training.plan.recipe, training.host))
        x0, noise, sigma, asked = batch.x0, batch.noise, batch.sigma, batch.custom
        losses = step.losses_of(training.host, batch).detach()
        with torch.no_grad():
            x_t = denoiser.add_noise(x0, asked.added, sigma)
            raw = denoiser.predict(x_t, sigma, [one.conditioning for one in shown])
    levels = denoiser.sigmas()
    place = torch.searchsorted(levels, sigma)
    assert torch.equal(levels[place], sigma)
    assert torch.equal(level_times(levels, kind)[place], asked.t)
    ratio = (denoiser.sigma_data / sigma) ** 2
    cut = ratio.clamp(max=5.0)
    weights = {"eps": cut / ratio, "x0": cut, "flow": 2 / (torch.pi * (1 - 2 * asked.t + 2 * asked.t**2))}
    weight = weights.get(kind, cut / (ratio + 1))
    target = kind_of(denoiser).target(x0, noise, sigma.view(-1, 1, 1, 1))
    assert torch.allclose(losses, weight * ((raw - target) ** 2).mean((1, 2, 3)), rtol=1e-4)


EMPTY = torch.tensor([])
# A class, the keys that mark its checkpoints beside their weights, its prediction type, and its highest noise.
KEYS = [
    ("SDXL", {}, "eps", 14.6),
    ("SDXL", {"v_pred": EMPTY}, "v", 14.6),
    ("SDXL", {"v_pred": EMPTY, "ztsnr": EMPTY}, "v", 4519.0),
    ("SDXL", {"edm_vpred.sigma_max": torch.tensor(120.0)}, "v", 120.0),
    ("SDXL", {"edm_mean": EMPTY, "edm_std": EMPTY}, "edm", 80.0),
    ("SD20", {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([0.1, -0.1])}, "v", 14.6),
    ("SD20", {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([0.01, -0.01])}, "eps", 14.6),
]


@pytest.mark.parametrize(
    "name, keys, kind, most", KEYS, ids=lambda part: "+".join(part) if type(part) is dict else None
)
def test_the_objective_is_known_by_the_checkpoints_keys(name, keys, kind, most):
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    denoiser = ComfyDenoiser(models.patcher(name, keys=keys), None, models.SmallVae())
    assert denoiser.parameterization == kind
    assert float(denoiser.sigmas().max()) == pytest.approx(most, rel=1e-2)
    assert denoiser.family == ("SDXL" if name == "SDXL" else "SD2 v" if kind == "v" else "SD2")


@pytest.mark.parametrize("assumed", ["v", "eps"])
def test_training_on_zero_terminal_snr_follows_v_and_not_eps(assumed, tmp_path):
    """Training lowers the model's own loss with the target that the keys name; with noise as target the loss stays."""
    model = models.patcher("SDXL", keys={"v_pred": EMPTY, "ztsnr": EMPTY})
    fields = {"steps": 40, "learning_rate": 1e-2, "batch_size": 2, "ema_decay": 0.0}
    with models.in_training(model, "SDXL", method="all weights", targets="all weights", **fields) as training:
        # Bright pictures: the velocity contains all of them, the noise nothing.
        items = [replace(one, show=functools.partial(brightened, one)) for one in training.plan.train]
        training = replace(training, plan=replace(training.plan, train=items))
        before = noisiest(items, training)
        training.denoiser.parameterization = assumed
        models.train(training, tmp_path)
        training.denoiser.parameterization = "v"
        after = noisiest(items, training)
    assert after < 0.5 * before if assumed == "v" else after > 0.9 * before, (float(before), float(after))


def noisiest(items, training):
    """Return the model's own loss on items at its highest noise level, at fixed noise."""
    from graft_pack.trainers.steps import step

    return step.fixed_losses(items, training.plan.recipe, training.host)[:, -1].mean()


def brightened(item, turn):
    shown = item.show(turn)
    return replace(shown, latent=0.2 * shown.latent + 2.0)


def test_img_to_img_is_refused():
    """Such a network takes the other picture itself as input; adding noise would train another task."""
    model = through("ModelSamplingDiscrete", {"sampling": "img_to_img", "zsnr": False}, base_of("SD1"))
    with models.in_training(model, "SD1") as training:
        with pytest.raises(ModelError, match="IMG_TO_IMG.*no known training objective"):
            training.losses()


@pytest.mark.parametrize("method", ["calculate_denoised", "calculate_input", "noise_scaling"])
def test_an_unknown_class_is_refused(method):
    """A class that changes any of the three has another objective, and training it would be a guess."""
    import comfy.model_sampling

    class Unheard(comfy.model_sampling.EPS):
        pass

    setattr(Unheard, method, lambda self, *args, **more: getattr(comfy.model_sampling.EPS, method)(self, *args, **more))

    class Sampling(comfy.model_sampling.ModelSamplingDiscrete, Unheard):
        pass

    model = base_of("SD1").clone()
    model.add_object_patch("model_sampling", Sampling(model.model.model_config))
    with models.in_training(model, "SD1") as training:
        with pytest.raises(ModelError, match="Unheard.*no known training objective"):
            training.losses()


def test_a_latent_format_from_upstream_scales_the_latents():
    """Playground's node brings one: mean and deviation per channel."""
    import comfy.latent_formats

    node, inputs = "ModelSamplingContinuousEDM", {"sampling": "edm_playground_v2.5", **EDM}
    latent = torch.randn(1, 4, 8, 8)
    with models.in_training(through(node, inputs, base_of("SDXL")), "SDXL") as training:
        scaled = training.denoiser.scale_latents(latent)
    assert torch.equal(scaled, comfy.latent_formats.SDXL_Playground_2_5().process_in(latent))


@pytest.mark.parametrize("name", models.FAMILIES)
def test_latents_are_scaled_once_by_the_model(name):
    model = base_of(name)
    latent = torch.randn(1, *models.FAMILIES[name].latent)
    with models.in_training(model, name) as training:
        scaled = training.denoiser.scale_latents(latent)
    latent_format = model.model.latent_format
    shift = getattr(latent_format, "shift_factor", None) or 0.0
    assert torch.allclose(scaled, (latent - shift) * latent_format.scale_factor)


def random_lora(model, seed=7):
    """Return a LoRA file's tensors on every attention layer of a MODEL."""
    with models.in_training(model, "SD1", spread=0.2, seed=seed) as training:
        return training.plan.export(training.plan.trainables, 0).adapter


def with_lora(model, lora, strength):
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def test_a_lora_from_upstream_is_part_of_the_base():
    base = base_of("SD1")
    patched = with_lora(base, random_lora(base), 0.7)
    x = torch.randn(1, *models.FAMILIES["SD1"].latent)
    one = models.conditioning("SD1", 5)
    with models.in_training(patched, "SD1") as training:
        ours = models.trained_denoised(training, x, 2.0, one)
    assert models.distance(ours, models.denoised(patched, x, 2.0, one)) <= 1e-6
    assert models.distance(ours, models.denoised(base, x, 2.0, one)) >= 1e-2


def test_the_fingerprint_tells_bases_apart():
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    base = base_of("SD1")
    lora = random_lora(base)
    other = random_lora(base, seed=8)
    v_prediction = {"sampling": "v_prediction", "zsnr": False}
    bases = {
        "plain": base,
        "other weights": models.patcher("SD1", seed=1),
        "patched": with_lora(base, lora, 0.7),
        "stronger": with_lora(base, lora, 0.71),
        "other patch": with_lora(base, other, 0.7),
        "patched twice": with_lora(with_lora(base, lora, 0.35), lora, 0.35),
        "v": through("ModelSamplingDiscrete", v_prediction, base),
        "v, zero terminal": through("ModelSamplingDiscrete", {**v_prediction, "zsnr": True}, base),
    }
    digests = {patcher_digest(model) for model in bases.values()}
    assert len(digests) == len(bases)


def test_the_fingerprint_does_not_depend_on_what_is_loaded():
    """For the same MODEL, before the host loads it and while its patches are in the weights."""
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    base = base_of("SD1")
    patched = with_lora(base, random_lora(base), 0.7)
    before = patcher_digest(base), patcher_digest(patched)
    one = models.conditioning("SD1")
    x = torch.randn(1, *models.FAMILIES["SD1"].latent)
    models.denoised(patched, x, 1.0, one)
    loaded = patcher_digest(base), patcher_digest(patched)
    models.denoised(base, x, 1.0, one)
    after = patcher_digest(base), patcher_digest(patched)
    assert before == loaded == after


def test_the_fingerprint_sees_through_a_clone_that_is_loaded():
    """A sampling node replaces an object on the model that all clones share while its clone is loaded."""
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    base = base_of("SD1")
    v = through("ModelSamplingDiscrete", {"sampling": "v_prediction", "zsnr": False}, base)
    before = patcher_digest(base), patcher_digest(v)
    models.denoised(v, torch.randn(1, *models.FAMILIES["SD1"].latent), 1.0, models.conditioning("SD1"))
    assert (patcher_digest(base), patcher_digest(v)) == before
    assert before[0] != before[1]


def scaling(factor):
    """Return a patch as nodes make them: a function that keeps its widgets' values."""
    return lambda h, options: h * factor


@pytest.mark.parametrize("where", ["transformer patch", "wrapper", "weight wrapper"])
def test_the_fingerprint_tells_what_a_patch_was_made_with(where):
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    digests = []
    for factor in (1.1, 1.5, 1.1):
        clone = base_of("SD1").clone()
        if where == "transformer patch":
            clone.set_model_input_block_patch(scaling(factor))
        elif where == "wrapper":
            clone.add_wrapper("diffusion_model", scaling(factor))
        else:
            clone.add_weight_wrapper("diffusion_model.out.2.weight", scaling(factor))
        digests.append(patcher_digest(clone))
    assert digests[0] == digests[2] != digests[1]
