"""Which pictures make up which batch."""

from collections import Counter
from itertools import islice

from graft_pack.trainers.data.order import batches_from, epoch_batches, stream_seed, turns_within
from hypothesis import given
from hypothesis import strategies as st

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
            bound = turns_within(position, BUCKETS, REPEATS, batch_size)
            assert all(shown[index] <= bound[index] for index in range(len(BUCKETS)))


def test_epochs_and_seeds_differ():
    orders = [epoch_batches(BUCKETS, [1] * 7, 1, seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 6


def test_the_order_is_the_same_on_every_machine():
    """Written down once: another order would make every resumed run another one."""
    expected = [[2, 4], [3, 3], [0, 3], [1, 6], [1], [5]]
    assert epoch_batches(BUCKETS, REPEATS, 2, 42, 3) == expected


def test_seeds_of_streams_differ_and_fit():
    seeds = {stream_seed(*parts) for parts in (("a", 1), ("a", 2), ("b", 1), ("a", 1, 0), ("a1",))}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
