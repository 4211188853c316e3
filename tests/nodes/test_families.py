"""Transformers of the host's other families: exact gradients, and what was trained is what core applies."""

import logging

import pytest
import torch
from graft_pack.trainers.check import directional_error
from graft_pack.trainers.formats.adapter import Adapter, save_adapter

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

SIGMA = 0.6  # all of them are flow models
LARGE = {"steps": 3, "learning_rate": 2e-2, "batch_size": 2}


def make_model(name):
    with torch.inference_mode():
        return models.patcher(name)


@pytest.mark.parametrize("name", models.OTHERS)
def test_gradients_are_exact_with_and_without_checkpointing(name):
    found = []
    for checkpointing in (False, True):
        with models.in_training(make_model(name), name, checkpointing, spread=0.1) as training:
            for part in "AB":
                chosen = [value for key, value in training.plan.trainables.items() if f"lora_{part}" in key]
                error, _ = directional_error(training.losses, chosen, step=0.2)
                assert error <= 1e-3
            found.append(models.joined(training.gradients()))
    assert models.distance(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("name", models.OTHERS)
def test_core_applies_what_was_trained(name, comfy, tmp_path, caplog):
    import nodes

    model = make_model(name)
    x = torch.randn(1, *models.OTHERS[name].latent, generator=torch.Generator().manual_seed(9))
    point = x, SIGMA, models.conditioning(name, 9)
    before = models.denoised(model, *point)
    with models.in_training(model, name, **LARGE) as training:
        state = models.train(training, tmp_path)
        output = models.trained_denoised(training, *point)
        adapter = Adapter(training.plan.export(state.trainables, 0).adapter)
    path = comfy.base / "models" / "loras" / f"family-{name}.safetensors"
    save_adapter(str(path), adapter, name)
    caplog.set_level(logging.WARNING)
    applied_model, _ = nodes.LoraLoader().load_lora(model, None, path.name, 1.0, 1.0)
    assert "not loaded" not in caplog.text.lower()
    applied = models.denoised(applied_model, *point)
    assert (applied - output).norm() <= 1e-3 * (output - before).norm()
    assert (output - before).norm() >= 1e-2 * SIGMA * ((x - before) / SIGMA).norm()
