"""Tests of the files that Save Dataset writes: names, existing files, interruptions and faults."""

import itertools
import os

import numpy as np
import pytest
from graft_pack.trainers.curation.save_dataset import EXISTING, save_pictures
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError, RunError
from graft_pack.trainers.formats import atomic
from PIL import Image


def picture(seed, size=(12, 8), channels=3):
    return np.random.RandomState(seed).randint(0, 255, (*size, channels)).astype(np.uint8)


def save(folder, seeds, texts=None, masks=None, existing="keep", **more):
    texts = texts or [f"caption {seed}" for seed in seeds]
    masks = masks or itertools.repeat(None, len(seeds))
    return save_pictures(str(folder), map(picture, seeds), texts, masks, existing, **more)


def texts_in(folder):
    """Return {file: caption or pixels' sum} of a folder."""
    return {
        path.name: path.read_text() if path.suffix == ".txt" else int(np.asarray(Image.open(path)).sum())
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


def read(folder):
    return scan_folder(str(folder), "", 0, 1, None, ScanOptions())


def test_files_are_the_dataset_that_was_given(tmp_path):
    """Sizes differ, one picture is transparent, and a mask of another size is stretched to its picture."""
    clear = picture(3, (9, 9), 4)
    clear[..., 3] = 0
    opaque = picture(4, (5, 6), 4)
    opaque[..., 3] = 255
    arrays = [picture(0), picture(1, (20, 30)), clear, opaque]
    masks = [np.full((4, 4), value, np.uint8) for value in (0, 80, 160, 255)]
    saved = save_pictures(str(tmp_path / "a" / "b"), arrays, ["one", "two", "", "vier \u00e4"], masks)
    assert (saved.written, saved.kept, saved.warnings()) == (4, 0, ())
    dataset = read(tmp_path / "a" / "b")
    assert [example.source.name for example in dataset.examples] == [f"0000{number}.png" for number in (1, 2, 3, 4)]
    assert [example.captions for example in dataset.examples] == [("one",), ("two",), ("",), ("vier \u00e4",)]
    assert [example.size for example in dataset.examples] == [(8, 12), (30, 20), (9, 9), (6, 5)]
    assert dataset.left_out == ()
    for example, array, mask in zip(dataset.examples, arrays, masks, strict=True):
        weight = np.asarray(example.mask.open())
        assert weight.shape == array.shape[:2] and (weight == mask[0, 0]).all()
    shown = [np.asarray(example.source.open()) for example in dataset.examples]
    assert all((a == b).all() for a, b in zip(shown[:2], arrays[:2], strict=True))
    assert (shown[2] == 255).all() and (shown[3] == opaque[..., :3]).all()
    assert [example.source.decoded().mode for example in dataset.examples] == ["RGB", "RGB", "RGBA", "RGB"]


@pytest.mark.parametrize("existing", EXISTING)
def test_a_second_save_of_the_same_writes_nothing(tmp_path, existing):
    masks = [np.full((4, 4), 9, np.uint8)] * 3
    save(tmp_path, [1, 2, 3], masks=masks, existing=existing)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    saved = save(tmp_path, [1, 2, 3], masks=masks, existing=existing)
    assert (saved.written, saved.kept, saved.differing) == (0, 3, ())
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert len(before) == 9


@pytest.mark.parametrize(
    "existing, counts, numbers, captions",
    [
        ("keep", (1, 2), [1, 2, 5], ["one", "caption 2", "caption 5"]),
        ("replace", (3, 0), [3, 2, 5], ["caption 3", "new", "caption 5"]),
        ("add", (2, 1), [1, 2, 3, 5], ["one", "caption 2", "caption 3", "caption 5"]),
    ],
)
def test_existing_files_stay_unless_told(tmp_path, existing, counts, numbers, captions):
    """Number 1 gets another picture, 2 the same with another caption, 3 is new."""
    save(tmp_path, [1, 2])
    (tmp_path / "00001.txt").write_text("one")
    texts = ["caption 3", "new", "caption 5"] if existing == "replace" else ["caption 3", "caption 2", "caption 5"]
    saved = save(tmp_path, [3, 2, 5], texts, existing=existing)
    assert (saved.written, saved.kept) == counts
    assert saved.differing == (("00001.png",) if existing == "keep" else ())
    assert ["00001.png" in warning for warning in saved.warnings()] == [True] * (existing == "keep")
    found = texts_in(tmp_path)
    assert [found[name] for name in found if name.endswith(".png")] == [int(picture(seed).sum()) for seed in numbers]
    assert [found[name] for name in found if name.endswith(".txt")] == captions


def test_keep_adds_captions_and_masks_that_were_missing(tmp_path):
    """Only to the same picture: 2 holds another one."""
    save(tmp_path, [1, 2], ["", ""])
    assert sorted(texts_in(tmp_path)) == ["00001.png", "00002.png"]
    saved = save(tmp_path, [1, 3], ["one", "three"], [np.zeros((3, 3), np.uint8)] * 2)
    assert (saved.written, saved.differing) == (1, ("00002.png",))
    assert sorted(texts_in(tmp_path)) == ["00001-masklabel.png", "00001.png", "00001.txt", "00002.png"]


def test_replace_leaves_captions_alone_if_none_arrive_and_empties_one_among_others(tmp_path):
    save(tmp_path, [1, 2])
    save(tmp_path, [3, 4], ["", ""], existing="replace")
    assert (tmp_path / "00001.txt").read_text() == "caption 1"
    save(tmp_path, [5, 6, 7], ["five", "", ""], existing="replace")
    assert [example.captions for example in read(tmp_path).examples] == [("five",), ("",), ("",)]
    assert not (tmp_path / "00003.txt").exists()


def test_add_finds_the_next_number_beside_other_files(tmp_path):
    """Files of other programs, masks, huge numbers, a damaged file and a link neither stop it nor set the number."""
    Image.fromarray(picture(9)).save(tmp_path / "00007.jpg")
    Image.fromarray(picture(9)).save(tmp_path / "00090-masklabel.png")
    Image.fromarray(picture(9)).save(tmp_path / f"{'9' * 100}.png")
    (tmp_path / "00003.png").write_bytes(b"no picture")
    (tmp_path / "00004.png").symlink_to(tmp_path / "00007.jpg")
    save(tmp_path, [1, 1, 2], existing="add")
    assert {"00008.png", "00008.txt", "00009.png"} <= set(os.listdir(tmp_path))
    assert not (tmp_path / "00010.png").exists(), "the same picture came twice"


@pytest.mark.parametrize("existing", ["keep", "add"])
@pytest.mark.parametrize("masked", [True, False])
def test_captions_and_masks_without_a_picture_stay(tmp_path, existing, masked):
    """Number 2 holds such a caption, 3 such a mask; what is saved has other ones, or none."""
    (tmp_path / "00002.txt").write_text("theirs")
    Image.new("L", (8, 12), 7).save(tmp_path / "00003-masklabel.png")
    theirs = {name: (tmp_path / name).read_bytes() for name in ("00002.txt", "00003-masklabel.png")}
    masks = [np.full((4, 4), 9, np.uint8)] * 3 if masked else None
    saved = save(tmp_path, [1, 2, 3], masks=masks, existing=existing)
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs
    numbers = [1, 2, 3] if existing == "keep" else [1, 4, 5]
    assert sorted(tmp_path.glob("?????.png")) == [tmp_path / f"{number:05}.png" for number in numbers]
    assert saved.written == 3
    assert saved.differing == (tuple(theirs) if existing == "keep" else ())
    again = save(tmp_path, [1, 2, 3], masks=masks, existing=existing)
    assert again.written == 0 and {name: (tmp_path / name).read_bytes() for name in theirs} == theirs


def test_a_number_that_another_format_holds_is_not_shared(tmp_path):
    Image.fromarray(picture(9)).save(tmp_path / "00001.jpg")
    (tmp_path / "00001.txt").write_text("theirs")
    assert save(tmp_path, [1]).differing == ("00001.jpg",)
    with pytest.raises(DatasetError, match="'00001.jpg'.*would share its caption") as caught:
        save(tmp_path, [1], existing="replace")
    assert caught.value.input == "folder"
    assert sorted(os.listdir(tmp_path)) == ["00001.jpg", "00001.txt"]
    assert (tmp_path / "00001.txt").read_text() == "theirs"
    (tmp_path / "00001.jpg").rename(tmp_path / "00001.webp")
    save(tmp_path / "d", [1])
    (tmp_path / "d" / "00001.png").rename(tmp_path / "00001.png")
    assert save(tmp_path, [1]).differing == (), "the PNG counts"


@pytest.mark.parametrize("existing", EXISTING)
@pytest.mark.parametrize("at", range(9))
def test_saving_goes_on_after_a_kill_at_any_file(tmp_path, existing, at):
    """The result is that of a save without a kill; after the kill every picture that is there is complete."""
    masks = [np.full((4, 4), 9, np.uint8)] * 3
    killed = tmp_path / "killed"
    child = os.fork()
    if child == 0:
        replace, calls = os.replace, itertools.count()
        atomic.os.replace = lambda *paths: os._exit(9) if next(calls) == at else replace(*paths)
        save(killed, [1, 2, 3], masks=masks, existing=existing)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [name for name in os.listdir(killed) if name.endswith(".tmp")]
    assert len(texts_in(killed)) == at
    for example in read(killed).examples if at > 2 else ():
        assert example.captions[0].startswith("caption") and example.mask is not None
    save(killed, [1, 2, 3], masks=masks, existing=existing)
    save(tmp_path / "whole", [1, 2, 3], masks=masks, existing=existing)
    assert texts_in(killed) == texts_in(tmp_path / "whole")


def test_a_full_disk_is_named_and_leaves_complete_pictures(tmp_path, monkeypatch):
    calls = itertools.count()

    def fail(handle):
        if next(calls) == 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", fail)
    monkeypatch.setattr(atomic, "_sync_folder", lambda folder: None)
    with pytest.raises(RunError, match="00003.txt.*No space left.*Free space"):
        save(tmp_path, [1, 2, 3])
    assert sorted(os.listdir(tmp_path)) == ["00001.png", "00001.txt", "00002.png", "00002.txt"]


def test_pictures_are_read_one_by_one(tmp_path):
    """No picture is asked for before the one in front of it is on disk."""

    def pictures():
        for seed in range(1, 4):
            assert len(list(tmp_path.glob("*.png"))) == seed - 1
            yield picture(seed)

    ticks = []
    save_pictures(
        str(tmp_path),
        pictures(),
        ["a"] * 3,
        itertools.repeat(None, 3),
        tick=lambda done, total: ticks.append((done, total)),
    )
    assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_link_in_place_of_a_file_is_replaced_and_not_written_through(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("theirs")
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "00001.txt").symlink_to(outside)
    (folder / "00001.png").symlink_to(tmp_path / "nowhere")
    save(folder, [1], existing="replace")
    assert outside.read_text() == "theirs" and not (tmp_path / "nowhere").exists()
    assert (folder / "00001.txt").read_text() == "caption 1" and not (folder / "00001.txt").is_symlink()
