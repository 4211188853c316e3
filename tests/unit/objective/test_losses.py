"""Tests of losses, noise and native targets as pure mathematics."""

import functools

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.objective.losses import (
    HUBER,
    HUBER_SCHEDULES,
    LOSSES,
    absolute,
    example_losses,
    huber_width,
    log_cosh,
    mixed,
    multi_scale,
    pseudo_huber,
    smooth_l1,
)
from graft_pack.trainers.objective.noise import add_offset, add_pyramid, draw_noise, draw_sigmas, spread_sigmas
from graft_pack.trainers.objective.targets import parameterization
from graft_pack.trainers.rng import generator


def test_the_loss_is_the_mean_square_of_each_example():
    prediction, target = torch.randn(2, 3, 4, 8, 8)
    expected = torch.stack([torch.nn.functional.mse_loss(a, b) for a, b in zip(prediction, target, strict=True)])
    assert torch.allclose(example_losses(prediction, target), expected)


@pytest.mark.parametrize("dtype, kept", [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_the_loss_is_summed_in_float32_or_better(dtype, kept):
    assert example_losses(torch.ones(1, 4, dtype=dtype), torch.zeros(1, 4, dtype=dtype)).dtype == kept
    assert float(example_losses(torch.full((1, 70000), 2.0, dtype=dtype), torch.zeros(1, 70000, dtype=dtype))) == 4.0


def test_equal_weights_change_nothing_and_zero_weights_count_not():
    prediction, target = torch.randn(2, 3, 4, 8, 8)
    plain = example_losses(prediction, target)
    assert torch.allclose(example_losses(prediction, target, torch.full((3, 1, 8, 8), 0.25)), plain)
    half = torch.zeros(3, 1, 8, 8)
    half[..., :4] = 1.0
    assert torch.allclose(
        example_losses(prediction, target, half), example_losses(prediction[..., :4], target[..., :4])
    )
    nothing = example_losses(prediction, target, torch.zeros(3, 1, 8, 8))
    assert torch.equal(nothing, torch.zeros(3))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["v", "edm"])
def test_velocities_are_residuals_of_unit_variance(kind, sigma_data):
    """For data of that deviation the target has unit variance at every level, the purpose of these scalings."""
    source = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 100_000, generator=source, dtype=torch.float64)
    for sigma in (0.01, 0.5, 1.0, 30.0):
        target = parameterization(kind, sigma_data).target(x0 * sigma_data, noise, torch.tensor([[sigma]]))
        assert float(target.var()) == pytest.approx(1.0, rel=0.02)


def test_flow_points_from_the_latent_to_the_scaled_noise():
    x0, noise = torch.randn(2, 2, 4, dtype=torch.float64)
    target = parameterization("flow", noise_scale=0.5).target(x0, noise, torch.ones(2, 1))
    assert torch.allclose(x0 + target, 0.5 * noise)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ModelError, match="Unheard.*no known training objective"):
        parameterization("Unheard")


def test_draws_are_decided_by_their_names():
    levels = torch.linspace(0, 1, 1000)
    same = [draw_sigmas(levels, 5, generator("step", 0, 3)) for _ in range(2)]
    assert torch.equal(*same)
    assert not torch.equal(same[0], draw_sigmas(levels, 5, generator("step", 0, 4)))
    assert not torch.equal(draw_noise((9,), generator("a")), draw_noise((9,), generator("b")))


def test_levels_are_drawn_evenly():
    levels = torch.arange(10.0)
    drawn = draw_sigmas(levels, 20_000, generator("even"))
    counts = torch.bincount(drawn.long(), minlength=10)
    assert counts.min() > 1800
    assert counts.max() < 2200


def test_fixed_levels_are_spread_over_all():
    assert spread_sigmas(torch.arange(1000.0), 4).tolist() == [125.0, 375.0, 625.0, 875.0]


def test_l1_is_the_mean_size_of_each_examples_error():
    prediction, target = torch.randn(2, 3, 4, 8, 8)
    expected = torch.stack([torch.nn.functional.l1_loss(a, b) for a, b in zip(prediction, target, strict=True)])
    assert torch.allclose(example_losses(prediction, target, penalty=absolute), expected)


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_huber_is_the_formula_that_kohya_has(c):
    """2 c (sqrt(e^2 + c^2) - c), with a width for each sample; in fp64, where the difference is exact enough."""
    error = torch.randn(3, 4, 5, 5, dtype=torch.float64) * torch.tensor([1e-2, 1.0, 100.0]).view(3, 1, 1, 1)
    width = c * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wide = width.view(3, 1, 1, 1)
    expected = 2 * wide * ((error**2 + wide**2).sqrt() - wide)
    assert torch.allclose(pseudo_huber(error, width), expected, rtol=1e-9)


def test_huber_is_the_square_of_small_errors_and_the_size_of_large_ones():
    """In float32 too, where the published difference has no correct digit at an error of 1e-4."""
    small, large = torch.full((1, 1), 1e-4), torch.full((1, 1), 1e4)
    width = torch.ones(1)
    assert float(pseudo_huber(small, width)) == pytest.approx(1e-8, rel=1e-5)
    assert float(pseudo_huber(large, width)) == pytest.approx(2e4, rel=1e-3)
    assert float(2 * ((small**2 + 1).sqrt() - 1)) != pytest.approx(1e-8, rel=0.1)


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0])
def test_smooth_l1_is_the_formula_that_kohya_has(c):
    """2 (sqrt(e^2 + c^2) - c), of which large errors do not depend on c."""
    error = torch.randn(3, 4, 5, 5, dtype=torch.float64) * torch.tensor([1e-2, 1.0, 100.0]).view(3, 1, 1, 1)
    width = c * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    wide = width.view(3, 1, 1, 1)
    assert torch.allclose(smooth_l1(error, width), 2 * ((error**2 + wide**2).sqrt() - wide), rtol=1e-9)


def test_log_cosh_is_its_formula_and_finite_for_large_errors():
    error = torch.linspace(-20, 20, 101, dtype=torch.float64)
    assert torch.allclose(log_cosh(error), error.cosh().log(), rtol=1e-9, atol=1e-15)
    error = torch.tensor([-1e4, -0.01, 0.0, 0.01, 1e4], requires_grad=True)
    log_cosh(error).sum().backward()
    assert torch.allclose(log_cosh(error)[[1, 3]], torch.full((2,), 5e-5), rtol=1e-3)
    assert torch.allclose(error.grad, error.detach().tanh(), rtol=1e-4)


@pytest.mark.parametrize("height, width, factors", [(64, 96, (1, 2)), (128, 130, (1, 2, 4)), (63, 200, (1,))])
def test_multi_scale_is_the_sum_over_scales_of_simple_diffusion(height, width, factors):
    """By Haar's wavelet: f x f means are its low band, whose halves are the sums of neighbors."""
    error = torch.randn(2, 3, 2, height, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.zeros(2, dtype=torch.float64)
    low = error
    for factor in factors:
        if factor > 1:
            if low.shape[-1] % 2:
                low = torch.cat([low, low[..., -1:]], -1)
            low = (low[..., ::2] + low[..., 1::2]) / 2
            low = (low[..., ::2, :] + low[..., 1::2, :]) / 2
        fine = low.repeat_interleave(factor, -1).repeat_interleave(factor, -2)[..., :height, :width]
        expected += factor * (fine**2).flatten(1).mean(1)
    losses = example_losses(error, torch.zeros_like(error), penalty=multi_scale)
    assert torch.allclose(losses, expected, rtol=1e-9)
    # Half of a mask leaves the other half out, of coarse positions too.
    mask = torch.ones(1, 1, 1, height, width, dtype=torch.float64)
    mask[..., width // 2 :] = 0
    half = example_losses(error, torch.zeros_like(error), mask, multi_scale)
    assert torch.allclose(half, (multi_scale(error)[..., : width // 2]).flatten(1).mean(1), rtol=1e-9)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_a_mix_is_the_sum_of_torchs_losses(fraction):
    prediction, target = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    losses = example_losses(prediction, target, penalty=functools.partial(mixed, l1_fraction=fraction))
    for row in range(3):
        pair = (prediction[row], target[row])
        expected = (1 - fraction) * torch.nn.functional.mse_loss(*pair) + fraction * torch.nn.functional.l1_loss(*pair)
        assert torch.allclose(losses[row], expected)


@pytest.mark.parametrize("penalty", LOSSES)
def test_a_mask_is_normalized_by_its_area_for_every_loss(penalty):
    prediction, target = torch.randn(2, 3, 4, 8, 8)
    penalise = LOSSES[penalty]
    if penalty in HUBER:
        penalise = functools.partial(penalise, width=torch.ones(3))
    if penalise is mixed:
        penalise = functools.partial(mixed, l1_fraction=0.3)
    half = torch.zeros(3, 1, 8, 8)
    half[..., :4] = 1.0
    expected = example_losses(prediction[..., :4], target[..., :4], penalty=penalise)
    assert torch.allclose(example_losses(prediction, target, half, penalise), expected)


def test_hubers_width_by_signal_to_noise_ratio_falls_from_one_to_c():
    """kohya's formula: (1 - c) / (1 + sigma)^2 + c, on the levels of diffusers' scheduler."""
    from .test_timesteps import eps_levels

    sigma = eps_levels()
    t = torch.arange(1000) / 1000
    width = huber_width("snr", 0.1, sigma, t, False)
    assert torch.allclose(width, 0.9 / (1 + sigma) ** 2 + 0.1)
    assert torch.equal(width, huber_width("auto", 0.1, sigma, t, False))
    assert (width.diff() < 0).all()
    assert float(huber_width("snr", 0.1, torch.zeros(1), torch.zeros(1), False)) == 1.0
    assert float(huber_width("snr", 0.1, torch.full((1,), 1e6), torch.ones(1), False)) == pytest.approx(0.1)


def test_hubers_width_by_the_step_is_a_power_of_c():
    """kohya's formula: exp(-alpha t) with alpha = -log(c) over the steps; the default of flow models."""
    t = torch.linspace(0, 1, 11)
    width = huber_width("exponential", 0.1, t, t, False)
    assert torch.allclose(width, torch.exp(torch.log(torch.tensor(0.1)) * t))
    assert torch.equal(width, huber_width("auto", 0.1, t, t, True))


def test_a_constant_width_is_c():
    assert torch.equal(huber_width("constant", 0.2, torch.ones(3), torch.ones(3), True), torch.full((3,), 0.2))
    assert set(HUBER_SCHEDULES) == {"auto", "snr", "exponential", "constant"}


@pytest.mark.parametrize("shape", [(64, 4, 16, 16), (64, 4, 2, 8, 16)])
def test_an_offset_is_one_more_number_for_a_whole_channel(shape):
    noise = draw_noise(shape, generator("n"))
    moved = add_offset(noise, 0.5, generator("o"))
    by = (moved - noise).flatten(2)
    assert torch.allclose(by, by[..., :1].expand_as(by), atol=1e-6)
    assert len(by[..., 0].unique()) > 250
    # 256 values with standard deviation 0.5.
    assert float(by[..., 0].std()) == pytest.approx(0.5, rel=0.15)
    assert float(by[..., 0].mean()) == pytest.approx(0.0, abs=0.1)


def whitakers(shape, discount, source):
    """Return multi-resolution noise as its author published it, from the same random numbers."""
    b, c, h, w = shape
    up = torch.nn.Upsample(size=(h, w), mode="bilinear")
    noise = torch.randn(shape, generator=source)
    for i in range(10):
        r = float(torch.rand((), generator=source)) * 2 + 2
        h, w = max(1, int(h / (r**i))), max(1, int(w / (r**i)))
        noise += up(torch.randn(b, c, h, w, generator=source)) * discount**i
        if w == 1 or h == 1:
            break
    return noise


def test_a_pyramid_is_the_published_one_but_for_its_scale():
    """Its author divides by the batch's deviation; we divide each sample by its own, so samples stay independent."""
    shape = (3, 4, 24, 40)
    theirs = whitakers(shape, 0.6, generator("p"))
    source = generator("p")
    ours = add_pyramid(draw_noise(shape, source), 0.6, source)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other / other.std(), atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 4, 32, 32), (200, 4, 2, 32, 32)])
def test_a_pyramid_has_unit_deviation_and_more_of_what_is_coarse(shape):
    source = generator("p")
    noise = draw_noise(shape, source)
    found = add_pyramid(noise, 0.6, source)
    assert found.shape == noise.shape
    assert torch.allclose(found.flatten(1).std(1), torch.ones(200), atol=1e-5)
    # The standard deviation of a channel's mean; for white noise it is 1 / 32.
    white, coarse = (float(one.flatten(0, -3).mean((-2, -1)).std()) for one in (noise, found))
    assert white == pytest.approx(1 / 32, rel=0.15)
    assert coarse > 3 * white
