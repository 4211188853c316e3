"""Tests of the loss plot."""

import math

import numpy as np
import pytest
from graft_pack.trainers.runs.history import smoothed
from graft_pack.trainers.runs.loss_by_timestep import LossByTimestep
from graft_pack.trainers.tools.plots import plot, plot_levels

# The colors figure.FIRST and figure.SECOND.
BLUE, AMBER = np.array([0x60, 0x96, 0xD6]) / 255, np.array([0xF0, 0xB0, 0x40]) / 255


def count(image, color):
    return int((np.abs(image - color).max(axis=2) < 0.02).sum())


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values = [3.0, 1.0, 2.0, 5.0]
    for place, found in enumerate(smoothed(values, 0.5)):
        weights = [0.5 ** (place - one) for one in range(place + 1)]
        assert found == pytest.approx(np.average(values[: place + 1], weights=weights))
    assert smoothed([2.0] * 50, 0.96) == pytest.approx([2.0] * 50)
    assert smoothed([math.nan, 1.0, math.inf, 3.0], 0.5)[1:] == pytest.approx([1.0, 1.0, (0.5 + 3) / 1.5])


@pytest.mark.parametrize("logarithmic", [False, True])
def test_one_run_and_two(logarithmic):
    falling = [1 / step for step in range(1, 200)]
    one = plot({"loss": falling}, 0.96, logarithmic)
    assert one.shape == (500, 900, 3) and one.dtype == np.float32 and 0 <= one.min() < one.max() <= 1
    assert count(one, BLUE) > 500 and count(one, AMBER) == 0
    two = plot({"loss": falling, "loss_b": [1.0] * 100}, 0.96, logarithmic)
    assert count(two, BLUE) > 500 and count(two, AMBER) > 300


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan, 0.4], [0.0, 0.0]])
def test_little_or_nothing_to_draw(values):
    for smoothing in (0.0, 0.9):
        assert plot({"loss": values}, smoothing, False).shape == (500, 900, 3)


def learnt(steps, speed, pictures=4):
    """Return losses by noise level of a run that improves; they are smallest at high noise."""
    kept = LossByTimestep()
    for step in range(1, steps + 1):
        times = [(7 * step + 31 * number) % 100 / 100 for number in range(pictures)]
        kept.add(step, times, [(1.1 - t) * (0.3 + math.exp(-speed * step)) for t in times])
    return kept, steps


@pytest.mark.parametrize("logarithmic", [False, True])
def test_by_timestep_the_first_quarter_and_the_last(logarithmic):
    one = plot_levels({"loss": learnt(200, 0.02)}, logarithmic)
    assert one.shape == (500, 900, 3) and one.dtype == np.float32 and 0 <= one.min() < one.max() <= 1
    assert count(one, BLUE) > 500 and count(one, AMBER) == 0
    two = plot_levels({"loss": learnt(200, 0.02), "loss_b": learnt(50, 0.1)}, logarithmic)
    assert count(two, BLUE) > 500 and count(two, AMBER) > 300


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_by_timestep_of_a_short_run(steps):
    assert count(plot_levels({"loss": learnt(steps, 0.1, 1)}, False), BLUE) > 5
