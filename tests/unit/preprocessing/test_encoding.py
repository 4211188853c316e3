"""Tests of batched encoding: interruptions do not change the result, and each error names its own item."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.buckets import Crop
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.preprocessing.cache import Cache
from graft_pack.trainers.preprocessing.encode import LatentCache, TextCache

SIDES = {"small": (16, 16), "wide": (32, 16)}


class Codec:
    """A codec that returns a picture's mean plus a part of each neighbor's, so that results reveal the batch."""

    def __init__(self, pixels_at_once=16 * 16 * 4):
        self.pixels_at_once = pixels_at_once
        self.batches = []

    def encode(self, pixels):
        self.batches.append(tuple(pixels.shape[:3]))
        own = pixels.mean((1, 2)) * 255
        return (own + own.sum(0) / 1000)[..., None, None], torch.zeros(len(pixels), 3, 1, 1)

    def fingerprint(self):
        return "codec"


class Encoder:
    """An encoder that returns a caption's length plus a part of its neighbors'; captions batch by first letter."""

    def __init__(self):
        self.batches = []

    def form(self, caption):
        return None if caption.startswith("!") else caption[0]

    def encode(self, caption):
        return self.encode_all([caption])[0]

    def encode_all(self, captions):
        self.batches.append(list(captions))
        total = sum(map(len, captions)) / 1000
        return [{"cross_attn": torch.tensor([[len(caption) + total]])} for caption in captions]

    def fingerprint(self):
        return "encoder"


class Stop(Exception):
    pass


def rows_of(count, sides=("small", "wide", "small")):
    """Return pictures of one gray each, with one crop each."""
    arrays = [np.full((*SIDES[sides[n % len(sides)]][::-1], 3), n + 1, np.uint8) for n in range(count)]
    examples = from_arrays(arrays, ["x"], "", 16).examples
    return [(one, [Crop(one.size, (0, 0), one.size)]) for one in examples]


def interrupt_at(count):
    told = []

    def tick(name):
        if len(told) == count:
            raise Stop
        told.append(name)

    return tick, told


def latents(folder, rows, codec=None):
    cache = LatentCache(Cache(str(folder)), codec or Codec())
    return [cache.get(cache.key(example, crop))["mean"].flatten().tolist() for example, crops in rows for crop in crops]


def texts(folder, captions):
    cache = TextCache(Cache(str(folder)), Encoder())
    return [cache.get(caption)["cross_attn"].item() for caption in captions]


def test_cuts_of_one_size_are_encoded_together_up_to_the_codecs_pixels(tmp_path):
    rows = rows_of(14)
    codec = Codec()
    assert LatentCache(Cache(str(tmp_path)), codec).fill(rows, lambda name: None) == [None] * 14
    assert sorted(codec.batches) == [(1, 16, 16), (1, 16, 32), (2, 16, 32), (2, 16, 32), (4, 16, 16), (4, 16, 16)]
    assert [found[0] for found in latents(tmp_path, rows)] == pytest.approx(range(1, 15), abs=0.1)
    alone = Codec(0)
    LatentCache(Cache(str(tmp_path / "alone")), alone).fill(rows, lambda name: None)
    assert alone.batches == [(1, *example.size[::-1]) for example, _ in rows], "in the order of the list"


@pytest.mark.parametrize("stop", range(9))
def test_pictures_interrupted_anywhere_come_to_the_same_bits(tmp_path, stop):
    rows = rows_of(9)
    LatentCache(Cache(str(tmp_path / "straight")), Codec()).fill(rows, lambda name: None)
    tick, told = interrupt_at(stop)
    with pytest.raises(Stop):
        LatentCache(Cache(str(tmp_path / "stopped")), Codec()).fill(rows, tick)
    left = []
    LatentCache(Cache(str(tmp_path / "stopped")), Codec()).fill(rows, left.append)
    assert latents(tmp_path / "stopped", rows) == latents(tmp_path / "straight", rows)
    assert len(told) == stop and len(set(told) & set(left)) < 4, "what is told twice is of one batch"
    assert set(told) | set(left) == {example.source.name for example, _ in rows}


def test_one_that_is_missing_comes_to_the_same_bits(tmp_path):
    """Its batch is encoded again, and nothing else changes."""
    rows = rows_of(9)
    LatentCache(Cache(str(tmp_path / "whole")), Codec()).fill(rows, lambda name: None)
    for missing in range(9):
        folder = tmp_path / str(missing)
        cache = Cache(str(folder))
        filled = LatentCache(cache, Codec())
        for place, (example, (crop,)) in enumerate(rows):
            if place != missing:
                cache.put(filled.key(example, crop), {"mean": torch.tensor([[float(place)]])})
        cache.flush()
        codec, told = Codec(), []
        LatentCache(Cache(str(folder)), codec).fill(rows, told.append)
        assert told == [rows[missing][0].source.name] and len(codec.batches) == 1
        found, whole = latents(folder, rows), latents(tmp_path / "whole", rows)
        assert found[missing] == whole[missing]
        assert [one for place, one in enumerate(found) if place != missing] == [[n] for n in range(9) if n != missing]


@pytest.mark.parametrize("stop", [0, 3, 8, 11, 17, 19])
def test_captions_interrupted_anywhere_come_to_the_same_bits(tmp_path, stop):
    captions = [f"{'ab!'[n % 3]}{'.' * n}" for n in range(20)]
    TextCache(Cache(str(tmp_path / "straight")), Encoder()).fill(captions, lambda name: None)
    tick, told = interrupt_at(stop)
    with pytest.raises(Stop):
        TextCache(Cache(str(tmp_path / "stopped")), Encoder()).fill(captions, tick)
    encoder, left = Encoder(), []
    TextCache(Cache(str(tmp_path / "stopped")), encoder).fill(captions, left.append)
    assert texts(tmp_path / "stopped", captions) == texts(tmp_path / "straight", captions)
    assert set(told) | set(left) == set(captions)
    assert all(len({caption[0] for caption in batch}) == 1 for batch in encoder.batches)
    assert all(len(batch) == 1 for batch in encoder.batches if batch[0].startswith("!"))
    assert any(len(batch) > 1 for batch in encoder.batches) or stop > 18


def test_captions_that_are_there_are_not_asked_about(tmp_path):
    captions = [f"a{n}" for n in range(40)]
    TextCache(Cache(str(tmp_path)), Encoder()).fill(captions, lambda name: None)
    encoder, asked = Encoder(), []
    encoder.form = lambda caption: asked.append(caption) or "one"
    TextCache(Cache(str(tmp_path)), encoder).fill(captions, lambda name: None)
    assert (asked, encoder.batches) == ([], [])
    TextCache(Cache(str(tmp_path)), encoder).fill([*captions, "new"], lambda name: None)
    assert len(asked) <= 8, "cutting thousands into tokens for one takes seconds"


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()], ids=["RuntimeError", "MemoryError"])
def test_where_all_do_not_fit_fewer_are_taken(tmp_path, caplog, error, most):
    rows = rows_of(8, ["small"])
    codec = Codec()
    inner = codec.encode

    def encode(pixels):
        if len(pixels) > most:
            failed.append(len(pixels))
            raise error
        return inner(pixels)

    failed = []
    codec.encode = encode
    with caplog.at_level(logging.WARNING):
        assert LatentCache(Cache(str(tmp_path)), codec).fill(rows, lambda name: None) == [None] * 8
    assert [batch[0] for batch in codec.batches] == [min(most, 2)] * (8 // min(most, 2))
    assert "Graft tries fewer" in caplog.text
    assert failed == [4, 2][: 2 if most == 1 else 1], "what did not fit is not tried again"
    assert [found[0] for found in latents(tmp_path, rows)] == pytest.approx(range(1, 9), abs=0.1)


def test_what_fails_alone_fails_as_it_says(tmp_path):
    """The encoder halves the batch until the caption is alone, so that the error is about this caption only."""
    encoder = Encoder()
    inner = encoder.encode_all

    def encode_all(captions):
        if "abad" in captions:
            raise RuntimeError("this one")
        return inner(captions)

    encoder.encode_all = encode_all
    with pytest.raises(RuntimeError, match="this one"):
        TextCache(Cache(str(tmp_path)), encoder).fill(["a1", "a2", "abad", "a3"], lambda name: None)
    assert encoder.batches == [["a1", "a2"]]


def test_the_one_that_is_not_finite_is_named(tmp_path):
    rows = rows_of(4, ["small"])
    codec = Codec()
    inner = codec.encode

    def encode(pixels):
        mean, spread = inner(pixels)
        mean[2] = float("nan")
        return mean, spread

    codec.encode = encode
    with pytest.raises(DatasetError, match="'image 3'"):
        LatentCache(Cache(str(tmp_path / "a")), codec).fill(rows, lambda name: None)
    encoder = Encoder()
    given = encoder.encode_all
    encoder.encode_all = lambda captions: [
        {"x": one["cross_attn"] * (float("nan") if caption == "a2" else 1)}
        for one, caption in zip(given(captions), captions, strict=True)
    ]
    with pytest.raises(DatasetError, match="'a2'"):
        TextCache(Cache(str(tmp_path / "b")), encoder).fill(["a1", "a2", "a3"], lambda name: None)


def test_one_that_cannot_be_opened_leaves_the_others_alone(tmp_path):
    rows = rows_of(6, ["small"])
    example, crops = rows[2]

    class Gone:
        name = "gone"

        def open(self):
            raise DatasetError("gone: it is damaged", "", "folder")

    # The picture is there twice: once unreadable and once readable.
    rows[2] = (replace(example, source=Gone()), crops)
    rows.append((example, crops))
    told = []
    outcome = LatentCache(Cache(str(tmp_path)), Codec()).fill(rows, told.append)
    assert [one is None for one in outcome] == [True, True, False, True, True, True, True]
    assert "damaged" in str(outcome[2])
    assert len(told) == len(set(told)) == 7
    del rows[2]
    assert [found[0] for found in latents(tmp_path, rows)] == pytest.approx([1, 2, 4, 5, 6, 3], abs=0.1)
