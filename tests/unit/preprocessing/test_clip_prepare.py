"""Tests of a dataset of clips and stills on its way through `prepare`: items, batches, masks, visits, jobs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine.job_json import dataset_as_json, decode_dataset
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import HOLE
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps.plan import Plan
from PIL import Image

from tests.support import models
from tests.support.diffusers_host import make_host
from tests.support.videos import shade, write_video


class VideoCodec:
    """A codec with Wan's lengths, whose latent holds the mean of each square of 16 pixels and each four frames."""

    pixels_at_once = 0

    def __init__(self):
        self.calls = []

    def snap_frames(self, frames):
        return (frames - 1) // 4 * 4 + 1

    def encode(self, pixels):
        return self.encode_clip(pixels)

    def encode_clip(self, pixels):
        self.calls.append(len(pixels))
        rows = pixels[::4].permute(0, 3, 1, 2)
        means = torch.nn.functional.avg_pool2d(rows, 16)
        return torch.cat([means, means[:, :1]], dim=1).transpose(0, 1)[None], None

    def fingerprint(self):
        return "squares"


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    write_video(root / "long.mp4", 14, size=(64, 64))
    write_video(root / "other.mp4", 5, size=(64, 64))
    Image.fromarray(shade(3, (64, 64))).save(root / "still.png")
    for name in ("long", "other", "still"):
        (root / f"{name}.txt").write_text(f"a {name} thing")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(root / "long-masklabel.png")
    return root


def prepared(folder, tmp_path, handling=None, host=None, fields=None, dataset=None, **options):
    host = host or replace(make_host(), codec=VideoCodec())
    dataset = dataset or scan_folder(str(folder), "", 64, 1, handling, ScanOptions(frames=6, **options))
    recipe = models.recipe("SD1", **{"batch_size": 2, "steps": 40, "resolution": 64, **(fields or {})})
    return prepare(dataset, recipe, host, Folders("", str(tmp_path / "cache"), "", "")), host, recipe, dataset


def test_pieces_become_items_with_frames_and_latents_with_time(folder, tmp_path):
    made, host, _, _ = prepared(folder, tmp_path, pieces="whole")
    items = [(item.name, item.frames, item.shape) for item in made.training]
    assert items == [
        ("long.mp4", 5, (64, 64, 5)),
        ("long.mp4", 5, (64, 64, 5)),
        ("other.mp4", 5, (64, 64, 5)),
        ("still.png", 1, (64, 64)),
    ]
    assert [tuple(item.show(0).latent.shape) for item in made.training] == [(1, 4, 2, 4, 4)] * 3 + [(1, 4, 1, 4, 4)]
    assert sorted(host.codec.calls) == [1, 5, 5, 5]
    assert made.counts()["images"] == 3 and made.facts["clips"] == 2
    assert max(item.volume for item in made.training) == 5 * 64 * 64


def test_batches_hold_one_length(folder, tmp_path):
    made, _, recipe, _ = prepared(folder, tmp_path, pieces="whole")
    plan = Plan(recipe=recipe, train=made.training, trainables={}, export=dict)
    seen = set()
    for (_, batch), _ in zip(plan.batches(0), range(12), strict=False):
        frames = {made.training[index].frames for index, _ in batch}
        assert len(frames) == 1
        assert torch.cat([sample.latent for sample in plan.samples(batch)]).ndim == 5
        seen.add((len(batch), *frames))
    assert seen == {(2, 5), (1, 5), (1, 1)}


def test_a_mask_is_a_still_for_all_frames(folder, tmp_path):
    made, *_ = prepared(folder, tmp_path)
    (long,) = (item for item in made.training if item.name == "long.mp4")
    sample = long.show(0)
    assert sample.weight.shape == (1, 1, 1, 4, 4)
    assert sample.weight[0, 0, 0, 0].tolist() == [0, 0, 1, 1]
    assert (sample.latent * sample.weight).shape == sample.latent.shape


def test_everything_varies_with_seed_and_visit_alone(folder, tmp_path):
    handling = Augmentation(flip=True, caption_dropout=0.5)

    def visits(seed):
        made, *_ = prepared(folder, tmp_path, handling, fields={"seed": seed}, pieces="random")
        return [[item.show(visit) for visit in range(12)] for item in made.training]

    first, again, other = visits(1), visits(1), visits(2)
    for shown, repeated in zip(first, again, strict=True):
        assert all(torch.equal(a.latent, b.latent) for a, b in zip(shown, repeated, strict=True))
    long = first[0]
    assert len({sample.latent.numpy().tobytes() for sample in long}) > 3
    assert any(not torch.equal(a.latent, b.latent) for a, b in zip(first[0], other[0], strict=True))


def test_validation_clips_are_held_out_and_do_not_vary(folder, tmp_path):
    split = {"validation_fraction": 0.34}
    made, *_ = prepared(folder, tmp_path, Augmentation(flip=True), fields=split, pieces="random")
    (item,) = made.validation
    assert item.name not in {other.name for other in made.training}
    assert torch.equal(item.show(None).latent, item.show(None).latent)


def test_a_second_run_encodes_nothing(folder, tmp_path):
    prepared(folder, tmp_path, pieces="whole")
    _, host, *_ = prepared(folder, tmp_path, pieces="whole")
    assert host.codec.calls == []


def test_a_job_trains_on_the_same_items_without_the_files(folder, tmp_path):
    made, _, _, dataset = prepared(folder, tmp_path, pieces="random")
    decoded = decode_dataset(dataset_as_json(dataset))
    assert decoded.fingerprint() == dataset.fingerprint()
    for path in folder.iterdir():
        path.unlink()
    again, *_ = prepared(folder, tmp_path, dataset=decoded)
    for one, other in zip(made.training, again.training, strict=True):
        assert torch.equal(one.show(3).latent, other.show(3).latent)


@pytest.mark.parametrize("why", ["codec", "hole"])
def test_models_of_stills_refuse_clips(folder, tmp_path, why, monkeypatch):
    host = replace(make_host(), codec=VideoCodec())
    if why == "codec":
        monkeypatch.setattr(VideoCodec, "snap_frames", lambda self, frames: 0)
    else:
        host.denoiser.conditioning_kind = HOLE
    with pytest.raises(DatasetError, match="The dataset has 2 clips, but this model"):
        prepared(folder, tmp_path, host=host)
