"""Schedules and optimisers, against diffusers and torch themselves."""

import pytest
import torch
from graft_pack.trainers.optimisers import OPTIMISERS, SCHEDULES, lr_factor

from tests.support import models


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_diffusers(schedule, warmup):
    from diffusers.optimization import get_scheduler

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.3)
    reference = get_scheduler(SCHEDULES[schedule], optimiser, num_warmup_steps=warmup, num_training_steps=30)
    factor = lr_factor(schedule, warmup, 30)
    for step in range(30):
        assert 0.3 * factor(step) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-6, abs=1e-7)
        optimiser.step()
        reference.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_past_its_end_a_schedule_stays_where_it_was(schedule):
    factor = lr_factor(schedule, 2, 10)
    assert factor(10) == factor(9) == factor(10_000)


def test_warm_up_rises_from_zero_and_constant_stays():
    factor = lr_factor("constant", 4, 10)
    assert [factor(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_adamw_is_the_one_of_torch():
    recipe = models.recipe("SD1", learning_rate=0.1, weight_decay=0.3)
    ours, theirs = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    pair = [OPTIMISERS["AdamW"]([ours], recipe), torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3)]
    for step in range(4):
        for parameter, optimiser in zip((ours, theirs), pair, strict=True):
            parameter.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimiser.step()
    assert torch.equal(ours, theirs)
