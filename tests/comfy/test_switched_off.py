"""Tests that a disabled adapter leaves the host's own model bit-identical, the target of differential preservation."""

import pytest
import torch
from graft_pack.trainers.methods import ADAPTERS, METHODS
from graft_pack.trainers.recipe.parsing import parse_arguments

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")


def drawn(name):
    """Return a noised latent and a conditioning."""
    source = torch.Generator().manual_seed(2)
    return torch.randn(1, *models.SIZES[name].latent, generator=source), models.conditioning(name, 4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("name", models.FAMILIES)
def test_the_frozen_base_is_the_graphs_own_model(name, checkpointing):
    x, one = drawn(name)
    sigma = torch.tensor([0.6])
    with torch.inference_mode():
        model = models.patcher(name)
    with models.in_training(model, name, checkpointing, spread=0.0) as training, torch.no_grad():
        base = training.denoiser.predict(x, sigma, [one])
    with models.in_training(model, name, checkpointing, spread=0.1) as training, torch.no_grad():
        trained = training.denoiser.predict(x, sigma, [one])
        with METHODS["LoRA"].switched_off(training.denoiser.module):
            assert torch.equal(training.denoiser.predict(x, sigma, [one]), base)
            own = models.trained_denoised(training, x, 0.6, one)
        assert torch.equal(training.denoiser.predict(x, sigma, [one]), trained)
    assert models.distance(trained, base) > 1e-2
    assert models.distance(own, models.denoised(model, x, 0.6, one)) <= 1e-5


@pytest.mark.parametrize(
    "kind, arguments",
    [
        *((kind, "") for kind in ADAPTERS),
        ("LoHa", "dora_wd=true"),
        ("LoRA", "use_tucker=true rank_dropout=0.5"),
        ("LoRA", "train_norm=true train_bias=true"),
    ],
)
def test_every_type_can_be_switched_off(kind, arguments):
    """Also types whose layers have their own forward."""
    x, one = drawn("SD1")
    sigma = torch.tensor([0.6])
    with torch.inference_mode():
        model = models.patcher("SD1")
    targets = "linear + conv" if arguments else ADAPTERS[kind].default_targets
    fields = {"method": kind, "targets": targets, "adapter_args": parse_arguments(arguments)}
    with models.in_training(model, "SD1", spread=0.1, **fields) as training, torch.no_grad():
        trained = training.denoiser.predict(x, sigma, [one])
        with ADAPTERS[kind].switched_off(training.denoiser.module):
            off = training.denoiser.predict(x, sigma, [one])
        assert torch.equal(training.denoiser.predict(x, sigma, [one]), trained)
    with models.in_training(model, "SD1", spread=0.0) as training, torch.no_grad():
        assert torch.equal(off, training.denoiser.predict(x, sigma, [one]))
    assert models.distance(trained, off) > 1e-3
