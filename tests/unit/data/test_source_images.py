"""Tests of source images: found by file name, cropped with their picture, fingerprinted, and shown in its corner."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
from graft_pack.trainers.data import scan
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.buckets import choose_crop
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.inspection import contact_sheet
from graft_pack.trainers.inspection.report import inspect, report
from graft_pack.trainers.preprocessing import crops, inpaint_masks
from graft_pack.trainers.preprocessing.pixels import cut, cut_unscaled
from graft_pack.trainers.protocols import Geometry
from PIL import Image


def draw(path, size=(64, 64), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def read(folder, control="", index=None):
    return scan_folder(str(folder), "", 0, 1, None, ScanOptions(control_folder=str(control)), index)


@pytest.fixture
def folder(tmp_path):
    """Create pictures at two depths, with their source images in an inner folder, some under bare file names."""
    root = tmp_path / "d"
    for name, source in (("a.png", "a.jpg"), ("sub/b.png", "sub/b.png"), ("sub/c.png", "c.png")):
        draw(root / name)
        draw(root / "before" / source, color="blue")
    return root


def test_each_picture_has_the_source_of_its_name(folder):
    dataset = read(folder, folder / "before")
    pairs = {one.source.name: one.control.source.name for one in dataset.examples}
    wanted = {"a.png": "a.jpg", "sub/b.png": "sub/b.png", "sub/c.png": "c.png"}
    assert pairs == {name: f"{source} (source)" for name, source in wanted.items()}
    assert dataset.left_out == ()
    assert dataset.examples[0].control.source.open().getpixel((0, 0))[2] > 200


def test_without_the_input_a_folder_inside_is_one_of_pictures(folder):
    """The behavior is the same as before the input existed."""
    dataset = read(folder)
    assert len(dataset.examples) == 6
    assert all(one.control is None for one in dataset.examples)


def test_a_folder_of_its_own_elsewhere(folder, tmp_path):
    (folder / "before").rename(tmp_path / "elsewhere")
    assert [one.control is not None for one in read(folder, tmp_path / "elsewhere").examples] == [True] * 3


def test_what_has_no_partner_is_named(folder, tmp_path):
    (folder / "before" / "a.jpg").unlink()
    draw(folder / "before" / "x.png")
    (folder / "before" / "c.png").write_bytes(b"no picture")
    found = {row.name: row.reason for row in read(folder, folder / "before").left_out}
    assert found["a.png"] == "it has no source picture of its name"
    assert found["x.png"] == "a source picture without the picture it becomes"
    assert found["sub/c.png"].startswith("its source picture c.png: The picture 'c.png' cannot be read")
    with pytest.raises(DatasetError, match="the dataset's own"):
        read(folder, folder)


def several(folder, *controls, optional=False):
    """Read a folder with source pictures in the folders of the given names inside it; empty for a folder not set."""
    first, *others = (str(folder / name) if name else "" for name in controls)
    options = ScanOptions(control_folder=first, more_control_folders=tuple(others), sources_optional=optional)
    return scan_folder(str(folder), "", 0, 1, None, options)


@pytest.fixture
def trios(folder):
    """Create the folder of pairs with a second source picture for two pictures, and a third one for one."""
    draw(folder / "second" / "a.png", color="green")
    draw(folder / "second" / "b.png", color="green")
    draw(folder / "third" / "sub" / "b.png", color="white")
    return folder


def test_a_picture_has_up_to_three_sources_in_the_order_of_their_folders(trios):
    dataset = several(trios, "before", "second", "third")
    sources = {one.source.name: [source.source.name for source in one.sources] for one in dataset.examples}
    assert sources == {
        "a.png": ["a.jpg (source)", "a.png (source 2)"],
        "sub/b.png": ["sub/b.png (source)", "b.png (source 2)", "sub/b.png (source 3)"],
        "sub/c.png": ["c.png (source)"],
    }
    assert dataset.left_out == ()
    assert several(trios, "before", "", "").fingerprint() != dataset.fingerprint()
    draw(trios / "third" / "sub" / "b.png", color="black")
    assert several(trios, "before", "second", "third").fingerprint() != dataset.fingerprint()


def test_one_folder_of_sources_gives_the_fingerprint_of_earlier_versions(folder):
    dataset = read(folder, folder / "before")
    rows = [
        [one.digest, ["" for _ in one.captions], "", 1, "", json.dumps(asdict(one.handling), sort_keys=True), False]
        + [["control", one.control.digest]]
        for one in dataset.examples
    ]
    assert several(folder, "before", "", "").fingerprint() == dataset.fingerprint()
    assert dataset.fingerprint() == hashlib.sha256(json.dumps([rows, 0]).encode()).hexdigest()


def test_pictures_without_a_source_train_alone_only_if_that_is_wanted(trios):
    (trios / "before" / "c.png").unlink()
    assert [one.source.name for one in several(trios, "before", "second", "third").examples] == ["a.png", "sub/b.png"]
    dataset = several(trios, "before", "second", "third", optional=True)
    assert [len(one.sources) for one in dataset.examples] == [2, 3, 0]


def test_a_later_source_without_an_earlier_one_is_named(trios):
    (trios / "before" / "a.jpg").unlink()
    dataset = several(trios, "before", "second", "third", optional=True)
    reasons = {row.name: row.reason for row in dataset.left_out}
    assert reasons == {"a.png": "it has no source picture in control_folder, but one in a later folder"}
    with pytest.raises(DatasetError, match="control_folder_2 is empty, but control_folder_3 is set") as caught:
        several(trios, "before", "", "third")
    assert caught.value.input == "control_folder_2"


def test_another_source_is_another_dataset(folder):
    prints = {read(folder).fingerprint(), read(folder, folder / "before").fingerprint()}
    before = scan.folder_fingerprint(str(folder), str(folder / "before"))
    draw(folder / "before" / "a.jpg", color="green")
    prints.add(read(folder, folder / "before").fingerprint())
    assert len(prints) == 3
    assert scan.folder_fingerprint(str(folder), str(folder / "before")) != before


@pytest.mark.parametrize("flip", [False, True])
def test_a_source_is_cut_as_its_picture_or_in_its_own_shape(flip):
    size = (200, 100)
    crop = choose_crop(size, Geometry(64, 16), "x")
    crop = crop.mirrored() if flip else crop
    picture = np.zeros((100, 200, 3), np.uint8)
    one = from_arrays([picture] * 3, ["x"], "", 0, source_images=[picture, picture[::2, ::2], picture[:, 50:150]])
    same, smaller, square = (example.control for example in one.examples)
    assert crops.source_crop(same, size, crop, 16) == crop
    assert crops.source_crop(smaller, size, crop, 16) == crop
    own = crops.source_crop(square, size, crop, 16)
    assert own.bucket[0] == own.bucket[1]
    assert own.flip == flip
    assert own.bucket[0] * own.bucket[1] <= crop.bucket[0] * crop.bucket[1] * 1.1


@pytest.mark.parametrize("flip", [False, True])
def test_a_cut_at_its_own_scale_shows_what_the_scaled_cut_shows(flip):
    pixels = np.random.RandomState(1).randint(0, 255, (100, 200, 3)).astype(np.uint8)
    crop = choose_crop((200, 100), Geometry(64, 16), "x")
    crop = crop.mirrored() if flip else crop
    own = cut_unscaled(Image.fromarray(pixels), crop)
    assert own.size[1] == 100 and own.size[0] / 200 == pytest.approx(crop.bucket[0] / crop.scaled[0], abs=0.01)
    shown = np.asarray(own.resize(crop.bucket, Image.LANCZOS), np.float32)
    assert np.abs(shown - np.asarray(cut(Image.fromarray(pixels), crop), np.float32)).mean() < 10


def test_as_many_source_pictures_as_pictures():
    picture = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(DatasetError, match="1 source pictures arrived for 2 pictures"):
        from_arrays([picture] * 2, ["x"], "", 0, source_images=[picture])


def test_the_sheet_shows_the_source_in_the_corner():
    white, blue = np.full((128, 128, 3), 255, np.uint8), np.zeros((128, 64, 3), np.uint8)
    blue[..., 2] = 255
    findings = inspect(from_arrays([white], ["x"], "", 0, source_images=[blue]), {0: Geometry(128, 16)}, None)
    assert findings.rows[0].flags == ["source of another shape"]
    assert "1 of 1 with a source picture" in report(findings)
    picture = np.round(contact_sheet.contact_sheet(findings) * 255).astype(np.uint8)
    head = picture.shape[0] - contact_sheet._CELL - contact_sheet._TEXT
    assert tuple(picture[head + contact_sheet._CELL - 20, 12]) == (0, 0, 255)
    assert tuple(picture[head + contact_sheet._CELL - 20, contact_sheet._CELL - 40]) == (255, 255, 255)


def test_holes_are_of_four_kinds_and_always_the_same():
    shares = []
    for number in range(4):
        drawn = [np.asarray(inpaint_masks.random_inpaint_mask((96, 64), f"seed {seed}", number)) for seed in range(20)]
        again = np.asarray(inpaint_masks.random_inpaint_mask((96, 64), "seed 3", number))
        assert np.array_equal(drawn[3], again)
        assert all(set(np.unique(one)) <= {0, 255} for one in drawn)
        shares.append([float((one > 0).mean()) for one in drawn])
    assert set(shares[3]) == {1.0}
    for drawn in shares[:3]:
        assert min(drawn) > 0.01
        assert max(drawn) <= 1.0
        assert len(set(drawn)) > 15
