"""Tests of pairs of a better and a worse picture: matched by name, cropped alike, encoded, fingerprinted, reported."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.engine.job_json import dataset_as_json, decode_dataset
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.inspection import contact_sheet
from graft_pack.trainers.inspection.report import inspect, report, warnings
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import Geometry
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps.step import crop_sample
from PIL import Image

from tests.support import models
from tests.support.diffusers_host import PosteriorCodec, TinyCodec, make_host


def grain(number, size=(64, 64)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


def save(path, number, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grain(number, size)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Create four pairs, one of them for validation and one wide, with the worse pictures in an inner folder."""
    root = tmp_path / "d"
    for number, (name, size) in enumerate({"a": (64, 64), "b": (64, 64), "wide": (96, 48), "val/c": (64, 64)}.items()):
        save(root / f"{name}.png", number, size)
        (root / f"{name}.txt").write_text("a thing")
        save(root / "worse" / f"{name}.png", 10 + number, size)
    return root


def read(folder, handling=None, **options):
    reading = ScanOptions(**{"worse_folder": str(folder / "worse"), "validation_folder": "val", **options})
    return scan_folder(str(folder), "", 64, 1, handling, reading)


def prepared(folder, dataset, codec=None):
    host = replace(make_host(), codec=codec or PosteriorCodec(5))
    recipe = models.recipe("SD1", batch_size=1, steps=20, resolution=64, preference_beta=1.0)
    return prepare(dataset, recipe, host, Folders("", str(folder / "cache"), "", "")), host


def test_each_picture_has_the_worse_picture_of_its_name(folder):
    dataset = read(folder)
    pairs = {one.source.name: one.paired.source.name for one in dataset.examples}
    assert pairs == {name: f"{name} (worse)" for name in ("a.png", "b.png", "val/c.png", "wide.png")}
    assert [one.source.name for one in dataset.examples if one.held_out] == ["val/c.png"]
    assert dataset.left_out == ()
    by_name = {one.source.name: one for one in dataset.examples}
    assert np.array_equal(np.asarray(by_name["b.png"].paired.source.open()), grain(11))


def test_pictures_without_their_pair_are_named(folder):
    (folder / "worse" / "a.png").unlink()
    save(folder / "worse" / "x.png", 1)
    save(folder / "worse" / "wide.png", 2, (64, 64))
    (folder / "worse" / "b.png").write_bytes(b"no picture")
    reasons = {row.name: row.reason for row in read(folder, validation_folder="").left_out}
    assert reasons["a.png"] == "it has no worse picture of its name"
    assert reasons["x.png"] == "a worse picture without the better one"
    assert reasons["wide.png"] == "its worse picture wide.png (worse) has another shape, 64x64, not 96x48"
    assert reasons["b.png"].startswith("its worse picture b.png: The picture 'b.png' cannot be read")
    with pytest.raises(DatasetError, match="The folder of worse pictures is the dataset's own"):
        read(folder, worse_folder=str(folder))


def test_the_worse_picture_decides_the_fingerprint(folder):
    before = read(folder).fingerprint()
    assert read(folder, worse_folder="").fingerprint() != before
    save(folder / "worse" / "a.png", 99)
    assert read(folder).fingerprint() != before


def test_the_report_counts_the_pairs(folder):
    dataset = read(folder)
    findings = inspect(dataset, {0: Geometry(64, 8)}, None)
    assert "4 of 4 with a worse picture, drawn small in the corner." in report(findings)
    alone = replace(dataset, examples=tuple(replace(one, paired=None) for one in dataset.examples))
    plain = inspect(alone, {0: Geometry(64, 8)}, None)
    assert "worse" not in report(plain)
    cells = [contact_sheet.contact_sheet(part)[-300:] for part in (findings, plain)]
    assert not np.array_equal(*cells)


def test_an_enlarged_worse_picture_is_told(folder, caplog):
    """Training does so in the log, and Inspect in its report and its warnings."""
    before = inspect(read(folder), {0: Geometry(64, 8)}, None)
    assert "enlarged" not in report(before)
    save(folder / "worse" / "a.png", 5, (40, 40))
    findings = inspect(read(folder), {0: Geometry(64, 8)}, None)
    assert "1 with an enlarged worse picture: a.png" in report(findings)
    assert [row.example.source.name for row in findings.rows if "enlarged" in row.flags] == ["a.png"]
    said = "Enlarged pictures, the smallest from 40 to 64 pixels: a.png (worse)."
    assert said in [row["text"] for row in warnings(findings, "SD1")]
    prepared(folder, read(folder))
    assert said in caplog.text


def test_both_pictures_get_the_same_crop_and_flip(folder):
    """Equal pictures give equal latents at each visit if the codec draws nothing, mirrored or not."""
    for name in ("a", "b", "wide", "val/c"):
        (folder / "worse" / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes())
    dataset = read(folder, Augmentation(flip=True))
    made, _ = prepared(folder, dataset, TinyCodec())
    shapes = set()
    for item in [*made.training, *made.validation]:
        visits = [item.show(visit) for visit in (None, *range(12))]
        assert all(torch.equal(visit.paired, visit.latent) for visit in visits)
        latents = {visit.latent.numpy().tobytes() for visit in visits}
        assert len(latents) == 2
        shapes.add(tuple(visits[0].paired.shape))
    assert len(shapes) == 2
    made, _ = prepared(folder, dataset)
    assert all(torch.equal(item.show(None).paired, item.show(None).latent) for item in made.validation)
    assert all(not torch.equal(item.show(0).paired, item.show(0).latent) for item in made.training)


def test_the_worse_latent_is_scaled_and_cached(folder, monkeypatch):
    monkeypatch.setattr(type(make_host().denoiser), "scale_latents", lambda self, latents: 3 * latents - 1)
    made, host = prepared(folder, read(folder))
    item = next(item for item in made.validation if item.name == "val/c.png")
    pixels = torch.from_numpy(grain(13)).float()[None] / 255.0
    wanted = 3 * host.codec.encode(pixels)[0] - 1
    assert models.distance(item.show(None).paired, wanted) <= 1e-6
    assert made.facts["pairs"] == 4
    again, _ = prepared(folder, read(folder))
    assert torch.equal(again.training[0].show(3).paired, made.training[0].show(3).paired)


def test_an_unreadable_worse_picture_leaves_its_pair_out(folder):
    dataset = read(folder)
    whole = (folder / "worse" / "a.png").read_bytes()
    (folder / "worse" / "a.png").write_bytes(whole[: len(whole) // 2])
    made, _ = prepared(folder, dataset)
    assert [row.name for row in made.left_out] == ["a.png (worse)"]
    assert {item.name for item in made.training} == {"b.png", "wide.png"}


def test_a_job_holds_the_pairs(folder):
    dataset = read(folder)
    again = decode_dataset(dataset_as_json(dataset))
    assert again.fingerprint() == dataset.fingerprint()
    assert [one.paired.source.name for one in again.examples] == [one.paired.source.name for one in dataset.examples]


def test_a_cropped_sample_keeps_its_pair(folder):
    made, _ = prepared(folder, read(folder))
    sample = crop_sample(made.training[0].show(0), 0.5)
    assert sample.paired.shape == sample.latent.shape


def test_pairs_from_the_graph_have_equal_counts_and_shapes():
    pictures = [grain(1), grain(2)]
    dataset = from_arrays(pictures, ["x"], "", 64, worse_images=[grain(3), grain(4)])
    assert [one.paired.source.name for one in dataset.examples] == ["worse image 1", "worse image 2"]
    assert dataset.fingerprint() != from_arrays(pictures, ["x"], "", 64).fingerprint()
    with pytest.raises(DatasetError, match="1 worse pictures arrived for 2 pictures"):
        from_arrays(pictures, ["x"], "", 64, worse_images=[grain(3)])
    with pytest.raises(DatasetError, match="worse image 2 has another shape, 64x32, not 64x64"):
        from_arrays(pictures, ["x"], "", 64, worse_images=[grain(3), grain(4, (64, 32))])
