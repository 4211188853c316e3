"""Tests that resumed pretraining ends with the bits of uninterrupted pretraining."""

import pytest
import torch

from tests.toy import pretrain, thin

PLAN = pretrain.Plan(samples=40, batch=2, learning_rate=1e-2, decay_from=0.5, ema=0.9, seed=1, pool=1)


class Stop(Exception):
    pass


def run(folder, batches=100):
    """Train with a save after each batch. Raise Stop after so many batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    left = iter(range(batches))

    def loss_of(generator):
        if next(left, None) is None:
            raise Stop
        return model(torch.randn(2, 4, generator=generator)).square().mean()

    return pretrain.train("linear", model, PLAN, loss_of, folder, pause=-1)


def test_stopped_and_resumed(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "halves", batches=10)
    resumed = run(tmp_path / "halves", batches=10)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_timesteps_are_one_of_each_part():
    timesteps = pretrain.stratified_timesteps(10, torch.Generator().manual_seed(0))
    assert sorted((timesteps // 100).tolist()) == list(range(10))


def test_weights_have_mean_one_and_a_cap():
    weights = pretrain.loss_weights(pretrain.schedule())
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    assert weights.max() / weights.min() <= 20


def test_the_blurred_start_carries_colors():
    torch.manual_seed(0)
    vae = thin.ThinVAE()
    colors = torch.rand(8, 3, 1, 1).expand(-1, -1, 64, 64)
    thin.start_blurred(vae, colors)
    with torch.no_grad():
        error = (vae.decode(vae.encode(colors)) - colors)[:, :, 16:-16, 16:-16].abs().mean()
    assert error < 0.2
