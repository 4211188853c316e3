"""Tests of the dataset report that precedes training."""

import numpy as np
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.inspection.report import common_tags, inspect, report
from graft_pack.trainers.protocols import Geometry
from PIL import Image

GEOMETRIES = {0: Geometry(128, 16), 256: Geometry(256, 16)}


def grain(number, size=(128, 128)):
    return np.random.RandomState(number).randint(0, 255, (size[1], size[0], 3)).astype(np.uint8)


def look(dataset, tokens=lambda text: len(text.split()), **more):
    return inspect(dataset, GEOMETRIES, tokens, **more)


def flags(findings):
    return {row.example.source.name: row.flags for row in findings.rows}


def test_each_thing_to_look_after_is_flagged_and_reported():
    pictures = [grain(0), grain(1, (600, 80)), grain(2, (60, 60)), grain(3), grain(4)]
    texts = ["sks, a, b", "sks, a", "[trigger], b", "a " * 80, ""]
    masks = [np.full((128, 128), 255, np.uint8)] * 5
    findings = look(from_arrays(pictures, texts, "sks", 0, masks))
    found = flags(findings)
    assert found["image 1"] == found["image 5"] == []
    (loses,) = [flag for flag in found["image 2"] if flag.startswith("loses")]
    assert loses == f"loses {1 - findings.rows[1].kept:.0%}"
    assert found["image 3"] == ["small"]
    assert found["image 4"] == ["81 tokens"], "the trigger counts"
    said = report(findings, 5_000_000)
    for words in (
        "5 pictures, 5 in an epoch",
        "1 cropped by more than a fifth: image 2 (loses",
        "1 smaller than their bucket's usual size: image 3",
        "1 with a caption of more than 75 tokens (encoded in parts, not cut): image 4 (81)",
        "1 with a caption without the trigger (Graft puts it in front): image 4",
        "1 without a caption of their own: image 5",
        "5 with a mask",
        "Most frequent of 5 tags: sks (2), a (2), b (2)\n",
        "take 5 MB",
    ):
        assert words in said, (words, said)


def test_a_small_cache_is_less_than_a_megabyte():
    findings = look(from_arrays([grain(0)], [""], "", 0))
    assert "take less than 1 MB;" in report(findings, 300_000)


def test_the_report_counts_what_an_epoch_shows(tmp_path):
    for name in ("3_sks dog/a.png", "b.png", "check/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(grain(len(name), (256, 256))).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no")
    ways = Augmentation(resolutions=(256,), flip=True, caption_dropout=0.1)
    dataset = scan_folder(str(tmp_path), "sks", 0, 1, ways, ScanOptions(validation_folder="check"))
    said = report(look(dataset))
    assert "3 pictures, 8 in an epoch, 1 held out for validation" in said, "4 showings at each of two resolutions"
    assert "bucket 128x128: 3" in said
    assert "bucket 256x256: 3" in said
    assert "Repeats: 1 (pictures: 2), 3 (pictures: 1)" in said
    assert "1 left out: broken.png: cannot be read" in said
    assert "Varied: 10% of captions dropped, half mirrored, also at 256." in said


def test_a_copy_is_flagged_and_named():
    findings = look(from_arrays([grain(0), grain(1), grain(0)], ["x"], "", 0))
    assert flags(findings) == {"image 1": [], "image 2": [], "image 3": ["like image 1"]}
    assert "1 look like another picture: image 3 like image 1" in report(findings)


def test_tags_are_those_that_come_again_in_a_stable_order():
    pictures = [grain(number) for number in range(3)]
    tagged = look(from_arrays(pictures, ["d, c, b, a, d", "a, b, c, d", "e"], "", 0))
    assert common_tags(tagged, 3) == [("d", 2), ("c", 2), ("b", 2)]
    prose = look(from_arrays(pictures, ["one dog", "two dogs", "a red dog, at sea"], "", 0))
    assert common_tags(prose, 3) == []
    assert "tags" not in report(prose)


def test_the_loss_of_a_run_is_reported_by_picture():
    dataset = from_arrays([grain(number) for number in range(4)], ["a"] * 4, "sks", 0)
    losses = {
        "image 2": (2.5, "hardest"),
        "image 1": (1.0, ""),
        "image 3": (0.4, "memorized"),
        "other": (9.0, "hardest"),
    }
    findings = look(dataset, losses=losses)
    assert [row.loss for row in findings.rows] == [1.0, 2.5, 0.4, None]
    assert flags(findings) == {"image 1": [], "image 2": ["hardest"], "image 3": ["memorized"], "image 4": []}
    said = report(findings)
    assert "Loss of 3 pictures at equal noise, 1 for the median picture: 0.40 to 2.50." in said
    assert "1 hardest (a loss that stays high means a wrong caption or an odd picture): image 2 (2.50)" in said
    assert "1 memorized (a loss far below the others means learned by heart: lower its repeats): image 3 (0.40)" in said
    assert "at equal noise" not in report(look(dataset))
