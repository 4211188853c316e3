"""Tests of captions that are written beside a dataset's pictures, and of the pictures given to a captioner."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from graft_pack.trainers.curation.captioning import decode_pictures, read_captions, save_captions
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.examples import combine
from graft_pack.trainers.data.prior import add_class_images
from graft_pack.trainers.data.scan import ScanOptions, folder_fingerprint, scan_folder
from graft_pack.trainers.errors import DatasetError, RunError
from graft_pack.trainers.formats import atomic
from PIL import Image


def read(folder, **options):
    return scan_folder(str(folder), "", 0, 1, None, ScanOptions(**options))


def files_of(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.suffix != ".png"
        if path.is_file()
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Create pictures in the scanner's order a, b, sub/c; a has a text, sub/c a JSON file."""
    for number, name in enumerate(("a", "b", "sub/c")):
        path = tmp_path / "d" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8 + number, 8), (50 * number, 0, 0)).save(path)
    (tmp_path / "d" / "a.txt").write_text("old a\n")
    (tmp_path / "d" / "sub" / "c.json").write_text('{"caption": "old c"}')
    return tmp_path / "d"


@pytest.mark.parametrize(
    "values, pictures, captions",
    [
        (["a", "b"], 2, [("a",), ("b",)]),
        ([["a", "b"]], 2, [("a",), ("b",)]),
        ([["a"], ["b"]], 2, [("a",), ("b",)]),
        ([("a", "b"), "c"], 3, [("a",), ("b",), ("c",)]),
        ([["a", "b"], ["c", "d"]], 4, [("a",), ("b",), ("c",), ("d",)]),
        ([["a", "b"], ["c", "d"]], 2, [("a", "b"), ("c", "d")]),
        ([["a", " ", "b"]], 1, [("a", "b")]),
        ([" a\n b ", ""], 2, [("a b",), ()]),
        (["one for all"], 3, [("one for all",)]),
    ],
)
def test_captioners_give_texts_or_lists_by_picture_or_by_batch(values, pictures, captions):
    assert read_captions(values, pictures) == captions


@pytest.mark.parametrize(
    "value, words",
    [
        ("a\0b", "Caption 2 cannot be saved: A caption contains NUL"),
        ("\ud800", "Caption 2 cannot be saved: .*half of a character"),
        ("a" * 20_000, "Caption 2 cannot be saved: A caption has 20000 characters. Shorten it to at most 10000"),
        (None, "Caption 2 is of type NoneType, not a text. Connect the text output of a captioner"),
        ([5], "Caption 2 is of type int, not a text"),
    ],
)
def test_an_unusable_caption_is_named_before_anything_is_written(folder, value, words):
    before = folder_fingerprint(str(folder))
    with pytest.raises(DatasetError, match=words) as caught:
        save_captions(read(folder), ["new a", value, "new c"])
    assert caught.value.input == "captions"
    assert folder_fingerprint(str(folder)) == before


def test_captions_replace_the_texts_and_the_first_ones_stay(folder):
    ticks = []
    texts = ["first a", "first  b\n", "first c"]
    dataset, written = save_captions(read(folder), texts, lambda done, total: ticks.append((done, total)))
    assert written == 3 and ticks == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert dataset.fingerprint() == read(folder).fingerprint()
    assert [example.captions for example in dataset.examples] == [("first a",), ("first b",), ("first c",)]
    save_captions(read(folder), ["second a", "second b", "second c"])
    assert files_of(folder) == {
        "a.txt": "second a",
        "a.txt.bak": "old a\n",
        "b.txt": "second b",
        "b.txt.bak": "first b",
        "sub/c.txt": "second c",
        "sub/c.txt.bak": "first c",
        "sub/c.json": '{"caption": "old c"}',
    }
    assert read(folder).left_out == ()


def test_equal_and_empty_captions_change_nothing(folder):
    before = folder_fingerprint(str(folder))
    dataset, written = save_captions(read(folder), ["old a", "", "old c"])
    assert written == 0
    assert folder_fingerprint(str(folder)) == before
    assert dataset.fingerprint() == read(folder).fingerprint()


def test_several_captions_of_a_picture_are_the_lines_of_its_file(folder):
    dataset, _ = save_captions(read(folder), [["one", "two"], ["b"], ["c"]])
    assert (folder / "a.txt").read_text() == "one\ntwo"
    assert dataset.fingerprint() == read(folder, lines_are_variants=True).fingerprint()


@pytest.mark.parametrize("values", [[], ["one for all"], ["a", "b"], ["a", "b", "c", "d"], [["a", "b"], "c", "d", "e"]])
def test_a_wrong_number_of_captions_names_both_and_writes_nothing(folder, values):
    before = folder_fingerprint(str(folder))
    count = sum(len(value) if isinstance(value, list) else 1 for value in values)
    with pytest.raises(DatasetError, match=rf"^{count} captions? arrived for 3 pictures of 'd'") as caught:
        save_captions(read(folder), values)
    assert caught.value.input == "captions"
    assert folder_fingerprint(str(folder)) == before


@pytest.mark.parametrize("at", range(5))
def test_an_interruption_leaves_old_or_new_texts_and_no_backup_is_lost(folder, monkeypatch, at):
    (folder / "b.txt").write_text("old b")
    replace, calls = os.replace, itertools.count()

    def die(source, target):
        if next(calls) == at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(atomic.os, "replace", die)
        with pytest.raises(RunError, match="No space left.*Free space"):
            save_captions(read(folder), ["new a", "new b", "new c"])
    found = files_of(folder)
    assert {found["a.txt"], found["b.txt"]} <= {"old a\n", "old b", "new a", "new b"}
    save_captions(read(folder), ["new a", "new b", "new c"])
    texts = {name: text for name, text in files_of(folder).items() if ".txt" in name}
    assert texts.pop("a.txt.bak") == "old a\n" and texts.pop("b.txt.bak") == "old b"
    assert texts == {"a.txt": "new a", "b.txt": "new b", "sub/c.txt": "new c"}


def test_links_are_not_written_through(folder, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    (folder / "b.txt").symlink_to(outside)
    dataset = read(folder)
    with pytest.raises(RunError, match="b.txt' is a link.*Replace it with a file"):
        save_captions(dataset, ["a", "b", "c"])
    (folder / "b.txt").unlink()
    (folder / "sub").rename(tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="sub' is a link"):
        save_captions(dataset, ["a", "b", "c"])
    assert outside.read_text() == "theirs"
    assert (folder / "a.txt").read_text() == "old a\n"


def test_pictures_without_a_caption_file_of_their_own_are_refused(folder):
    wired = from_arrays([np.zeros((8, 8, 3), np.uint8)], ["x"], "", 0)
    classes = add_class_images(read(folder / "sub"), read(folder / "sub"), 1.0)
    gone = read(folder)
    (folder / "b.png").rename(folder / "moved.jpg")
    with pytest.raises(DatasetError, match="'b.png' was removed after Graft read"):
        save_captions(gone, ["x"] * len(gone.examples))
    (folder / "moved.jpg").rename(folder / "A.jpg")
    for dataset, words in (
        (wired, "'image 1' is no file in the dataset's folder"),
        (classes, "is no file in the dataset's folder"),
        (read(folder), "'a.txt' is the caption of 'a.png' and of another picture"),
        (combine(read(folder / "sub"), read(folder / "sub")), "the same caption file 'c.txt'"),
    ):
        with pytest.raises(DatasetError, match=words) as caught:
            save_captions(dataset, ["x"] * len(dataset.examples))
        assert caught.value.input == "dataset"
    assert (folder / "a.txt").read_text() == "old a\n"


def test_pictures_come_in_the_order_in_which_captions_are_saved(folder):
    pictures, dataset = decode_pictures(read(folder))
    assert [array.shape for array in pictures] == [(8, 8, 3), (8, 9, 3), (8, 10, 3)]
    save_captions(dataset, [f"{array.shape[1]} wide" for array in pictures])
    assert [example.captions for example in read(folder).examples] == [("8 wide",), ("9 wide",), ("10 wide",)]


def test_captioning_goes_on_with_the_pictures_that_have_no_caption(folder):
    """A few at a time, until none is left; a damaged picture is left out and named."""
    (folder / "a.txt").unlink()
    (folder / "sub" / "c.json").unlink()
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:45])
    ticks = []
    for name in ("b.png", "sub/c.png"):
        pictures, dataset = decode_pictures(read(folder), True, 1, lambda done, total: ticks.append((done, total)))
        assert [example.source.name for example in dataset.examples] == [name]
        assert [row.name for row in dataset.left_out] == ["a.png"]
        save_captions(dataset, ["new"] * len(pictures))
    assert ticks == [(0, 1), (0, 1), (1, 1)] * 2
    with pytest.raises(DatasetError, match="No picture of 'd' can be read: a.png"):
        decode_pictures(read(folder), True)
    (folder / "a.png").unlink()
    with pytest.raises(DatasetError, match="Every picture of 'd' has a caption.*turn only_without_caption off"):
        decode_pictures(read(folder), True)
    assert len(decode_pictures(add_class_images(read(folder), read(folder), 1.0))[0]) == 2


def test_pictures_of_one_name_get_captions_of_their_own(folder):
    """The caption of the other picture stays, also if only one of them is in the dataset."""
    (folder / "a.txt").unlink()
    (folder / "a.jpg").write_bytes((folder / "b.png").read_bytes())
    (folder / "a.jpg.txt").write_text("the jpg")
    dataset = read(folder)
    only = replace(dataset, examples=tuple(one for one in dataset.examples if one.source.name == "a.png"))
    save_captions(only, ["the png"])
    captions = {example.source.name: example.captions for example in read(folder).examples}
    assert captions["a.png"] == ("the png",) and captions["a.jpg"] == ("the jpg",)
