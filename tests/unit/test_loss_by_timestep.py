"""Tests of the loss by timestep: constant memory, the model's own loss, and the same values after a resume."""

import json
import math
import random

import numpy as np
import pytest
from graft_pack.trainers.objective.options import Objective
from graft_pack.trainers.runs.loss_by_timestep import BUCKETS, LossByTimestep, times_of

from tests.support.diffusers_host import make_host, run_session


@pytest.mark.parametrize("steps", [1, 16, 17, 100, 1000])
def test_means_are_those_of_all_that_came(steps):
    kept, every = LossByTimestep(), []
    for step in range(1, steps + 1):
        times = [random.random() for _ in range(3)]
        losses = [random.random() for _ in times]
        kept.add(step, times, losses)
        every += [(step, t, loss) for t, loss in zip(times, losses, strict=True)]
    assert len(kept.sums) <= 16 and len(json.dumps(kept.as_json())) < 10_000
    for first, last in [(0, 0), (len(kept.sums) // 2, len(kept.sums))]:
        within = [row for row in every if first * kept.span < row[0] <= (last + 1) * kept.span]
        for bucket, mean in enumerate(kept.means(first, last)):
            found = [loss for _, t, loss in within if int(t * BUCKETS) == bucket]
            assert mean == pytest.approx(np.mean(found)) if found else math.isnan(mean)


def test_a_run_that_tells_of_its_later_steps_alone_is_whole_from_there():
    kept = LossByTimestep()
    kept.add(1000, [0.0, 1.0], [0.5, math.inf])
    assert 1000 / kept.span <= 16 and sum(map(sum, kept.counts)) == 1, "what is no number is passed over"
    assert kept.means(0, 16)[0] == 0.5


@pytest.mark.parametrize("before", [1, 2, 3])
def test_what_came_before_a_gap_is_kept(before):
    """Also an odd number of spans, where pairs of spans merge several times at once."""
    kept = LossByTimestep()
    for step in range(1, before + 1):
        kept.add(step, [0.0], [1.0])
    kept.add(1000, [0.0], [5.0])
    assert sum(map(sum, kept.counts)) == before + 1
    assert kept.means(0, 0)[0] == 1.0 and kept.means(0, 16)[0] == pytest.approx((before + 5.0) / (before + 1))


@pytest.mark.parametrize("steps, span", [(16, 1), (17, 2), (32, 2), (33, 4)])
def test_spans_are_as_short_as_they_can_be(steps, span):
    kept = LossByTimestep()
    kept.add(steps, [0.0], [1.0])
    assert kept.span == span


def test_it_comes_back_from_json_to_the_bit():
    kept = LossByTimestep()
    for step in range(1, 60):
        kept.add(step, [random.random()], [random.random() / 3])
    assert LossByTimestep.of_json(json.loads(json.dumps(kept.as_json()))) == kept


SOUND = {"span": 1, "sums": [[0.5] * BUCKETS], "counts": [[1] * BUCKETS]}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {**SOUND, "more": 1},
        {**SOUND, "span": 0},
        {**SOUND, "span": True},
        {**SOUND, "sums": [[0.5]]},
        {**SOUND, "sums": [[math.nan] * BUCKETS]},
        {**SOUND, "sums": [[10**400] * BUCKETS]},
        {**SOUND, "sums": []},
        {**SOUND, "sums": SOUND["sums"] * 17, "counts": SOUND["counts"] * 17},
        {**SOUND, "counts": [[-1] * BUCKETS]},
        {**SOUND, "counts": [[0.5] * BUCKETS]},
        {**SOUND, "counts": "x"},
    ],
)
def test_anything_else_is_refused(value):
    assert LossByTimestep.of_json(SOUND).means(0, 0) == [0.5] * BUCKETS
    with pytest.raises(ValueError, match="losses by timestep"):
        LossByTimestep.of_json(value)


def test_t_is_the_place_among_the_levels():
    denoiser = make_host().denoiser
    levels = denoiser.sigmas()
    assert times_of(denoiser, levels[[0, 250, 999]]) == pytest.approx([0.0, 0.25, 0.999])


def test_it_is_the_models_own_loss_whatever_is_trained_by(tmp_path):
    """With and without a weighting, a penalty and micro-batches the draws are the same, and no weight has moved."""
    fields = {"steps": 1, "batch_size": 2, "accumulation": 3}
    own = run_session(tmp_path / "own", **fields)
    assert sum(map(sum, own.loss_by_timestep.counts)) == 6
    assert sum(map(sum, own.loss_by_timestep.sums)) / 6 == pytest.approx(own.losses[0], rel=1e-5)
    asked = Objective(weighting="min-SNR", min_snr_gamma=5.0, loss="Huber")
    other = run_session(tmp_path / "other", micro_batch=1, objective=asked, **fields)
    assert other.losses[0] != pytest.approx(own.losses[0], rel=0.05)
    assert other.loss_by_timestep.counts == own.loss_by_timestep.counts
    assert other.loss_by_timestep.sums[0] == pytest.approx(own.loss_by_timestep.sums[0], rel=1e-4)
