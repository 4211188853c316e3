"""Losses, noise and native targets as pure mathematics."""

import pytest
import torch
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.objective.loss import example_losses
from graft_pack.trainers.objective.noise import draw_noise, draw_sigmas, generator, spread_sigmas
from graft_pack.trainers.objective.parameterisations import parameterisation


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
    """For data of that deviation the target has unit variance at every level: what those scalings are made for."""
    source = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 100_000, generator=source, dtype=torch.float64)
    for sigma in (0.01, 0.5, 1.0, 30.0):
        target = parameterisation(kind, sigma_data).target(x0 * sigma_data, noise, torch.tensor([[sigma]]))
        assert float(target.var()) == pytest.approx(1.0, rel=0.02)


def test_flow_points_from_the_latent_to_the_scaled_noise():
    x0, noise = torch.randn(2, 2, 4, dtype=torch.float64)
    target = parameterisation("flow", noise_scale=0.5).target(x0, noise, torch.ones(2, 1))
    assert torch.allclose(x0 + target, 0.5 * noise)


def test_an_unknown_objective_is_refused():
    with pytest.raises(ModelError, match="Unheard.*no known training objective"):
        parameterisation("Unheard")


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
