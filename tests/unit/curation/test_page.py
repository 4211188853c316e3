"""Tests of the contents of a dataset's page: how much of a known folder is read again."""

import builtins
import os
from pathlib import Path

import pytest
from graft_pack.trainers.curation import page
from graft_pack.trainers.curation.page import PageOptions, read_page
from graft_pack.trainers.data.scan import ScanOptions
from PIL import Image

PICTURES = 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("graft_pack.trainers.data.index._TIMESTAMP_GRACE_NS", 0)
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(PICTURES):
        Image.new("RGB", (64, 64), (number * 40, 0, 0)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"picture {number}")
    return root


@pytest.fixture
def look(folder, tmp_path, monkeypatch):
    """Return look(**options), which reads the page and returns it with the files that it opened, as (page, names)."""
    opened = []
    real = builtins.open

    def watched(path, *args, **kwargs):
        if str(path).startswith(f"{folder}{os.sep}"):
            opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", watched)

    def look(**options):
        opened.clear()
        shown = read_page(str(folder), PageOptions(**options), None, str(tmp_path / "index"))
        return shown, sorted(name for name in opened if name != "graft_dataset.json")

    return look


def test_only_changed_files_are_read_again(folder, look, monkeypatch):
    inspected = []
    real = page.inspect_example
    monkeypatch.setattr(page, "inspect_example", lambda example, *more: inspected.append(1) or real(example, *more))
    first, opened = look()
    assert len(opened) == 2 * PICTURES and len(inspected) == PICTURES
    again, opened = look()
    assert again == first and opened == [] and len(inspected) == PICTURES
    (folder / "2.txt").write_text("another caption")
    changed, opened = look()
    assert opened == ["2.txt"]
    assert [row.caption for row in changed.pictures][1:4] == ["picture 1", "another caption", "picture 3"]
    # Other settings need no file either.
    other, opened = look(trigger="sks")
    assert opened == [] and all("trigger missing" in row.flags for row in other.pictures)


def test_a_restart_reads_no_file_again(look):
    first, _ = look()
    page._kept.clear()
    assert look() == (first, [])


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "2.txt").write_text("another"),
        lambda folder: (folder / "2.txt").unlink(),
        lambda folder: (folder / "2.png").unlink(),
        lambda folder: (folder / "graft_dataset.json").write_text('{"excluded": ["2.png"]}'),
        lambda folder: Image.new("L", (64, 64)).save(folder.parent / "masks" / "2.png"),
        lambda folder: Image.new("RGB", (32, 16)).save(folder.parent / "sources" / "2.png"),
    ],
    ids=["caption", "no caption", "no picture", "choices", "mask", "source picture"],
)
def test_a_change_of_any_file_is_seen(folder, look, change):
    for name in ("masks", "sources"):
        (folder.parent / name).mkdir()
    reading = ScanOptions(
        mask_folder=str(folder.parent / "masks"),
        control_folder=str(folder.parent / "sources"),
        sources_optional=True,
    )
    first, _ = look(reading=reading)
    change(folder)
    assert look(reading=reading)[0] != first


def test_a_file_changed_a_moment_ago_is_read_again(folder, look, monkeypatch):
    """Its times might not distinguish a second change from the first."""
    monkeypatch.setattr("graft_pack.trainers.data.index._TIMESTAMP_GRACE_NS", 3600 * 10**9)
    look()
    assert len(look()[1]) >= 2 * PICTURES
