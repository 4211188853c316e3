"""Tests of training on a device that is not the CPU: same losses, same bits after resuming, memory, reads, streams."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.methods import ADAPTERS

from tests.support import models, simulated_device
from tests.support.forked import forked

STEPS = 2
CPU = torch.device("cpu")
# The device adds in another order than the CPU's fused kernels.
ROUNDING = 2e-5


def gpu():
    return simulated_device.register()


@contextmanager
def training_on(device, family="SD1", state="NORMAL_VRAM", checkpointing=False, spread=0.0, **fields):
    """Yield a Training of a family on a device."""
    with simulated_device.comfy_on(device, state):
        model = models.patcher(family)
        with models.in_training(model, family, checkpointing, spread, **fields) as training:
            yield training


def losses_on(device, folder, family="SD1", state="NORMAL_VRAM", checkpointing=False, **fields):
    """Return (losses, trained values) of a training on a device."""
    with training_on(device, family, state, checkpointing, **fields) as training:
        state = models.train(training, folder / device.type, steps=STEPS, learning_rate=1e-3)
        assert {one.device.type for one in state.trainables.values()} == {device.type}
        return state.losses, models.joined(state.trainables.values()).cpu()


def check_equal(folder, *args, **fields):
    """Train on the CPU and on the device; check that the losses are the same."""
    (plain, values), (losses, other) = (losses_on(one, folder, *args, **fields) for one in (CPU, gpu().device))
    assert losses == pytest.approx(plain, rel=ROUNDING)
    assert models.distance(other, values) <= 1e-3


@pytest.mark.parametrize("method", ADAPTERS)
@forked
def test_every_adapter_type_trains_as_on_the_cpu(method, tmp_path):
    check_equal(tmp_path, method=method, rank=4, targets="attention")


@pytest.mark.parametrize("family", ["SDXL", "SD3", "Flux"])
@forked
def test_families_train_as_on_the_cpu(family, tmp_path):
    check_equal(tmp_path, family)
