"""Tests of timestep sampling: against diffusers, closed forms, and statistics of fixed seeds."""

import math

import pytest
import torch
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.objective.noise import draw_sigmas
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.objective.timesteps import TIMESTEPS, draw_levels, level_times, shift
from graft_pack.trainers.rng import generator

COUNT = 40_000
SHAPE = (COUNT, 4, 64, 64)


def eps_levels():
    """Return noise levels of the SD1 kind, [1000], rising."""
    from diffusers import DDPMScheduler

    bar = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    return ((1 - bar) / bar).sqrt()


def flow_levels(factor=3.0, count=1000):
    """Return the levels of a flow model with its own shift, rising to 1."""
    return shift(torch.arange(1, count + 1) / count, factor)


def drawn(levels, kind, shape=SHAPE, seed="a", **fields):
    return draw_levels(Objective(**fields), levels, kind, shape, generator(seed))


def statistic(values, expected):
    """Return the Kolmogorov-Smirnov distance of values [N] in 0..1 from a distribution function."""
    values = values.double().sort()[0]
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    return float((steps - expected(values)).abs().max())


def logit_normal(t, mean=0.0, std=1.0):
    logit = torch.log(t) - torch.log1p(-t)
    return torch.distributions.Normal(mean, std).cdf(logit)


# The distance that one in ten thousand draws of this size exceeds, plus a level's width.
NEAR = 2.2 / math.sqrt(COUNT) + 1e-3


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_uniform_draws_what_is_drawn_natively(kind):
    levels = eps_levels() if kind == "eps" else flow_levels()
    sigma, _ = drawn(levels, kind, shape=(50, 4, 8, 8))
    assert torch.equal(sigma, draw_sigmas(levels, 50, generator("a")))


@pytest.mark.parametrize("name", TIMESTEPS)
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_every_draw_is_one_of_the_models_levels_with_its_t(kind, name):
    levels = eps_levels() if kind == "eps" else flow_levels()
    sigma, t = drawn(levels, kind, shape=(500, 4, 8, 8), timesteps=name)
    place = torch.searchsorted(levels, sigma)
    assert torch.equal(levels[place], sigma)
    assert torch.equal(level_times(levels, kind)[place], t)
    again, _ = drawn(levels, kind, shape=(500, 4, 8, 8), timesteps=name)
    assert torch.equal(again, sigma)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.5), (1.0, 2.0)])
def test_logit_normal_numbers_are_those_of_diffusers(mean, std):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling("logit_normal", 64, mean, std, generator=generator("b"))
    ours = TIMESTEPS["logit-normal"].places(64, generator("b"), Objective(timestep_mean=mean, timestep_std=std), 0)
    assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.8, 0.5), (1.0, 2.0)])
def test_logit_normal_is_spread_so_over_the_levels(mean, std):
    sigma, t = drawn(eps_levels(), "eps", timesteps="logit-normal", timestep_mean=mean, timestep_std=std)
    assert statistic(t + 5e-4, lambda t: logit_normal(t, mean, std)) <= NEAR
    # A mean above 0 gives more noise, as in the paper.
    assert (float(t.mean()) > 0.5) == (mean > 0) or mean == 0
    assert torch.equal(sigma.argsort(stable=True), t.argsort(stable=True))


def test_sigmoid_is_logit_normal_under_another_name():
    levels = eps_levels()
    assert torch.equal(drawn(levels, "eps", timesteps="sigmoid")[0], drawn(levels, "eps", timesteps="logit-normal")[0])


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_shift_multiplies_the_odds_of_noise(kind, factor):
    """log(t / (1 - t)) is normal, moved by the factor's logarithm; on a flow model this replaces the model's shift."""
    levels = eps_levels() if kind == "eps" else flow_levels(3.0, 10_000)
    _, t = drawn(levels, kind, timesteps="shifted", timestep_shift=factor)
    assert statistic(t.clamp(1e-6, 1 - 1e-6), lambda t: logit_normal(t, math.log(factor))) <= NEAR + 1e-3


def test_the_shift_is_the_one_of_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    t = torch.arange(1, 1001) / 1000
    assert torch.allclose(shift(t, 2.5).flip(0), scheduler.sigmas[:1000].to(t), atol=1e-6)


@pytest.mark.parametrize("side", [32, 64, 128, 192])
def test_the_resolutions_shift_is_the_one_of_flux(side):
    """diffusers' own line and time shift, for latents of that side."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    tokens = side * side // 4
    mu = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    t = torch.linspace(0.01, 0.99, 50).double()
    factor = TIMESTEPS["resolution-shifted"].factor(Objective(), tokens)
    assert torch.allclose(shift(t, factor), scheduler.time_shift(mu, 1.0, t), rtol=1e-6)


def test_each_batch_is_shifted_by_its_own_size():
    levels = flow_levels(1.0, 10_000)
    means = {}
    for shape in ((COUNT, 16, 64, 64), (COUNT, 16, 128, 128), (COUNT, 16, 64, 256), (COUNT, 16, 1, 128, 128)):
        means[shape[2:]] = float(drawn(levels, "flow", shape, timesteps="resolution-shifted")[1].mean())
    assert means[128, 128] > means[64, 64] + 0.05
    assert means[64, 256] == means[128, 128] == means[1, 128, 128]


def test_a_token_is_two_by_two_of_the_latents_positions():
    """As Flux has it: 64 x 64 positions are 1024 tokens, and diffusers' line gives a shift of exp(0.63)."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift(1024, 256, 4096, 0.5, 1.15)
    _, t = drawn(flow_levels(1.0, 10_000), "flow", timesteps="resolution-shifted")
    assert statistic(t.clamp(1e-6, 1 - 1e-6), lambda t: logit_normal(t, mu)) <= NEAR


@pytest.mark.parametrize("name", ["logit-normal", "shifted"])
def test_within_bounds_the_form_is_kept(name):
    """The distribution is squeezed into the bounds, not clipped and piled up at their ends."""
    _, t = drawn(eps_levels(), "eps", timesteps=name, min_timestep=200, max_timestep=700)
    mean = math.log(3.0) if name == "shifted" else 0.0
    inside = ((t - 0.2) / 0.5).clamp(1e-6, 1 - 1e-6)
    assert statistic(inside, lambda t: logit_normal(t, mean)) <= NEAR + 2e-3


@pytest.mark.parametrize("name", TIMESTEPS)
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_bounds_hold_and_their_whole_width_is_used(kind, name):
    levels = eps_levels() if kind == "eps" else flow_levels()
    _, t = drawn(levels, kind, timesteps=name, min_timestep=200, max_timestep=700, timestep_std=1.5)
    assert 0.2 <= float(t.min()) <= 0.21
    assert 0.69 <= float(t.max()) <= 0.7
    if (kind, name) == ("eps", "uniform"):
        counts = torch.bincount((t * 1000).round().long(), minlength=1000)[200:701]
        assert counts.min() > 0
        assert float(t.mean()) == pytest.approx(0.45, abs=0.003)


def test_bounds_on_a_flow_model_are_shares_of_noise():
    levels = flow_levels()
    sigma, t = drawn(levels, "flow", min_timestep=500)
    assert torch.equal(sigma, t)
    assert 0.5 <= float(sigma.min()) <= 0.502
    assert float(sigma.max()) == 1.0


def test_cosmos_levels_become_shares_of_noise():
    times = level_times(torch.tensor([0.01, 1.0, 80.0]), "flow")
    assert torch.allclose(times, torch.tensor([0.01 / 1.01, 0.5, 80 / 81]))


def test_bounds_without_a_level_between_are_refused():
    with pytest.raises(SettingsError, match="min_timestep 1 and max_timestep 2") as caught:
        drawn(torch.tensor([0.1, 0.5, 1.0]), "flow", min_timestep=1, max_timestep=2)
    assert caught.value.input == "max_timestep"


def by_integration(density, count=200_000):
    """Return the distribution function of a density on 0..1, by the midpoint rule in float64."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    total = density(middles).cumsum(0)
    return lambda t: (total / total[-1])[(t * count).long().clamp(max=count - 1)]


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29, 1.75])
def test_mode_is_the_one_of_diffusers(scale):
    """The same numbers mirrored, because we map small random numbers to little noise; the distribution is even."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    theirs = compute_density_for_timestep_sampling("mode", COUNT, mode_scale=scale, generator=generator("b"))
    objective = Objective(timesteps="mode", timestep_mode_scale=scale)
    ours = TIMESTEPS["mode"].places(COUNT, generator("b"), objective, 0)
    assert torch.allclose(ours, 1 - theirs, atol=1e-6)
    assert statistic(ours, lambda t: torch.searchsorted(theirs.double().sort()[0], t) / COUNT) <= NEAR
    # The middle half has more than half of the draws if the scale is positive.
    assert (float(((ours - 0.5).abs() < 0.25).float().mean()) > 0.5) == (scale > 0)


def test_cosmap_has_the_density_of_the_paper():
    """The density is diffusers' weighting of the same name."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    _, t = drawn(flow_levels(1.0, 10_000), "flow", timesteps="cosmap")
    expected = by_integration(lambda t: compute_loss_weighting_for_sd3("cosmap", t))
    assert statistic(t, expected) <= NEAR


@pytest.mark.parametrize("alpha, beta", [(2.0, 2.0), (0.6, 0.6), (5.0, 1.5)])
def test_beta_has_its_density(alpha, beta):
    _, t = drawn(eps_levels(), "eps", timesteps="beta", timestep_alpha=alpha, timestep_beta=beta)
    expected = by_integration(lambda t: t ** (alpha - 1) * (1 - t) ** (beta - 1))
    assert statistic(t + 5e-4, expected) <= NEAR + 3e-3


@pytest.mark.parametrize("name", ["content", "style"])
def test_content_and_style_are_those_of_ai_toolkit(name):
    """Its indices point into timesteps that fall from the most noise."""
    u = torch.rand(COUNT, generator=generator("c"), dtype=torch.float64)
    place = u**3 if name == "content" else 1 - u**3
    theirs = torch.arange(999, -1, -1)[(place * 1000).long().clamp(max=999)]
    levels = torch.arange(1000) / 1000
    known = TIMESTEPS[name]
    ours = known.indices(levels, known.quantile(1 - u if name == "content" else u, Objective(), 0))
    # A place that is a whole number may round to the level before it.
    assert float((ours != theirs).float().mean()) <= 1e-3
    _, t = drawn(eps_levels(), "eps", timesteps=name)
    assert float(t.mean()) == pytest.approx(0.75 if name == "content" else 0.25, abs=0.01)


@pytest.mark.parametrize("name", TIMESTEPS)
@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_stratified_batch_has_one_draw_in_each_part(name, kind):
    """A batch of 8 has one draw below each eighth of many independent draws; their order is random."""
    levels = eps_levels() if kind == "eps" else flow_levels()
    plain = drawn(levels, kind, (COUNT, 4, 64, 64), timesteps=name)[1].sort()[0]
    batches = torch.stack(
        [drawn(levels, kind, (8, 4, 64, 64), str(seed), timesteps=name, stratified="on")[1] for seed in range(400)]
    )
    batch = batches.sort(dim=1)[0]
    # The middle of the ranks of equal levels: style draws one level in ten times.
    rank = (torch.searchsorted(plain, batch) + torch.searchsorted(plain, batch, right=True)) / 2 / COUNT
    middles = (torch.arange(8) + 0.5) / 8
    # Half a part, and what the ranks of the independent draws are off by.
    assert float((rank - middles).abs().max()) <= 0.5 / 8 + 3 * NEAR
    assert torch.allclose(rank.mean(0), middles, atol=0.02)
    assert float((batches[:, 0] > plain[COUNT // 2]).float().mean()) == pytest.approx(0.5, abs=0.15)
