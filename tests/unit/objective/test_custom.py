"""Tests of the loop with a custom objective: its draws and losses, compared with formulas written out here."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine import gradient_check
from graft_pack.trainers.engine.validation import check_recipe
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.objective.custom import CustomDraw, draw_custom
from graft_pack.trainers.objective.noise import draw_noise, draw_sigmas
from graft_pack.trainers.objective.options import NATIVE, Objective
from graft_pack.trainers.rng import generator
from graft_pack.trainers.steps import step

from tests.support import models
from tests.support.diffusers_host import (
    DiffusersDenoiser,
    gradient_of,
    make_host,
    make_item,
    make_unet,
    run_session,
    same_state,
    state_of,
)
from tests.support.diffusers_host import planned as plan_of
from tests.unit.test_loop import first_turns, planned

# One option of each kind that can be combined.
ALL = Objective(
    timesteps="logit-normal",
    min_timestep=50,
    max_timestep=950,
    weighting="min-SNR",
    loss="Huber",
    noise_offset=0.1,
    input_perturbation=0.1,
)
OTHERS = [
    Objective(timesteps="resolution-shifted", weighting="debiased", loss="L1", pyramid_discount=0.4),
    Objective(weighting="min-SNR", min_snr_gamma=1.0),
    Objective(loss="Huber", huber_schedule="exponential"),
    Objective(loss="Huber", huber_c=0.02, huber_schedule="constant", input_perturbation=0.2),
    Objective(
        timesteps="mode",
        stratified="on",
        weighting="P2",
        loss="smooth L1",
        noise_offset=0.1,
        noise_offset_random_strength="on",
        adaptive_noise_scale=0.5,
    ),
    Objective(timesteps="beta", weighting="soft min-SNR", loss="log-cosh"),
    Objective(timesteps="content", weighting="EDM", loss="MSE + L1", l1_fraction=0.3),
    # The latents of these tests are too small for a second scale.
    Objective(loss="multi-scale"),
]


def on(parameterization):
    """Return a Host whose network predicts that parameterization."""
    kind = {"eps": "epsilon", "v": "v_prediction"}[parameterization]
    return replace(make_host(), denoiser=DiffusersDenoiser(make_unet(), kind))


def micro_batches(plan, host):
    shown = [item.show(0) for item in plan.train]
    return shown, next(step.micro_batches(shown, plan.recipe, host))


def test_natively_nothing_else_is_drawn(monkeypatch):
    monkeypatch.setattr(step, "draw_custom", None)
    with planned(objective=Objective()) as (plan, host):
        shown, batch = micro_batches(plan, host)
        assert batch.custom is None
        source = generator("step", plan.recipe.seed, 0, 0)
        assert torch.equal(batch.sigma, draw_sigmas(host.denoiser.sigmas(), len(shown), source))
        assert torch.equal(batch.noise, draw_noise(tuple(batch.x0.shape), source))


def test_a_native_objective_by_the_other_way_gives_the_same_bits():
    """Draws and losses agree: the custom path starts from the native loss and is no separate one."""
    with planned() as (plan, host):
        _, batch = micro_batches(plan, host)
        source = generator("step", plan.recipe.seed, 0, 0)
        sigma, noise, custom = draw_custom(NATIVE, host.denoiser, tuple(batch.x0.shape), source)
        assert torch.equal(sigma, batch.sigma)
        assert torch.equal(noise, batch.noise)
        assert torch.equal(step.losses_of(host, replace(batch, custom=custom)), step.losses_of(host, batch))


def written_out(objective, kind, error, sigma, t):
    """Return the loss of each sample from its error, written as formulas."""
    snr = 1 / sigma**2
    rows = error.flatten(1)
    if objective.loss in ("MSE", "multi-scale"):
        losses = (rows**2).mean(1)
    elif objective.loss == "L1":
        losses = rows.abs().mean(1)
    elif objective.loss == "log-cosh":
        losses = rows.double().cosh().log().mean(1).float()
    elif objective.loss == "MSE + L1":
        losses = (0.7 * rows**2 + 0.3 * rows.abs()).mean(1)
    else:
        widths = {
            "auto": (1 - objective.huber_c) / (1 + sigma) ** 2 + objective.huber_c,
            "exponential": objective.huber_c**t,
            "constant": torch.full_like(t, objective.huber_c),
        }
        c = widths[objective.huber_schedule][:, None]
        slope = 2 if objective.loss == "smooth L1" else 2 * c
        losses = (slope * ((rows.double() ** 2 + c**2).sqrt() - c)).mean(1).float()
    weight = torch.ones_like(sigma)
    if objective.weighting == "min-SNR":
        weight = snr.clamp(max=objective.min_snr_gamma) / (snr if kind == "eps" else snr + 1)
    if objective.weighting == "debiased":
        capped = snr.clamp(max=1000)
        weight = capped.sqrt() / (capped if kind == "eps" else capped + 1)
    if objective.weighting in ("soft min-SNR", "P2", "EDM"):
        latent = {"soft min-SNR": 5 * snr / (snr + 5), "P2": snr / (1 + snr), "EDM": 1 + snr}
        weight = latent[objective.weighting] / (snr if kind == "eps" else snr + 1)
    return losses * weight


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("objective", [ALL, *OTHERS], ids=range(9))
def test_losses_are_the_formulas(objective, kind):
    """On noise and velocity models, the network's input has the added noise and the target the plain noise."""
    host = on(kind)
    with planned(objective=objective) as (plan, _), host.denoiser.training("auto"):
        shown, batch = micro_batches(plan, host)
        x0, noise, sigma, asked = batch.x0, batch.noise, batch.sigma, batch.custom
        losses = step.losses_of(host, batch)
        wide = sigma.view(-1, 1, 1, 1)
        with torch.no_grad():
            raw = host.denoiser.predict(x0 + wide * asked.added, sigma, [one.conditioning for one in shown])
    norm = (wide**2 + 1).sqrt()
    target = noise if kind == "eps" else (noise - wide * x0) / norm
    place = (host.denoiser.sigmas()[None] - sigma[:, None]).abs().argmin(1)
    assert torch.allclose(losses, written_out(objective, kind, raw - target, sigma, place / 1000), rtol=1e-4)


def test_the_input_is_perturbed_by_so_much_and_the_target_is_not():
    gamma = 0.3
    shape = (200, 4, 8, 8)
    _, noise, asked = draw_custom(Objective(input_perturbation=gamma), make_host().denoiser, shape, generator("i"))
    extra = asked.added - noise
    assert float(extra.std()) == pytest.approx(gamma, rel=0.02)
    assert abs(float((extra * noise).mean())) <= 0.01
    assert torch.equal(noise, draw_custom(Objective(loss="L1"), make_host().denoiser, shape, generator("i"))[1])


def test_an_offset_and_a_pyramid_are_part_of_the_target():
    for objective in (Objective(noise_offset=0.1), Objective(pyramid_discount=0.3)):
        _, noise, asked = draw_custom(objective, make_host().denoiser, (2, 4, 8, 8), generator("i"))
        assert torch.equal(asked.added, noise)
        assert not torch.equal(noise, draw_custom(NATIVE, make_host().denoiser, (2, 4, 8, 8), generator("i"))[1])


def offset_of_sd_scripts(latents, noise, noise_offset, adaptive_noise_scale, source):
    """Return noise with an adaptive offset as kohya's sd-scripts add it, from the same random numbers."""
    latent_mean = torch.abs(latents.mean(dim=(2, 3), keepdim=True))
    strength = torch.clamp(noise_offset + adaptive_noise_scale * latent_mean, 0.0, None)
    return noise + strength * torch.randn((*latents.shape[:2], 1, 1), generator=source)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_an_adaptive_offset_is_the_one_of_sd_scripts(scale):
    objective = Objective(noise_offset=0.1, adaptive_noise_scale=scale)
    latents = torch.randn(6, 4, 8, 8, generator=generator("x")) + torch.linspace(-1, 1, 6).view(6, 1, 1, 1)
    source = generator("i")
    _, noise, _ = draw_custom(objective, make_host().denoiser, (6, 4, 8, 8), source, latents)
    source = generator("i")
    draw_sigmas(make_host().denoiser.sigmas(), 6, source)
    plain = draw_noise((6, 4, 8, 8), source)
    assert torch.allclose(noise, offset_of_sd_scripts(latents, plain, 0.1, scale, source), atol=1e-6)
    # A process that computes some of the rows draws the same for them.
    part = draw_custom(objective, make_host().denoiser, (6, 4, 8, 8), generator("i"), latents[2:4], 2)[1]
    assert torch.equal(part[2:4], noise[2:4])


def test_a_random_strength_is_uniform_up_to_the_offset():
    shape = (4000, 4, 2, 2)
    objective = Objective(noise_offset=1.0, noise_offset_random_strength="on")
    _, noise, _ = draw_custom(objective, make_host().denoiser, shape, generator("i"))
    source = generator("i")
    draw_sigmas(make_host().denoiser.sigmas(), 4000, source)
    offset = (noise - draw_noise(shape, source)).mean((2, 3))
    # E[s^2] of a strength s that is uniform in 0..1 is 1/3; within a sample all channels have one strength.
    assert float((offset**2).mean()) == pytest.approx(1 / 3, rel=0.05)
    squares = offset**2
    assert float((squares[:, 0] * squares[:, 1]).mean()) == pytest.approx(1 / 5, rel=0.15)


@pytest.mark.parametrize("objective", [ALL, *OTHERS], ids=range(9))
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_neither_loss_nor_gradient(micro_batch, objective):
    found = []
    for size in (0, micro_batch):
        with planned(micro_batch=size, objective=objective) as (plan, host):
            found.append(gradient_of(plan, host, [(0, first_turns(0, 1, 2, 3))]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert models.distance(found[1][1], found[0][1]) <= 1e-5


def test_each_example_keeps_its_own_draws():
    """However a batch is split, each row keeps its values: the added noise is the target's, t is the level's."""
    with planned(micro_batch=2, objective=Objective(noise_offset=0.1)) as (plan, host):
        shown = [item.show(0) for item in plan.train]
        levels = host.denoiser.sigmas()
        for batch in step.micro_batches(shown, plan.recipe, host):
            assert torch.equal(batch.custom.added, batch.noise)
            assert torch.equal(batch.custom.t, torch.searchsorted(levels, batch.sigma) / 1000)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("objective", [ALL, *OTHERS], ids=range(9))
def test_gradients_of_losses_are_finite_differences(objective, kind):
    """Runs torch's gradcheck in fp64, on predictions near the target and far from it, with a mask."""
    denoiser = on(kind).denoiser
    source = torch.Generator().manual_seed(0)
    error = torch.randn(3, 2, 3, 3, generator=source, dtype=torch.float64)
    error = error * torch.tensor([0.05, 1.0, 20.0], dtype=torch.float64).view(3, 1, 1, 1)
    target = torch.randn(3, 2, 3, 3, generator=source, dtype=torch.float64)
    mask = torch.rand(3, 1, 3, 3, generator=source, dtype=torch.float64)
    asked = CustomDraw(objective, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), target)
    sigma = torch.tensor([0.1, 1.0, 8.0], dtype=torch.float64)
    prediction = (target + error).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda one: asked.losses(denoiser, one, target, sigma, mask), prediction)


@pytest.mark.parametrize("objective", [ALL, *OTHERS], ids=range(9))
def test_the_whole_gradient_is_a_finite_difference(objective):
    """Runs the gradient check that precedes step 1, through the network to the adapter."""
    with planned(objective=objective) as (plan, host):
        gradient_check.check_gradient(lambda: step.batch_loss(plan, host), plan.trainables, gradient_check.TOLERANCE)


def test_validation_is_native_whatever_was_asked():
    with planned() as (plan, host):
        items = plan.train[:2]
        native = step.fixed_losses(items, plan.recipe, host)
        assert torch.equal(step.fixed_losses(items, replace(plan.recipe, objective=ALL), host), native)


@pytest.mark.parametrize("objective", [ALL, OTHERS[0], OTHERS[4]], ids=["all", "others", "stratified"])
def test_a_training_with_an_objective_resumes_to_the_bit(objective, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(event, payload):
        if event == "step" and payload["step"] == 3:
            raise Stopped

    straight = run_session(tmp_path / "straight", objective=objective)
    with pytest.raises(Stopped):
        run_session(tmp_path / "cut", stop, objective=objective)
    resumed = run_session(tmp_path / "cut", objective=objective)
    assert resumed.resumed_from == 3
    assert same_state(state_of(resumed), state_of(straight))
    native = run_session(tmp_path / "straight")
    assert native.run.folder != straight.run.folder
    assert native.losses != straight.losses


def test_what_makes_no_sense_for_the_model_is_refused_before_anything_is_encoded(tmp_path):
    host = make_host()
    host.denoiser.parameterization = "flow"
    with pytest.raises(SettingsError, match="'min-SNR' is made for noise and velocity models"):
        run_session(tmp_path, host=host, objective=Objective(weighting="min-SNR"))
    assert host.codec.calls == 0
    assert not (tmp_path / "runs").exists()


def test_the_file_tells_it_in_kohyas_words(tmp_path):
    result = run_session(tmp_path, steps=1, objective=ALL)
    metadata = result.adapter.metadata
    expected = {"loss_type": "huber", "huber_c": "0.1", "min_snr_gamma": "5.0", "noise_offset": "0.1"}
    assert {name: metadata[f"ss_{name}"] for name in expected} == expected
    assert metadata["ss_ip_noise_gamma"] == "0.1"
    assert "ss_multires_noise_discount" not in metadata
    native = run_session(tmp_path, steps=1).adapter.metadata
    assert native["ss_loss_type"] == "l2"
    assert not {"ss_huber_c", "ss_min_snr_gamma", "ss_noise_offset"} & set(native)


# ---- the frozen base's prediction outside masks --------------------------------------------------

KEPT = Objective(masked_prior_weight=0.7, loss="L1", weighting="min-SNR")


def corner():
    mask = torch.full((1, 1, 8, 8), 0.25)
    mask[..., :2, :3] = 1.0
    return mask


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_outside_a_mask_the_bases_prediction_is_the_target(micro_batch):
    """OneTrainer's masked prior preservation with normalized areas; without a mask all counts as inside."""
    fresh = make_host()
    with plan_of([make_item(0), make_item(1, corner())], 0.5, objective=KEPT, micro_batch=micro_batch) as (plan, host):
        parts = step.micro_batches([item.show(0) for item in plan.train], plan.recipe, host)
        losses = torch.cat([term for part in parts for term in step.loss_terms(plan, host, part)])
        shown, batch = micro_batches(replace(plan, recipe=replace(plan.recipe, micro_batch=0)), host)
        x_t = batch.x0 + batch.sigma.view(-1, 1, 1, 1) * batch.noise
        said = [one.conditioning for one in shown]
        with torch.no_grad():
            output = host.denoiser.predict(x_t, batch.sigma, said)
            with fresh.denoiser.training("auto"):
                base = fresh.denoiser.predict(x_t, batch.sigma, said)
    weight = (1 / batch.sigma**2).clamp(max=5) * batch.sigma**2
    inside, outside = (output - batch.noise).abs(), (output - base).abs()
    mask = corner().expand(1, 4, 8, 8)[0]
    expected = (inside[1] * mask).sum() / mask.sum() + 0.7 * (outside[1] * (1 - mask)).sum() / (1 - mask).sum()
    assert torch.allclose(losses[0], weight[0] * inside[0].mean(), rtol=1e-4)
    assert torch.allclose(losses[1], weight[1] * expected, rtol=1e-4)
    assert float((outside[1] * (1 - mask)).sum()) > 0


def test_the_gradient_of_a_kept_outside_is_exact():
    with plan_of([make_item(0), make_item(1, corner())], objective=KEPT, batch_size=2) as (plan, host):
        gradient_check.check_gradient(lambda: step.batch_loss(plan, host), plan.trainables, gradient_check.TOLERANCE)


WORD = {"embedding_name": "w", "embedding_init": "dog", "embedding_vectors": 2, "embedding_learning_rate": 1e-3}


def test_keeping_the_outside_without_masks_or_a_model_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no picture of the dataset has a mask"):
        run_session(tmp_path, objective=KEPT)
    recipe = models.recipe("SD1", objective=KEPT, method="embedding", targets="attention", rank=0, alpha=0.0, **WORD)
    with pytest.raises(SettingsError, match="masked_prior_weight is set, but training an embedding") as caught:
        check_recipe(recipe)
    assert caught.value.input == "masked_prior_weight"


def test_stratified_timesteps_of_one_picture_are_refused():
    with pytest.raises(SettingsError, match="stratified is on, but batch_size is 1") as caught:
        check_recipe(models.recipe("SD1", objective=Objective(stratified="on"), batch_size=1))
    assert caught.value.input == "stratified"
