"""Tests that resumed pretraining ends with the bits of uninterrupted pretraining."""

import pytest
import torch

from tests.toy import pretrain, thin

PLAN = pretrain.Plan(samples=40, batch=2, learning_rate=1e-2, decay_from=0.5, ema=0.9, seed=1, pool=1)


class Stop(Exception):
    pass


def run():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    return pretrain.train("linear", model, PLAN, lambda g: model(torch.randn(2, 4, generator=g)).square().mean())


def test_stopped_and_resumed(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "SAVE_EVERY_SECONDS", -1)
    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "whole")
    whole = run()

    keep = pretrain.keep

    def keep_and_stop(*arguments):
        keep(*arguments)
        if arguments[-1] == 20:
            raise Stop

    monkeypatch.setattr(pretrain, "CACHE", tmp_path / "halves")
    monkeypatch.setattr(pretrain, "keep", keep_and_stop)
    with pytest.raises(Stop):
        run()
    monkeypatch.setattr(pretrain, "keep", keep)
    resumed = run()
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
