"""Tests of the calls to a device's streams and to the system, and of their order; no device is needed."""

import gc
import mmap
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.memory import transfer

from tests.support.streams import Streams

CPU = torch.device("cpu")


def weights():
    """Return weights of several dtypes and shapes, one transposed, some larger than pages."""
    source = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=source) for size in ((3,), (70, 50), (5000,), (2, 3, 4, 5))]
    return [*found, found[1].bfloat16().t(), torch.arange(7)]


@pytest.fixture
def kept(monkeypatch):
    """Return the list of stream names for which tensors kept their memory by `record_stream`."""
    found = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: found.append(stream.name))
    return found


def test_copies_wait_for_room_and_computing_waits_for_copies(kept):
    """The computing stream allocates, so the side stream waits for it first; then computing waits for the side."""
    streams = Streams()
    carrier = transfer.StreamTransfer(CPU, streams)
    homes = weights()
    load = carrier.start(homes)
    before = [("side", "wait for computing"), ("side", "begin"), ("side", "end"), ("side", "record")]
    assert sorted(streams.calls[1:]) == sorted(before[1:]) and streams.calls[0] == before[0]
    # The side stream records the event after the copies and before any other call.
    assert streams.calls.index(("side", "record")) > streams.calls.index(("side", "begin"))
    del streams.calls[:]
    here = carrier.finish(load)
    assert streams.calls == [("computing", "wait for event of side")]
    for home, copy in zip(homes, here, strict=True):
        assert torch.equal(home, copy) and home.stride() == copy.stride()
        assert home.data_ptr() != copy.data_ptr()
    del load, here
    gc.collect()
    assert not kept


def test_room_of_copies_that_nobody_waited_for_is_not_given_to_others(kept):
    streams = Streams()
    carrier = transfer.StreamTransfer(CPU, streams)
    load = carrier.start(weights())
    del load
    gc.collect()
    assert kept == ["side"] * len(weights())
    assert not any(name == "computing" for name, _ in streams.calls)


@pytest.mark.parametrize("index", [(0, []), ([1, 0], [2, 2]), ([True, False],), (0, slice(1, 3))])
def test_constants_index_as_lists_do(index):
    x = torch.arange(6.0).view(2, 3)
    with transfer.PinnedConstants():
        found = x[index]
    assert torch.equal(found, x[index])


def test_constants_that_are_trained_stay_leaves():
    with transfer.PinnedConstants():
        trained = torch.tensor([1.0, 2.0], device="meta", requires_grad=True)
        assert torch.tensor([1.0], device="meta").device.type == "meta"
    assert trained.is_leaf and trained.requires_grad and trained.device.type == "meta"


@pytest.mark.parametrize(
    "module, kind",
    [
        (Streams(), transfer.StreamTransfer),
        (SimpleNamespace(Event=object), transfer.SyncTransfer),
        (None, transfer.SyncTransfer),
    ],
)
def test_a_device_without_streams_copies_when_asked(module, kind, monkeypatch):
    """Such as MPS, whose module has none, and DirectML, which has no module."""
    monkeypatch.setattr(torch, "elsewhere", module, raising=False)
    carrier = transfer.transfer_to(SimpleNamespace(type="elsewhere"))
    assert type(carrier) is kind


def test_plain_copies_are_made_when_they_are_asked_for():
    carrier = transfer.SyncTransfer(torch.device("meta"))
    load = carrier.start(weights())
    assert all(one.device == CPU for one in load)
    assert all(one.device.type == "meta" for one in carrier.finish(load))


def test_mapped_weights_are_the_same_numbers_in_a_file(tmp_path):
    mapped, carrier = transfer.map_weights(weights(), str(tmp_path))
    assert not list(tmp_path.iterdir()), "the file has no name that could stay behind"
    for _ in range(2):
        for before, after in zip(weights(), carrier.finish(carrier.start(mapped)), strict=True):
            assert torch.equal(before, after) and before.dtype == after.dtype
            assert after.data_ptr() % 64 == 0
        # Dropped pages are read again from the file.
        carrier.leave(mapped)


def test_the_system_is_told_of_whole_pages_once(tmp_path):
    mapped, carrier = transfer.map_weights(weights(), str(tmp_path))
    told = []
    size = len(carrier._file)

    class File:
        def __len__(self):
            return size

        def madvise(self, *asked):
            told.append(asked)

    carrier._file = File()
    carrier.start(mapped)
    carrier.leave(mapped[1:2])
    carrier.leave([mapped[0], mapped[3]])
    page = mmap.PAGESIZE
    assert told[0] == (mmap.MADV_WILLNEED, 0, size)
    assert told[1][0] == mmap.MADV_DONTNEED
    for _, start, length in told:
        assert start % page == 0 and (length % page == 0 or start + length == size)
    # Separate ranges need separate calls.
    assert len(told) == 4


def test_without_such_advice_it_is_a_file_like_any(tmp_path):
    """As on Windows."""
    mapped, carrier = transfer.map_weights(weights(), str(tmp_path))
    carrier._can, carrier._file = False, None
    carrier.leave(carrier.finish(carrier.start(mapped)))


def test_a_folder_that_takes_nothing_is_named(tmp_path):
    with pytest.raises(RunError, match="gone"):
        transfer.map_weights(weights(), str(tmp_path / "gone"))
