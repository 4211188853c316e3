"""Captions: files, triggers, and what happens to them on the way."""

import pytest
from graft_pack.trainers.data.captions import caption_file, read_caption
from graft_pack.trainers.data.examples import Dataset, combine, with_trigger
from graft_pack.trainers.data.scan import check_captions, scan_folder
from graft_pack.trainers.errors import DatasetError
from PIL import Image


@pytest.mark.parametrize(
    "caption, trigger, expected",
    [
        ("a cat", "sks", "sks, a cat"),
        ("", "sks", "sks"),
        ("a cat", "", "a cat"),
        ("", "", ""),
        ("a sks cat", "sks", "a sks cat"),
        ("a SKS cat", "sks", "a SKS cat"),
        ("many skss", "sks", "sks, many skss"),
        ("a big red toy", "big red", "a big red toy"),
        ("photo of [trigger], smiling", "sks", "photo of sks, smiling"),
        ("photo of [trigger]", "", "photo of"),
        ("c++ (lang)", "c++", "c++ (lang)"),
    ],
)
def test_the_trigger_is_put_in_front_of_what_lacks_it(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


@pytest.fixture
def folder(tmp_path):
    """Three pictures: with .txt, with .caption in a subfolder, with none."""
    (tmp_path / "sub").mkdir()
    for name, size in (("a.png", (20, 30)), ("sub/b.jpg", (40, 10)), ("c.webp", (16, 16))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    (tmp_path / "a.txt").write_text("\ufeffa  red\n picture \n", encoding="utf-8")
    (tmp_path / "sub" / "b.caption").write_text("caf\u00e9", encoding="utf-8")
    return tmp_path


def test_a_folder_is_read_in_a_stable_order(folder):
    dataset = scan_folder(str(folder), " sks ", 64, 2)
    assert [example.source.name for example in dataset.examples] == ["a.png", "c.webp", "sub/b.jpg"]
    assert [example.caption for example in dataset.examples] == ["a red picture", "", "caf\u00e9"]
    assert [example.size for example in dataset.examples] == [(20, 30), (16, 16), (40, 10)]
    assert {example.repeats for example in dataset.examples} == {2}
    assert dataset.trigger == "sks"


def test_txt_comes_before_caption(folder):
    (folder / "a.caption").write_text("other")
    assert caption_file(str(folder / "a.png")).endswith("a.txt")


def test_another_encoding_is_refused_by_name(folder):
    (folder / "a.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"'a\.txt'.*UTF-8"):
        scan_folder(str(folder), "", 0, 1)


def test_a_caption_that_cannot_be_read_is_refused_by_name(folder):
    (folder / "a.txt").unlink()
    (folder / "a.txt").mkdir()
    with pytest.raises(DatasetError, match="cannot be read"):
        read_caption(str(folder / "a.txt"), "a.txt")


def test_neither_caption_nor_trigger_is_refused_by_name(folder):
    with pytest.raises(DatasetError, match=r"1 of 3 pictures.*c\.webp"):
        check_captions(scan_folder(str(folder), "", 0, 1))
    check_captions(scan_folder(str(folder), "sks", 0, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text("another"),
        lambda folder: Image.new("RGB", (20, 30), "blue").save(folder / "a.png"),
        lambda folder: (folder / "c.webp").unlink(),
        lambda folder: (folder / "c.txt").write_text("now with one"),
    ],
    ids=["caption edited", "picture edited", "picture removed", "caption added"],
)
def test_the_fingerprint_follows_what_is_learnt(folder, change):
    before = scan_folder(str(folder), "sks", 64, 1).fingerprint()
    assert scan_folder(str(folder), "sks", 64, 1).fingerprint() == before
    change(folder)
    assert scan_folder(str(folder), "sks", 64, 1).fingerprint() != before


@pytest.mark.parametrize("trigger, resolution, repeats", [("other", 64, 1), ("sks", 128, 1), ("sks", 64, 2)])
def test_the_fingerprint_follows_the_widgets(folder, trigger, resolution, repeats):
    before = scan_folder(str(folder), "sks", 64, 1).fingerprint()
    assert scan_folder(str(folder), trigger, resolution, repeats).fingerprint() != before


def test_combined_datasets_keep_their_triggers(folder):
    both = combine(scan_folder(str(folder), "one", 64, 1), scan_folder(str(folder), "two", 0, 3))
    captions = [both.caption(example) for example in both.examples]
    assert captions[0] == "one, a red picture"
    assert captions[3] == "two, a red picture"
    assert (both.resolution, both.trigger) == (64, "")
    with pytest.raises(DatasetError, match="different resolutions"):
        combine(both, Dataset(both.examples, "", 128, "x"))
