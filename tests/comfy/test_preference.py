"""Tests of preference training on ComfyUI's classes: the gradient through both pictures, against finite differences."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.steps.step import batch_loss

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")


def with_pairs(training):
    """Return the training with a worse latent for each picture."""

    def paired(item, number):
        def show(visit):
            sample = item.show(visit)
            worse = torch.randn(sample.latent.shape, generator=torch.Generator().manual_seed(100 + number))
            return replace(sample, paired=worse.to(sample.latent))

        return replace(item, show=show)

    items = [paired(item, number) for number, item in enumerate(training.plan.train)]
    return replace(training, plan=replace(training.plan, train=items))


@pytest.mark.parametrize("method", ["LoRA", "all weights"])
@pytest.mark.parametrize("name", ["SD1", "SDXL", "Flux"])
def test_gradients_are_those_of_finite_differences(name, method):
    fields = {"method": method, "rank": 0, "targets": "all weights"} if method != "LoRA" else {}
    model = models.patcher(name, torch.float64)
    spread = 0.1 if method == "LoRA" else 0.0
    with models.in_training(model, name, spread=spread, preference_beta=10.0, **fields) as training:
        pairs = with_pairs(training)
        with models.float64_throughout(training):
            if method != "LoRA":
                # Trained weights that equal the frozen ones have no difference to learn from.
                with torch.no_grad():
                    for value in training.plan.trainables.values():
                        value.mul_(1.05)
            parameters = list(training.plan.trainables.values())
            error, slope = directional_error(lambda: batch_loss(pairs.plan, pairs.host), parameters, step=0.005)
    assert abs(slope) > 1e-6
    assert error <= 1e-5
