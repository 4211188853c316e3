"""Batch order as a pure function of seed and position, so that resuming needs no state."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..rng import stream_seed

# Number of visits laid out at once, in 4 bytes each: those of 10,000 pictures with 200 repeats.
_LAID_OUT = 1 << 21


@dataclass(frozen=True)
class _Rounds:
    """Visits of some examples, laid out in rounds: usually one, several if there are more than `_LAID_OUT` visits.

    Each of several rounds holds an even part of every example's visits.

    Attributes:
        repeats: int64, visits of each example in all rounds together.
    """

    repeats: np.ndarray

    @cached_property
    def total(self) -> int:
        """Number of visits in all rounds."""
        return int(self.repeats.sum())

    @property
    def count(self) -> int:
        """Number of rounds."""
        return max(1, -(-self.total // _LAID_OUT))

    def before(self, number: int) -> np.ndarray:
        """Return the number of visits of each example in the rounds before round `number`."""
        return self.repeats * number // self.count

    def of(self, number: int) -> np.ndarray:
        """Return the number of visits of each example in round `number`."""
        return self.before(number + 1) - self.before(number)


@dataclass(frozen=True)
class _Layout:
    buckets: list
    own: _Rounds
    classes: _Rounds
    batch_size: int
    seed: int

    @classmethod
    def make(cls, buckets: Sequence, repeats: Sequence[int], batch_size: int, seed: int, prior: Sequence[bool]):
        times = np.array(repeats, dtype=np.int64)
        is_class = np.array(prior, dtype=bool) if len(prior) else np.zeros(len(times), dtype=bool)
        own, classes = _Rounds(np.where(is_class, 0, times)), _Rounds(np.where(is_class, times, 0))
        return cls(list(buckets), own, classes, batch_size, seed)

    @cached_property
    def _rng(self) -> np.random.RandomState:
        return np.random.RandomState()

    def _seeded(self, kind: str, epoch: int, number: int) -> np.random.RandomState:
        # The same one anew: to make one takes longer than to shuffle a small dataset.
        self._rng.seed(stream_seed(kind, self.seed, epoch, *[number] * bool(number)) % (2**32))
        return self._rng

    @cached_property
    def places(self) -> dict[Hashable, np.ndarray]:
        """Indices of all examples by bucket."""
        groups: dict = {}
        for index, bucket in enumerate(self.buckets):
            groups.setdefault(bucket, []).append(index)
        return {bucket: np.array(groups[bucket], dtype=np.int32) for bucket in sorted(groups)}

    def batch_count(self, epoch: int, number: int) -> int:
        visits = self.own.of(number)
        if self.classes.total:
            visits = visits + self._class_counts(epoch, number)
        return sum(-(-int(visits[places].sum()) // self.batch_size) for places in self.places.values())

    def batches(self, epoch: int, number: int) -> Iterator[np.ndarray]:
        """Return the batches of a round, each an array of example indices."""
        visits = self.own.of(number)
        classes = self._class_members(epoch, number)
        # After the class images, whose decks seed it too.
        rng = self._seeded("order", epoch, number)
        rows: list[np.ndarray] = []
        starts: list[np.ndarray] = []
        for bucket, places in self.places.items():
            members = np.repeat(places, visits[places])
            rng.shuffle(members)
            members = _spread(members, classes.get(bucket))
            begin = sum(map(len, rows))
            rows.append(members)
            starts.append(np.arange(begin, begin + len(members), self.batch_size))
        members = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        first = np.concatenate(starts) if starts else np.zeros(0, dtype=np.int64)
        # This draws as shuffling the list of batches would: the draws depend only on their number.
        ends = np.append(first[1:], len(members))
        order = np.arange(len(first))
        rng.shuffle(order)
        return (members[first[place] : ends[place]] for place in order)

    def visits_before(self, epoch: int, number: int) -> np.ndarray:
        visits = epoch * self.own.repeats + self.own.before(number)
        if self.classes.total:
            visits = visits + self._class_visits(self._class_start(epoch, number))
        return visits

    def _class_start(self, epoch: int, number: int) -> int:
        return epoch * self.own.total + int(self.own.before(number).sum())

    def _class_members(self, epoch: int, number: int) -> dict:
        """Return the class images of a round by bucket, in their order.

        They come from shuffled decks, one after another over all epochs. Each deck holds every class image as often as
        its repeats say, so all of them have their visits before the next deck begins.
        """
        if not self.classes.total:
            return {}
        dealt = self._deal(self._class_start(epoch, number), int(self.own.of(number).sum()))
        by_bucket: dict = {}
        kinds = {bucket: kind for kind, bucket in enumerate(dict.fromkeys(self.buckets))}
        kind_of = np.array([kinds[bucket] for bucket in self.buckets])[dealt]
        for bucket, kind in kinds.items():
            members = dealt[kind_of == kind]
            if len(members):
                by_bucket[bucket] = members
        return by_bucket

    def _class_counts(self, epoch: int, number: int) -> np.ndarray:
        start = self._class_start(epoch, number)
        return self._class_visits(start + int(self.own.of(number).sum())) - self._class_visits(start)

    def _class_visits(self, count: int) -> np.ndarray:
        decks, rest = divmod(count, self.classes.total)
        number = self._round_at(rest)
        before = self.classes.before(number)
        left = rest - int(before.sum())
        visits = decks * self.classes.repeats + before
        if left:
            visits = visits + np.bincount(self._deck(decks, number)[:left], minlength=len(visits))
        return visits

    def _round_at(self, rest: int) -> int:
        low, high = 0, self.classes.count - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(self.classes.before(middle).sum()) <= rest else (low, middle - 1)
        return low

    def _deck(self, deck: int, number: int) -> np.ndarray:
        rng = self._seeded("prior", deck, number)
        places = np.arange(len(self.classes.repeats), dtype=np.int32)
        return rng.permutation(np.repeat(places, self.classes.of(number)))

    def _deal(self, start: int, count: int) -> np.ndarray:
        deck, rest = divmod(start, self.classes.total)
        number = self._round_at(rest)
        skipped = rest - int(self.classes.before(number).sum())
        dealt = [np.zeros(0, dtype=np.int32)]
        while count > 0:
            cards = self._deck(deck, number)[skipped : skipped + count]
            dealt.append(cards)
            count -= len(cards)
            skipped = 0
            deck, number = (deck, number + 1) if number + 1 < self.classes.count else (deck + 1, 0)
        return np.concatenate(dealt)


def _spread(members: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """Merge both, each in its order, the second evenly among the first: every stretch is as mixed as the whole."""
    if classes is None:
        return members
    places = [(np.arange(len(rows)) + 0.5) / max(1, len(rows)) for rows in (members, classes)]
    # Stable: at equal positions, `members` comes first.
    return np.concatenate([members, classes])[np.argsort(np.concatenate(places), kind="stable")]


def batches_from(
    position: int,
    buckets: Sequence,
    repeats: Sequence[int],
    batch_size: int,
    seed: int,
    prior: Sequence[bool] = (),
) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (epoch, batch) without end, starting after `position` batches.

    Each member of a batch is (example index, number of earlier visits of that example in the run). A bucket's last
    batch may be smaller, since no example is dropped. With class images, an epoch has as many of them as of the others,
    spread evenly over each bucket's batches. Memory does not grow with the repeats.

    Args:
        buckets: the bucket of each example, anything hashable.
        repeats: visits of each example in an epoch; of a class image, visits in a deck of all class images.
        prior: whether each example is a class image; empty for none.
    """
    layout = _Layout.make(buckets, repeats, batch_size, seed, prior)
    epoch = 0
    if not layout.classes.total:
        # Without class images all epochs have the same length, so skip the earlier ones at once.
        an_epoch = sum(layout.batch_count(0, number) for number in range(layout.own.count))
        epoch, position = divmod(position, max(1, an_epoch))
    while True:
        for number in range(layout.own.count):
            count = layout.batch_count(epoch, number)
            if position >= count:
                position -= count
                continue
            visits = layout.visits_before(epoch, number)
            for place, batch in enumerate(layout.batches(epoch, number)):
                members = []
                for index in batch.tolist():
                    members.append((index, int(visits[index])))
                    visits[index] += 1
                if place >= position:
                    yield epoch, members
            position = 0
        epoch += 1


def visits_within(
    batches: int, buckets: Sequence, repeats: Sequence[int], batch_size: int, prior: Sequence[bool] = ()
) -> list[int]:
    """Return an upper bound of the number of visits of each example in `batches` batches."""
    sizes: dict = {}
    for index, bucket in enumerate(buckets):
        if not (prior and prior[index]):
            sizes[bucket] = sizes.get(bucket, 0) + repeats[index]
    an_epoch = sum(-(-size // batch_size) for size in sizes.values())
    epochs = -(-batches // max(1, an_epoch))
    if not any(prior):
        return [epochs * times for times in repeats]
    deck = sum(times for index, times in enumerate(repeats) if prior[index])
    rounds = -(-epochs * (sum(repeats) - deck) // deck)
    return [(rounds if prior[index] else epochs) * times for index, times in enumerate(repeats)]
