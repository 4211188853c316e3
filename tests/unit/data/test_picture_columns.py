"""Tests of metadata tables that name a picture's source pictures, and the worse picture of a pair."""

import csv
import json

import numpy as np
import pytest
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError
from PIL import Image


def save(path, number, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(number).randint(0, 255, (*size[::-1], 3)).astype(np.uint8)).save(path)


def scan(folder, **options):
    return scan_folder(str(folder), "", 64, 1, None, ScanOptions(**options))


def write(folder, *rows):
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def folder(tmp_path):
    """Create two pictures, and four others in the same folder and an inner one."""
    for number, name in enumerate(("a.png", "b.png", "a-worse.png", "poor/1.png", "old.png", "older.png")):
        save(tmp_path / name, number)
    return tmp_path


ROWS = (
    {"file_name": "a.png", "text": "a dog", "worse_file_name": "a-worse.png"},
    {"file_name": "b.png", "text": "a cat", "Worse_File_Name ": "poor\\1.png"},
)


def test_a_column_names_the_worse_pictures(folder, tmp_path_factory):
    write(folder, *ROWS)
    for name in ("old.png", "older.png"):
        (folder / name).unlink()
    dataset = scan(folder)
    pairs = {one.source.name: (one.captions, one.paired.source.name) for one in dataset.examples}
    assert pairs == {"a.png": (("a dog",), "a-worse.png (worse)"), "b.png": (("a cat",), "poor/1.png (worse)")}
    assert dataset.left_out == ()
    other = tmp_path_factory.mktemp("other")
    for number, name in enumerate(("a.png", "b.png", "worse/a.png", "worse/b.png")):
        save(other / name, number)
    write(other, *({key: row[key] for key in ("file_name", "text")} for row in ROWS))
    assert scan(other, worse_folder=str(other / "worse")).fingerprint() == dataset.fingerprint()


def test_columns_name_up_to_three_source_pictures(folder):
    sources = {"control_file_name": "old.png", "control_file_name_2": "older.png", "control_file_name_3": "a-worse.png"}
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["file_name", *sources])
        table.writeheader()
        table.writerows([{"file_name": "a.png", **sources}, {"file_name": "b.png", "control_file_name": "poor/1.png"}])
    dataset = scan(folder)
    names = {one.source.name: [source.source.name for source in one.sources] for one in dataset.examples}
    assert names == {
        "a.png": ["old.png (source)", "older.png (source 2)", "a-worse.png (source 3)"],
        "b.png": ["poor/1.png (source)"],
    }
    assert dataset.left_out == ()
    (folder / "metadata.csv").unlink()
    write(folder, {"file_name": "a.png", "control_file_name_2": "old.png"})
    with pytest.raises(DatasetError, match="control_folder is empty, but control_folder_2 is set"):
        scan(folder)


def test_pictures_whose_row_is_wrong_are_named(folder):
    save(folder / "wide.png", 7, (96, 48))
    (folder / "old.png").write_bytes(b"no picture")
    rows = (
        {"file_name": "a.png", "worse_file_name": "../a-worse.png"},
        {"file_name": "b.png", "worse_file_name": "old.png"},
        {"file_name": "older.png", "worse_file_name": "wide.png"},
        {"file_name": "a-worse.png", "worse_file_name": 3},
    )
    write(folder, *rows)
    with pytest.raises(DatasetError, match="holds no picture to train on"):
        scan(folder)
    write(folder, *rows, {"file_name": "poor/1.png", "worse_file_name": "a-worse.png"})
    reasons = {row.name: row.reason for row in scan(folder).left_out}
    assert reasons.pop("b.png").startswith("its worse picture old.png: The picture 'old.png' cannot be read")
    assert reasons == {
        "a.png": "its worse_file_name in metadata.jsonl, '../a-worse.png', is no picture of the folder",
        "older.png": "its worse picture wide.png (worse) has another shape, 96x48, not 64x64",
    }


def test_a_picture_without_a_row_is_left_out(folder):
    write(folder, ROWS[0], {"file_name": "a-worse.png", "text": "of a pair"})
    dataset = scan(folder)
    assert [one.source.name for one in dataset.examples] == ["a.png"]
    assert {row.reason for row in dataset.left_out} == {"its row has no worse_file_name"}
    assert {row.name for row in dataset.left_out} == {"b.png", "old.png", "older.png", "poor/1.png"}


def test_a_worse_picture_may_be_better_than_another(folder):
    write(folder, ROWS[0], {"file_name": "a-worse.png", "text": "a dog", "worse_file_name": "old.png"})
    pairs = {one.source.name: one.paired.source.name for one in scan(folder).examples}
    assert pairs == {"a.png": "a-worse.png (worse)", "a-worse.png": "old.png (worse)"}


def test_a_folder_takes_the_place_of_the_column(folder):
    write(folder, *ROWS)
    save(folder / "worse" / "a.png", 9)
    found = scan(folder, worse_folder=str(folder / "worse")).examples
    assert {one.source.name: one.paired.source.name for one in found} == {"a.png": "a.png (worse)"}


def test_other_columns_and_damaged_tables_change_nothing(folder):
    before = scan(folder)
    write(folder, {"file_name": "a.png", "mask_file_name": "old.png", "worse_file_name": None})
    assert scan(folder).fingerprint() == before.fingerprint()
    (folder / "metadata.jsonl").write_text('{"worse_file_name": 1')
    dataset = scan(folder)
    assert dataset.fingerprint() == before.fingerprint()
    assert [row.name for row in dataset.left_out] == ["metadata.jsonl"]
