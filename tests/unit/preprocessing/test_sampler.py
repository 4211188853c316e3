"""Tests of the assignment of pictures to batches."""

import hashlib
import json
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from graft_pack.trainers.preprocessing import sampler as order
from graft_pack.trainers.preprocessing.sampler import batches_from, visits_within
from graft_pack.trainers.rng import stream_seed
from hypothesis import given
from hypothesis import strategies as st

from tests.support.batches import epoch_batches

BUCKETS = [(64, 64), (64, 64), (96, 48), (64, 64), (96, 48), (48, 96), (64, 64)]
REPEATS = [1, 2, 1, 3, 1, 1, 1]


@given(st.integers(1, 9), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_an_epoch_shows_each_picture_as_often_as_it_repeats(batch_size, seed, epoch):
    batches = epoch_batches(BUCKETS, REPEATS, batch_size, seed, epoch)
    shown = Counter(index for batch in batches for index in batch)
    assert shown == dict(enumerate(REPEATS))
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        assert len({BUCKETS[index] for index in batch}) == 1


@given(st.integers(0, 40), st.integers(1, 4))
def test_going_on_from_any_place_is_the_same_as_never_having_stopped(position, batch_size):
    straight = list(islice(batches_from(0, BUCKETS, REPEATS, batch_size, 7), position + 10))
    assert list(islice(batches_from(position, BUCKETS, REPEATS, batch_size, 7), 10)) == straight[position:]


@given(st.integers(1, 4), st.integers(0, 60))
def test_a_turn_counts_how_often_an_example_was_shown(batch_size, position):
    shown = Counter()
    for number, (_, batch) in enumerate(islice(batches_from(0, BUCKETS, REPEATS, batch_size, 7), position + 8)):
        for index, turn in batch:
            assert turn == shown[index]
            shown[index] += 1
        if number == position - 1:
            bound = visits_within(position, BUCKETS, REPEATS, batch_size)
            assert all(shown[index] <= bound[index] for index in range(len(BUCKETS)))


def test_epochs_and_seeds_differ():
    orders = [epoch_batches(BUCKETS, [1] * 7, 1, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6


def test_the_order_is_the_same_on_every_machine():
    """Literal values: another order would turn every resumed run into a different one."""
    expected = [[2, 4], [3, 3], [0, 3], [1, 6], [1], [5]]
    assert epoch_batches(BUCKETS, REPEATS, 2, 42, 3) == expected


def order_digest(prior):
    rng = np.random.RandomState(5)
    sides = [(64, 64), (96, 48), (48, 96)]
    buckets = [sides[number] for number in rng.randint(0, 3, 200)]
    repeats = rng.randint(1, 40, 200).tolist()
    marks = [bool(mark) for mark in rng.rand(200) < 0.3] if prior else []
    rows = list(islice(batches_from(7, buckets, repeats, 3, 11, marks), 4000))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def test_order_of_earlier_versions_is_kept():
    """Digests of version 1's order: two epochs of 200 pictures, without and with class images."""
    assert order_digest(prior=False) == "910cc65088343717"
    assert order_digest(prior=True) == "88b2bc39f3e1404c"


@pytest.mark.parametrize("prior", [(), [False] * 4 + [True] * 3])
def test_rounds_show_each_picture_by_its_repeats(monkeypatch, prior):
    """A schedule too large to lay out at once is laid out in rounds, and nothing else changes."""
    monkeypatch.setattr(order, "_LAID_OUT", 5)
    repeats = [7, 2, 11, 3, 1, 30, 4]
    straight = list(islice(batches_from(0, BUCKETS, repeats, 2, 7, prior), 200))
    for position in (1, 13, 60, 150):
        assert list(islice(batches_from(position, BUCKETS, repeats, 2, 7, prior), 20)) == straight[position:][:20]
    shown = Counter()
    for _, batch in straight:
        assert len({BUCKETS[index] for index, _ in batch}) == 1
        for index, turn in batch:
            assert turn == shown[index]
            shown[index] += 1
    epoch = Counter(index for batch in epoch_batches(BUCKETS, repeats, 2, 7, 3, prior) for index in batch)
    own = [index for index in range(7) if not (prior and prior[index])]
    assert {index: epoch[index] for index in own} == {index: repeats[index] for index in own}
    if prior:
        assert sum(epoch.values()) == 2 * sum(epoch[index] for index in own)


@pytest.mark.parametrize("prior", [(), [False] * 20 + [True] * 20], ids=["plain", "class images"])
def test_memory_does_not_grow_with_the_repeats(prior):
    tracemalloc.start()
    try:
        for times in (202_311, 1_000_000):
            source = batches_from(0, [(64, 64)] * 40, [times] * 40, 2, 7, prior)
            for _ in range(3):
                next(source)
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()
    assert visits_within(100, [(64, 64)] * 40, [10**6] * 40, 2, prior)[0] == 10**6


def test_seeds_of_streams_differ_and_fit():
    seeds = {stream_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a1",))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
