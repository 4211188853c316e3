"""Batches of one epoch of a run."""

from itertools import takewhile

from graft_pack.trainers.preprocessing.sampler import batches_from


def epoch_batches(buckets, repeats, batch_size, seed, epoch, prior=()):
    """Return an epoch's batches as lists of example indices."""

    def run_from(position):
        return batches_from(position, buckets, repeats, batch_size, seed, prior)

    position = 0
    if not any(prior):
        # All epochs have as many batches as the first.
        position = epoch * sum(1 for _ in takewhile(lambda row: row[0] == 0, run_from(0)))
    batches = takewhile(lambda row: row[0] <= epoch, run_from(position))
    return [[index for index, _ in batch] for number, batch in batches if number == epoch]
