"""Tests of the prefetch thread: it fetches the next batch during a step, and results do not depend on it."""

import threading
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers import rng
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.objective.options import NATIVE, Objective
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.preprocessing.prefetch import Prefetcher
from graft_pack.trainers.protocols import Conditioning
from graft_pack.trainers.steps import step

from tests.support import counting, models, runs
from tests.support.diffusers_host import WordEncoder, gradient_of, planned, same_tensors

FIELDS = {"steps": 5, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.0, "save_every": 100}


def items(told, fails=None):
    """Return six samples that vary by visit; `told` gets (thread, place, visit) of each one shown."""

    def show(place, turn):
        told.append((threading.current_thread().name, place, turn))
        if (place, turn) == fails:
            raise DatasetError(f"picture {place} is gone", "Put it back.", "dataset")
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(100 * place + turn))
        return Sample(latent, Conditioning(WordEncoder().encode(f"picture {place}")))

    return [
        DatasetItem(f"picture {place}", (64, 64), 1, lambda turn, place=place: show(place, turn), False, False)
        for place in range(6)
    ]


def trained(folder, prefetch, fails=None, **fields):
    """Return (final state, recorded visits) of a training."""
    told = []
    with planned(items(told, fails), **FIELDS, **fields) as (plan, host):
        state = models.train(models.Training(None, host, replace(plan, prefetch=prefetch)), folder)
    return state, told


def fetching():
    """Return the running prefetch threads."""
    return [one for one in threading.enumerate() if one.name.startswith("graft-ahead")]


def test_the_bits_are_the_same_with_and_without(tmp_path):
    ahead, told = trained(tmp_path / "ahead", True)
    plain, plainly = trained(tmp_path / "plain", False)
    assert ahead.losses == plain.losses
    assert same_tensors(ahead.trainables, plain.trainables)
    # The first picture is fetched once more, to find the layers that share an input.
    assert told.pop(0) == ("MainThread", *told[0][1:])
    assert plainly.pop(0) == ("MainThread", *plainly[0][1:])
    # Nothing else is fetched twice or in vain: 5 steps of 2 batches of 2.
    assert sorted(row[1:] for row in told) == sorted(row[1:] for row in plainly)
    assert len(told) == 20
    assert {name for name, *_ in plainly} == {"MainThread"}
    threads = [name for name, *_ in told]
    assert threads[:2] == ["MainThread"] * 2
    assert all(name.startswith("graft-ahead") for name in threads[2:])
    assert not fetching()


OFFSET = Objective(noise_offset=0.1, noise_offset_random_strength="on", adaptive_noise_scale=0.1)
PYRAMID = Objective(pyramid_discount=0.3, input_perturbation=0.1)


@pytest.mark.parametrize("objective", [NATIVE, OFFSET, PYRAMID], ids=["native", "offset", "pyramid"])
def test_noise_is_drawn_ahead_and_the_same(objective, tmp_path, monkeypatch):
    """With several processes, each draws the noise of all, and the device waits meanwhile."""

    def generator(*names):
        threads.append((names, threading.current_thread().name.startswith("graft-ahead")))
        return rng.generator(*names)

    monkeypatch.setattr(step, "generator", generator)
    drawn, states = [], []
    for prefetch in (True, False):
        threads = []
        states.append(trained(tmp_path / str(prefetch), prefetch, objective=objective)[0])
        drawn.append(threads)
    # Only the first batch's noise is drawn within its step.
    assert [is_ahead for _, is_ahead in drawn[0]] == [False] * (len(drawn[0]) - 9) + [True] * 9
    assert [names for names, _ in drawn[0]] == [names for names, _ in drawn[1]]
    assert not any(is_ahead for _, is_ahead in drawn[1])
    assert states[0].losses == states[1].losses
    assert same_tensors(states[0].trainables, states[1].trainables)


@pytest.mark.parametrize("prefetch", [True, False])
def test_what_cannot_be_fetched_ends_its_own_step(prefetch, tmp_path):
    _, told = trained(tmp_path / "whole", False)
    fails = told[9][1:]
    with planned(items([], fails), **FIELDS) as (plan, host):
        training = models.Training(None, host, replace(plan, prefetch=prefetch))
        # The error keeps the loop's frame alive, but its thread still ends.
        with pytest.raises(DatasetError, match="is gone") as caught:
            models.train(training, tmp_path / "run")
        assert caught.tb is not None and not fetching()
        # The earlier steps are kept, with or without prefetch.
        assert runs.steps_logged(tmp_path / "run" / "run") == [1, 2]
        resumed = models.train(replace(training, plan=replace(plan, train=items([]))), tmp_path / "run", resume=True)
    assert len(resumed.losses) == 5
    assert runs.steps_logged(tmp_path / "run" / "run") == [1, 2, 3, 4, 5]


def test_a_batch_that_is_asked_for_again_is_shown_again():
    """A step does this when memory runs out while the next batch is already fetched."""
    with planned(items([]), **FIELDS) as (plan, _):
        first, second = ([(0, 0), (1, 0)], [(2, 0), (3, 0)])
        ahead = Prefetcher(plan.samples, plan.prefetch)
        ahead.set_upcoming([first, second])
        for batch in (first, first, second, first):
            found = ahead.get(batch)
            assert all(torch.equal(a.latent, b.latent) for a, b in zip(found, plan.samples(batch), strict=True))
        ahead.close()


def test_the_device_is_not_waited_for_between_parts():
    """Reading a value makes a device finish all queued work, so the loss is read after the last micro-batch."""
    readings = []
    for micro_batch in (0, 1):
        with planned(items([]), micro_batch=micro_batch) as (plan, host), counting.Counter() as counter:
            gradient_of(plan, host, [(0, [(0, 0), (1, 0), (2, 0), (3, 0)])])
        readings.append(counter.readings)
    assert readings[1] == readings[0]
