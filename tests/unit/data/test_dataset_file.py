"""Tests of the user's choices about a dataset's pictures: exclusion, repeats by folder, centers of crops."""

import json

import pytest
from graft_pack.trainers.data import dataset_file
from graft_pack.trainers.data.buckets import choose_crops
from graft_pack.trainers.data.dataset_file import DatasetFile
from graft_pack.trainers.data.scan import ScanOptions, folder_fingerprint, scan_folder
from graft_pack.trainers.engine.job_json import dataset_as_json, decode_dataset
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.inspection.dataset_warnings import warn_of_skipped
from graft_pack.trainers.preprocessing.crops import crop_examples
from graft_pack.trainers.protocols import Geometry
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "10_dog/c.png", "10_dog/deep/d.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((96, 64), 40 + len(name)).convert("RGB").save(path)
    return tmp_path


def choose(folder, **choices):
    (folder / dataset_file.NAME).write_bytes(dataset_file.encode(DatasetFile(**choices)))


def scan(folder, **options):
    return scan_folder(str(folder), "sks", 64, 1, None, ScanOptions(**options))


def names(dataset):
    return [example.source.name for example in dataset.examples]


def test_excluded_pictures_are_not_trained_on(folder):
    before = scan(folder)
    choose(folder, excluded=frozenset({"b.png", "gone.png"}))
    dataset = scan(folder)
    assert names(dataset) == ["a.png", "10_dog/c.png", "10_dog/deep/d.png"]
    assert [str(row) for row in dataset.left_out] == [f"b.png: {dataset_file.EXCLUDED}"]
    assert dataset.fingerprint() != before.fingerprint()
    assert names(scan(folder, with_excluded=True)) == names(before)
    assert warn_of_skipped(dataset.left_out, 4) is None


def test_without_choices_the_dataset_is_as_before(folder):
    before = scan(folder)
    choose(folder)
    assert scan(folder).fingerprint() == before.fingerprint()


def test_repeats_of_a_folder_replace_the_number_in_its_name(folder):
    assert [example.repeats for example in scan(folder).examples] == [1, 1, 10, 10]
    choose(folder, repeats={"": 2, "10_dog": 3})
    dataset = scan(folder)
    assert [example.repeats for example in dataset.examples] == [2, 2, 3, 3]
    # The rest of the folder's name stays the caption.
    assert dataset.examples[2].captions == ("dog",)
    choose(folder, repeats={"10_dog/deep": 5})
    assert [example.repeats for example in scan(folder).examples] == [1, 1, 10, 5]


@pytest.mark.parametrize(
    ("center", "left"), [((0.5, 0.5), 16), ((0.0, 0.5), 0), ((1.0, 1.0), 32), ((0.4, 0.0), 6), (None, 16)]
)
def test_a_crop_lies_around_its_center(center, left):
    (crop,) = choose_crops((96, 64), [Geometry(64, 64)], "a.png", False, center)
    assert (crop.scaled, crop.bucket, crop.offset) == ((96, 64), (64, 64), (left, 0))
    assert crop.mirrored().offset == (32 - left, 0)


def test_centers_reach_the_crops_and_decide_the_identity(folder):
    before = scan(folder)
    choose(folder, centers={"a.png": (0.0, 0.5)})
    dataset = scan(folder)
    cropped, _ = crop_examples(dataset, {0: Geometry(64, 64)})
    assert [row.crops[0].offset for row in cropped] == [(0, 0), (16, 0), (16, 0), (16, 0)]
    assert dataset.fingerprint() != before.fingerprint()
    assert decode_dataset(json.loads(json.dumps(dataset_as_json(dataset)))).fingerprint() == dataset.fingerprint()


def test_a_change_of_the_file_is_noticed(folder):
    before = folder_fingerprint(str(folder))
    choose(folder, excluded=frozenset({"b.png"}))
    assert folder_fingerprint(str(folder)) != before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"excluded": "a.png"}',
        b'{"excluded": [1]}',
        b'{"centers": {"a.png": [0.5]}}',
        b'{"centers": {"a.png": [0.5, 1.5]}}',
        b'{"centers": {"a.png": [NaN, 0.5]}}',
        b'{"repeats": {"": -1}}',
        b'{"repeats": {"": 1e30}}',
        b"[" * 100_000,
        b'{"excluded": ["\xff"]}',
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(folder, content):
    (folder / dataset_file.NAME).write_bytes(content)
    with pytest.raises(DatasetError, match=dataset_file.NAME):
        scan(folder)
