"""Tests of clips on their way to latents: pieces, cache keys, memory, batches, visits."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.buckets import Crop
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.preprocessing import encode
from graft_pack.trainers.preprocessing.cache import Cache, key_of
from graft_pack.trainers.preprocessing.crops import crop_examples
from graft_pack.trainers.preprocessing.encode import LatentCache
from graft_pack.trainers.preprocessing.pixels import clip_array, cut, to_array
from graft_pack.trainers.protocols import Geometry
from PIL import Image

from tests.support.videos import shade, write_video


class Codec:
    """A codec whose latent is the mean of each frame."""

    pixels_at_once = 1 << 20

    def __init__(self):
        self.shapes = []

    def encode(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        return pixels.mean((1, 2)).reshape(len(pixels), 3, 1, 1, 1), None

    def snap_frames(self, frames):
        return (frames - 1) // 4 * 4 + 1

    def encode_clip(self, pixels):
        self.shapes.append(tuple(pixels.shape))
        return pixels[::4].mean((1, 2)).T.reshape(1, 3, -1, 1, 1), None

    def fingerprint(self):
        return "means"


def cropped(folder, frames=5, resolution=16, seed=0, handling=None, **options):
    reading = ScanOptions(frames=frames, **options)
    dataset = scan_folder(str(folder), "sks", resolution, 1, handling, reading)
    examples, left_out = crop_examples(dataset, {0: Geometry(resolution, 8)}, Codec().snap_frames, seed)
    assert not left_out
    return examples


def filled(folder, examples):
    codec = Codec()
    latents = LatentCache(Cache(str(folder)), codec)
    problems = latents.fill([(row.example, row.all_crops()) for row in examples], lambda name: None)
    return latents, codec, problems


@pytest.mark.parametrize("how, starts", [("first", [0]), ("whole", [0, 5, 10]), ("uniform", [0, 4, 8, 13])])
def test_each_piece_is_encoded_once_and_alone(tmp_path, how, starts):
    write_video(tmp_path / "a.mp4", 18)
    (example,) = cropped(tmp_path, pieces=how)
    assert [crop.piece for crop in example.crops] == [(start, 5) for start in starts]
    latents, codec, problems = filled(tmp_path / "cache", [example])
    assert problems == [None]
    assert codec.shapes == [(5, 16, 16, 3)] * len(starts)
    for crop in example.crops:
        whole = [np.asarray(cut(frame, crop)) / 255 for frame in example.example.source.frames(*crop.piece)]
        expected = torch.tensor(np.array(whole)[::4].mean((1, 2)).T).reshape(1, 3, 2, 1, 1)
        assert (latents.get(latents.key(example.example, crop))["mean"] - expected).abs().max() <= 1e-5
    _, again, _ = filled(tmp_path / "cache", [example])
    assert again.shapes == []


def test_a_piece_has_the_same_latent_whichever_pieces_go_with_it(tmp_path):
    write_video(tmp_path / "a.mp4", 18)
    (some,), (all_of_them,) = cropped(tmp_path), cropped(tmp_path, pieces="whole")
    latents, _, _ = filled(tmp_path / "cache", [some])
    _, codec, _ = filled(tmp_path / "cache", [all_of_them])
    assert len(codec.shapes) == 2, "the first piece was there"
    keys = {latents.key(row.example, crop) for row in (some, all_of_them) for crop in row.crops}
    assert len(keys) == 3


@pytest.mark.parametrize("other", [{"frames": 9}, {"frame_rate": 4.0}, {"resolution": 8}], ids=str)
def test_the_key_follows_piece_rate_and_crop(tmp_path, other):
    write_video(tmp_path / "a.mp4", 18)
    latents = LatentCache(Cache(str(tmp_path / "cache")), Codec())
    first, second = (cropped(tmp_path, **options)[0] for options in ({}, other))
    assert latents.key(first.example, first.crops[0]) != latents.key(second.example, second.crops[0])


def test_stills_keep_their_keys_and_streams(tmp_path):
    Image.fromarray(shade(1)).save(tmp_path / "a.png")
    for frames in (0, 5):
        (row,) = cropped(tmp_path, frames)
        (crop,) = row.crops
        assert row.stream(crop) == "0/16x16"
        # Random inpaint masks are drawn from this text.
        assert str(crop) == f"Crop(scaled={crop.scaled}, offset={crop.offset}, bucket=(16, 16), flip=False)"
        parts = row.example.digest, crop.scaled, crop.offset, crop.bucket, crop.flip
        latents = LatentCache(Cache(str(tmp_path / "cache")), Codec())
        assert latents.key(row.example, crop) == key_of("latent 2", "means", *parts)


def test_a_clip_shorter_than_a_piece_gives_a_shorter_one(tmp_path):
    write_video(tmp_path / "long.mp4", 9)
    write_video(tmp_path / "two.mp4", 2)
    long, two = cropped(tmp_path, frames=9)
    assert [crop.shape for row in (long, two) for crop in row.crops] == [(16, 16, 9), (16, 16)]
    latents, _, problems = filled(tmp_path / "cache", [long, two])
    assert problems == [None, None]
    assert latents.get(latents.key(two.example, two.crops[0]))["mean"].shape == (1, 3, 1, 1, 1)


def test_a_clip_that_cannot_be_decoded_is_left_out_by_name(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 9)
    write_video(tmp_path / "b.mp4", 9)
    first, second = cropped(tmp_path)
    broken = replace(first, crops=(replace(first.crops[0], piece=(8, 5)),))
    _, codec, problems = filled(tmp_path / "cache", [broken, second])
    assert str(problems[0]).startswith("a.mp4: cannot be read (only 1 of the 5 frames from frame 8 on")
    assert problems[1] is None and len(codec.shapes) == 1


def test_pieces_are_mirrored_and_cut_like_pictures(tmp_path):
    write_video(tmp_path / "a.mkv", 5, codec="ffv1", pix_fmt="yuv444p")
    (row,) = cropped(tmp_path, handling=Augmentation(flip=True))
    plain, mirrored = row.all_crops()
    frames = list(row.example.source.frames(0, 5))
    for crop in (plain, mirrored):
        still = Crop(crop.scaled, crop.offset, crop.bucket, crop.flip)
        expected = np.array([to_array(cut(frame, still)) for frame in frames])
        assert (clip_array(row.example, crop) == expected).all()
    assert mirrored.piece == plain.piece
    assert not (clip_array(row.example, plain) == clip_array(row.example, mirrored)).all()


def test_random_pieces_take_turns_by_seed_and_visit(tmp_path):
    write_video(tmp_path / "a.mp4", 60)
    (row,) = cropped(tmp_path, pieces="random", seed=1)
    (crop,) = row.crops
    shown = [row.crop_of_visit(crop, 1, visit).piece for visit in range(40)]
    assert len(set(shown)) == len(row.drawn) == 4 and set(shown) == set(row.drawn)
    assert shown == [row.crop_of_visit(crop, 1, visit).piece for visit in range(40)]
    assert {crop.piece for crop in row.all_crops()} == set(row.drawn)
    (other,) = cropped(tmp_path, pieces="random", seed=2)
    assert other.drawn != row.drawn


def test_stills_and_clips_are_mixed(tmp_path):
    write_video(tmp_path / "a.mp4", 9)
    Image.fromarray(shade(1)).save(tmp_path / "b.png")
    rows = cropped(tmp_path)
    latents, codec, _ = filled(tmp_path / "cache", rows)
    assert sorted(codec.shapes) == [(1, 16, 16, 3), (5, 16, 16, 3)]
    shapes = [latents.get(latents.key(row.example, row.crops[0]))["mean"].shape[2] for row in rows]
    assert shapes == [2, 1]


def test_old_datasets_of_arrays_keep_their_identity():
    images = [shade(number) for number in range(2)]
    dataset = from_arrays(images, ["a dog"], "sks", 64)
    assert dataset.fingerprint() == FINGERPRINT


# Of the version before clips.
FINGERPRINT = "87762b192ec248e8a0b81471cd3e7a38e648a5a4a7920b54a727e6e16de74fc9"


def test_memory_holds_one_piece(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 50)
    (row,) = cropped(tmp_path, pieces="whole")
    held, real = [], encode.clip_array

    def counted(example, crop):
        assert not any(reference() is not None for reference in held), "the piece before is still held"
        array = real(example, crop)
        held.append(weakref.ref(array))
        return array

    monkeypatch.setattr(encode, "clip_array", counted)
    _, codec, _ = filled(tmp_path / "cache", [row])
    assert len(codec.shapes) == len(held) == 10
