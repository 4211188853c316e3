"""Which examples make up which batch: a pure function of seed and position, so that resuming needs no state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np


def stream_seed(*parts) -> int:
    """A 63-bit seed from any parts; independent streams for different parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def epoch_batches(buckets: Sequence, repeats: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: every example as often as its repeats say, each batch from one bucket.

    A bucket's last batch may be smaller than `batch_size`: no example is dropped.

    Args:
        buckets: the bucket of each example, anything hashable.
        repeats: how often each example is shown.
        seed, epoch: decide the order, the same on every machine.

    Returns:
        Lists of example indices.
    """
    rng = np.random.RandomState(stream_seed("order", seed, epoch) % (2**32))
    groups: dict = {}
    for index, bucket in enumerate(buckets):
        groups.setdefault(bucket, []).extend([index] * repeats[index])
    batches = []
    for bucket in sorted(groups):
        members = np.array(groups[bucket])
        rng.shuffle(members)
        for start in range(0, len(members), batch_size):
            batches.append(members[start : start + batch_size].tolist())
    rng.shuffle(batches)
    return batches


def batches_from(
    position: int, buckets: Sequence, repeats: Sequence[int], batch_size: int, seed: int
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(epoch, batch) without end, starting after `position` batches.

    Each member of a batch is (example index, turn): how often the run showed that example before.
    """
    epoch = 0
    while True:
        batches = epoch_batches(buckets, repeats, batch_size, seed, epoch)
        if position < len(batches):
            shown = [epoch * times for times in repeats]
            for number, batch in enumerate(batches):
                members = []
                for index in batch:
                    members.append((index, shown[index]))
                    shown[index] += 1
                if number >= position:
                    yield epoch, members
        position = max(0, position - len(batches))
        epoch += 1


def turns_within(batches: int, buckets: Sequence, repeats: Sequence[int], batch_size: int) -> list[int]:
    """An upper bound of how often each example is shown in so many batches."""
    sizes: dict = {}
    for index, bucket in enumerate(buckets):
        sizes[bucket] = sizes.get(bucket, 0) + repeats[index]
    an_epoch = sum(-(-size // batch_size) for size in sizes.values())
    epochs = -(-batches // max(1, an_epoch))
    return [epochs * times for times in repeats]
