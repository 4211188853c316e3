"""Which examples make up which batch: a pure function of seed and position, so that resuming needs no state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def stream_seed(*parts) -> int:
    """A 63-bit seed from any parts; independent streams for different parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def epoch_batches(
    buckets: Sequence,
    repeats: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    prior: Sequence[bool] = (),
) -> list[list[int]]:
    """The batches of one epoch: every example as often as its repeats say, each batch from one bucket.

    A bucket's last batch may be smaller than `batch_size`: no example is dropped. With class images an epoch holds as
    many of them as of the others, and spreads them evenly over each bucket's batches.

    Args:
        buckets: the bucket of each example, anything hashable.
        repeats: how often each example is shown; of a class image, how often in a round of all class images.
        seed, epoch: decide the order, the same on every machine.
        prior: whether each example is a class image; empty for none.

    Returns:
        Lists of example indices.
    """
    rng = np.random.RandomState(stream_seed("order", seed, epoch) % (2**32))
    groups: dict = {}
    for index, bucket in enumerate(buckets):
        if not (prior and prior[index]):
            groups.setdefault(bucket, []).extend([index] * repeats[index])
    classes: dict = {}
    for index in _class_showings(repeats, seed, epoch, prior):
        classes.setdefault(buckets[index], []).append(index)
    batches = []
    for bucket in sorted({**groups, **classes}):
        members = np.array(groups.get(bucket, []), dtype=int)
        rng.shuffle(members)
        members = _spread(members.tolist(), classes.get(bucket, []))
        for start in range(0, len(members), batch_size):
            batches.append(members[start : start + batch_size])
    rng.shuffle(batches)
    return batches


def _spread(members: list[int], classes: list[int]) -> list[int]:
    """Both in their orders, the second evenly among the first, so that every stretch is as mixed as the whole."""
    if not classes:
        return members
    rows = [((place + 0.5) / len(members), 0, index) for place, index in enumerate(members)]
    rows += [((place + 0.5) / len(classes), 1, index) for place, index in enumerate(classes)]
    return [index for _, _, index in sorted(rows, key=lambda row: row[:2])]


def _class_showings(repeats: Sequence[int], seed: int, epoch: int, prior: Sequence[bool]) -> list[int]:
    """The class images of an epoch, as many as there are showings of the others.

    They are dealt round by round, each round all of them in an order of its own, on and on over the epochs: none is
    shown again before the others had their turn.
    """
    if not any(prior):
        return []
    deck, wanted = _deck(repeats, prior)
    first = epoch * wanted
    rounds = range(first // len(deck), (first + wanted - 1) // len(deck) + 1)
    dealt = [index for number in rounds for index in _round(deck, seed, number)]
    skipped = first - rounds.start * len(deck)
    return dealt[skipped : skipped + wanted]


def _deck(repeats: Sequence[int], prior: Sequence[bool]) -> tuple[list[int], int]:
    """The class images of a round, and how many showings of the others an epoch has."""
    deck = [index for index, times in enumerate(repeats) if prior[index] for _ in range(times)]
    return deck, sum(repeats) - len(deck)


def _round(deck: list[int], seed: int, number: int) -> list[int]:
    rng = np.random.RandomState(stream_seed("prior", seed, number) % (2**32))
    return rng.permutation(deck).tolist()


def _shown_before(repeats: Sequence[int], seed: int, epoch: int, prior: Sequence[bool]) -> list[int]:
    """How often each example was shown before an epoch."""
    if not any(prior):
        return [epoch * times for times in repeats]
    deck, wanted = _deck(repeats, prior)
    rounds, rest = divmod(epoch * wanted, len(deck))
    shown = [(rounds if prior[index] else epoch) * times for index, times in enumerate(repeats)]
    for index in _round(deck, seed, rounds)[:rest]:
        shown[index] += 1
    return shown


def batches_from(
    position: int,
    buckets: Sequence,
    repeats: Sequence[int],
    batch_size: int,
    seed: int,
    prior: Sequence[bool] = (),
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(epoch, batch) without end, starting after `position` batches.

    Each member of a batch is (example index, turn): how often the run showed that example before.
    """
    epoch = 0
    while True:
        batches = epoch_batches(buckets, repeats, batch_size, seed, epoch, prior)
        if position < len(batches):
            shown = _shown_before(repeats, seed, epoch, prior)
            for number, batch in enumerate(batches):
                members = []
                for index in batch:
                    members.append((index, shown[index]))
                    shown[index] += 1
                if number >= position:
                    yield epoch, members
        position = max(0, position - len(batches))
        epoch += 1


def turns_within(
    batches: int, buckets: Sequence, repeats: Sequence[int], batch_size: int, prior: Sequence[bool] = ()
) -> list[int]:
    """An upper bound of how often each example is shown in so many batches."""
    sizes: dict = {}
    for index, bucket in enumerate(buckets):
        if not (prior and prior[index]):
            sizes[bucket] = sizes.get(bucket, 0) + repeats[index]
    an_epoch = sum(-(-size // batch_size) for size in sizes.values())
    epochs = -(-batches // max(1, an_epoch))
    if not any(prior):
        return [epochs * times for times in repeats]
    deck, wanted = _deck(repeats, prior)
    rounds = -(-epochs * wanted // len(deck))
    return [(rounds if prior[index] else epochs) * times for index, times in enumerate(repeats)]
