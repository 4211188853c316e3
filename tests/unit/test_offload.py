"""Tests of block offload: blocks in any order get their own weights, two at once at most; a known order waits less."""

import random

import pytest
import torch
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.memory import offload
from graft_pack.trainers.memory.autograd import blocks_of
from torch import nn

META = torch.device("meta")


class Counting:
    """A transfer that moves numbers in place of weights and counts the blocks on the device.

    Attributes:
        waited: blocks requested before their transfer had started.
        most: largest number of blocks on the device or on their way, including the block that computes.
    """

    def __init__(self):
        self.waited = []
        self.started = []
        self.most = 0
        self._there = []
        self.fails = False
        self.now = -1

    def start(self, homes):
        if self.fails and self._there:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        load = Load(self._there, homes)
        self.started.append(load.number)
        if load.number == self.now:
            self.waited.append(load.number)
        self.most = max(self.most, len(self._there))
        return load

    def finish(self, load):
        return load

    def leave(self, homes):
        pass


class Load:
    def __init__(self, there, homes):
        self.number = int(homes[0])
        self._there = there
        there.append(self.number)

    def __del__(self):
        self._there.remove(self.number)


def prefetcher_of(count):
    """Return (prefetcher, its transfer) of blocks whose weights are their numbers."""
    transfer = Counting()
    prefetcher = offload.BlockPrefetcher(transfer)
    for number in range(count):
        assert prefetcher.add([torch.tensor(number)]) == number
    return prefetcher, transfer


def run(prefetcher, transfer, numbers):
    """Enter and leave blocks one after the other."""
    for number in numbers:
        transfer.now = number
        here = prefetcher.enter(number)
        assert here.number == number
        prefetcher.leave(number, here)
        del here


STEP = [*range(6), *reversed(range(6))]


def test_after_a_first_step_only_its_first_block_was_waited_for():
    prefetcher, transfer = prefetcher_of(6)
    run(prefetcher, transfer, STEP)
    for _ in range(3):
        transfer.waited.clear()
        transfer.started.clear()
        run(prefetcher, transfer, STEP)
    assert not transfer.waited
    # The last block of the forward and the first of the next are still on the device.
    assert transfer.started == [1, 2, 3, 4, 5, 4, 3, 2, 1, 0][: len(transfer.started)]
    assert len(transfer.started) == 10
    assert transfer.most == 2


@pytest.mark.parametrize("seed", range(4))
def test_any_order_is_served_with_at_most_two_blocks(seed):
    """Blocks are called twice, left out, reordered, or interrupted as by a preview."""
    source = random.Random(seed)
    prefetcher, transfer = prefetcher_of(7)
    for _ in range(40):
        numbers = list(range(7))
        kind = source.choice(["step", "preview", "some", "twice", "mixed"])
        if kind == "some":
            numbers = source.sample(numbers, 4)
        elif kind == "twice":
            numbers = [*numbers, *source.sample(numbers, 3)]
        elif kind == "mixed":
            source.shuffle(numbers)
        run(prefetcher, transfer, numbers if kind == "preview" else [*numbers, *reversed(numbers)])
    assert transfer.most == 2


def test_a_block_within_a_block_gets_its_own():
    prefetcher, transfer = prefetcher_of(3)
    for _ in range(3):
        outer = prefetcher.enter(0)
        inner = prefetcher.enter(1)
        assert (outer.number, inner.number) == (0, 1)
        prefetcher.leave(1, inner)
        assert outer.number == 0
        prefetcher.leave(0, outer)
        run(prefetcher, transfer, [2])


def test_without_room_for_a_second_each_is_waited_for():
    prefetcher, transfer = prefetcher_of(4)
    run(prefetcher, transfer, STEP_OF_FOUR * 2)
    transfer.fails = True
    run(prefetcher, transfer, STEP_OF_FOUR * 2)
    assert not transfer._there, "none is kept either"


STEP_OF_FOUR = [*range(4), *reversed(range(4))]


class Network(nn.Module):
    """Two blocks, layers around them, and a weight that a block shares with those."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])
        self.out = nn.Linear(4, 4)
        self.out.weight = self.blocks[0].weight
        self.requires_grad_(False)


def places(tree):
    """Return the device of each parameter and buffer by name."""
    found = {name: one.device.type for name, one in tree.named_parameters(remove_duplicate=False)}
    return {**found, **{name: one.device.type for name, one in tree.named_buffers()}}


def test_only_weights_of_blocks_are_held_back():
    tree = Network()
    offload.mark_offloaded(tree, META)
    away = {name for name, place in places(tree).items() if place == "cpu"}
    assert away == {"blocks.0.bias", "blocks.1.0.weight", "blocks.1.0.bias", "blocks.1.1.weight", "blocks.1.1.bias"}
    assert offload.is_on_other_device(tree)
    assert offload.bytes_here(tree) == sum(one.nbytes for one in (*tree.into.parameters(), *tree.out.parameters()))
    assert tree.out.weight is tree.blocks[0].weight


def test_what_is_trained_goes_to_the_device_and_the_rest_comes_when_needed(tmp_path):
    tree = Network()
    offload.mark_offloaded(tree, META)
    # Like an adapter added in the meantime.
    trained = nn.Parameter(torch.zeros(4, device=META))
    tree.blocks[1].register_parameter("trained", trained)
    locked = []
    trees = [(tree, META)]
    assert len(offload.list_frozen(trees, [trained])) == 5
    late = nn.Parameter(torch.zeros(4))
    tree.blocks[0].register_parameter("late", late)
    with pytest.raises(RunError, match="cannot move trained weights"):
        offload.place(tree, META)
    del tree.blocks[0].late
    count, size = offload.offload_trees(trees, [trained], str(tmp_path), lambda one: locked.append(one) or True)
    assert (count, size) == (3, 4 * (4 + 20 + 8))
    assert trained.device == META
    assert len(locked) == 5 and all(one.device.type == "cpu" for one in locked)
    seen = []
    for block in blocks_of(tree):
        block.forward.forward.forward = lambda block=block: seen.append({one.device.type for one in block.parameters()})
        block()
    assert seen == [{"meta"}] * 3
    assert places(tree)["blocks.1.0.weight"] == "cpu"
    # The second call has nothing left to do.
    assert offload.offload_trees(trees, [trained], str(tmp_path), locked.append) == (0, 0)
    assert not offload.list_frozen(trees, [trained])
