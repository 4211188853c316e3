"""Tests of loss weights by noise level, against diffusers and against each other."""

import pytest
import torch
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.objective.weighting import WEIGHTINGS

from .test_timesteps import eps_levels

SNR_WEIGHTS = ("min-SNR", "debiased", "soft min-SNR", "P2", "EDM")


def weights(name, sigma, kind, **fields):
    return WEIGHTINGS[name].weights(sigma, sigma, kind, Objective(**fields))


def snr_of_diffusers():
    """Return diffusers' signal-to-noise ratio of every level of SD1, [1000]."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return compute_snr(scheduler, torch.arange(1000))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("kind", ["eps", "v"])
def test_min_snr_is_the_one_of_diffusers_training_scripts(kind, gamma):
    """min(snr, gamma) / snr for noise, / (snr + 1) for velocity, at each of the model's levels."""
    snr = snr_of_diffusers()
    cut = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    theirs = cut / snr if kind == "eps" else cut / (snr + 1)
    ours = weights("min-SNR", eps_levels(), kind, weighting="min-SNR", min_snr_gamma=gamma)
    assert torch.allclose(ours, theirs, rtol=1e-4)


def test_debiased_is_the_one_of_the_paper():
    snr = snr_of_diffusers()
    ours = weights("debiased", eps_levels(), "eps", weighting="debiased")
    assert torch.allclose(ours, 1 / snr.clamp(max=1000).sqrt(), rtol=1e-4)


@pytest.mark.parametrize("name", SNR_WEIGHTS)
def test_a_weight_means_the_same_for_every_parameterization(name):
    """The same error of the latent has the same weighted loss under every target."""
    from graft_pack.trainers.objective.targets import parameterization

    source = torch.Generator().manual_seed(0)
    x0, noise, error = torch.randn(3, 6, 50, generator=source, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.2, 0.9, 2.0, 5.0, 14.0], dtype=torch.float64)
    found = {}
    for kind in ("eps", "v", "edm", "x0"):
        # The same x_t, explained by another latent and another noise.
        wide = sigma[:, None]
        other = parameterization(kind).target(x0 + error, noise - error / wide, wide)
        loss = ((other - parameterization(kind).target(x0, noise, wide)) ** 2).mean(1)
        found[kind] = loss * weights(name, sigma, kind, weighting=name)
    for kind, losses in found.items():
        assert torch.allclose(losses, found["x0"], rtol=1e-9), kind


def test_zero_terminal_snr_gives_numbers():
    """The last level of such a model has almost no signal."""
    sigma = torch.tensor([0.03, 4518.0])
    for name in SNR_WEIGHTS:
        assert torch.isfinite(weights(name, sigma, "v", weighting=name)).all()


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_flow_are_those_of_diffusers(name):
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    t = torch.linspace(0.01, 1.0, 100)
    assert torch.allclose(weights(name, t, "flow", weighting=name), compute_loss_weighting_for_sd3(name, t))


def test_native_is_one():
    assert torch.equal(weights("native", torch.tensor([0.0, 3.0]), "eps"), torch.ones(2))


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_p2_is_the_one_of_the_paper(gamma):
    """1 / (k + snr)^gamma on the loss of the noise, with k = 1."""
    snr = snr_of_diffusers()
    ours = weights("P2", eps_levels(), "eps", weighting="P2", p2_gamma=gamma)
    assert torch.allclose(ours, (1 + snr) ** -gamma, rtol=1e-4)


def test_soft_min_snr_is_the_one_of_k_diffusion():
    """(sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2 on EDM's loss, with gamma 1; below gamma it is the ratio."""
    sigma = eps_levels().double()
    ours = weights("soft min-SNR", sigma, "edm", weighting="soft min-SNR", min_snr_gamma=1.0)
    assert torch.allclose(ours, sigma**2 / (sigma**2 + 1) ** 2, rtol=1e-9)
    soft = weights("soft min-SNR", sigma, "x0", weighting="soft min-SNR", min_snr_gamma=5.0)
    assert torch.allclose(soft, 1 / (sigma**2 + 1 / 5), rtol=1e-9)
    assert (soft <= weights("min-SNR", sigma, "x0", weighting="min-SNR", min_snr_gamma=5.0)).all()


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_the_one_of_diffusers_training_scripts(sigma_data):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 for the latent, up to a constant; 1 for EDM's own residual."""
    sigma = eps_levels().double()
    theirs = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    ours = weights("EDM", sigma / sigma_data, "x0", weighting="EDM")
    assert torch.allclose(ours, theirs * sigma_data**2, rtol=1e-9)
    assert torch.allclose(weights("EDM", sigma, "edm", weighting="EDM"), torch.ones_like(sigma), rtol=1e-9)
