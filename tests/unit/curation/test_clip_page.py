"""Tests of the dataset page with clips: rows, posters, and the edits of their captions, masks and places."""

import io
import os
from dataclasses import replace

import pytest
from graft_pack.trainers.curation import caption_edits, picture_edits, uploads
from graft_pack.trainers.curation.caption_edits import CaptionEdit
from graft_pack.trainers.curation.captioning import decode_pictures, save_captions
from graft_pack.trainers.curation.folder import one_clip, one_picture
from graft_pack.trainers.curation.page import PageOptions, moving_thumbnail, read_mask, read_page, thumbnail
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError
from PIL import Image

from tests.support.videos import number_of, shade, write_video

CLIPS = ScanOptions(frames=5)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "clips"
    (root / "walk").mkdir(parents=True)
    write_video(root / "a.mp4", 8, size=(64, 64))
    (root / "a.txt").write_text("a dog runs")
    write_video(root / "two.webm", 2, size=(64, 64), codec="libvpx")
    for number in range(6):
        Image.fromarray(shade(number + 4, (64, 64))).save(root / "walk" / f"{number + 8}.png")
    (root / "walk.txt").write_text("a walk")
    return root


def rows(folder, reading=CLIPS):
    shown = read_page(str(folder), PageOptions(reading=reading), None, None)
    return {row.name: row for row in shown.pictures}, {row.name: row.reason for row in shown.left_out}


def test_clips_are_shown_with_captions_lengths_and_rates(folder):
    pictures, left_out = rows(folder)
    assert not left_out and pictures.keys() == {"a.mp4", "two.webm", "walk.frames"}
    a, two, walk = (pictures[name] for name in sorted(pictures))
    assert (a.caption, a.file, a.frames, a.frame_rate, a.size) == ("a dog runs", "a.txt", 8, 8.0, (64, 64))
    assert a.bucket and "short clip" in two.flags and (walk.caption, walk.frames) == ("a walk", 6)
    pictures, left_out = rows(folder, ScanOptions())
    assert "a.mp4" in left_out and "walk/8.png" in pictures


@pytest.mark.parametrize("name, first", [("a.mp4", 0), ("two.webm", 0), ("walk.frames", 4)])
def test_the_poster_of_a_clip_is_its_first_frame(folder, tmp_path, name, first):
    content = thumbnail(one_picture(str(folder), name), str(tmp_path / "cache"))
    assert number_of(Image.open(io.BytesIO(content)).convert("RGB")) == first


@pytest.mark.parametrize(
    "name, numbers",
    [("a.mp4", range(8)), ("two.webm", range(2)), ("walk.frames", range(4, 10)), ("long.mp4", range(0, 72, 3))],
)
def test_a_moving_thumbnail_shows_the_first_seconds(folder, name, numbers):
    write_video(folder / "long.mp4", 90, size=(320, 64), rate=24)
    image = Image.open(io.BytesIO(moving_thumbnail(one_clip(str(folder), name))))
    assert (image.format, image.n_frames, max(image.size) <= 256) == ("WEBP", len(numbers), True)
    for place, number in enumerate(numbers):
        image.seek(place)
        image.load()
        assert image.info["duration"] == 125
        # WebP's loss is less than a frame's step.
        assert abs(number_of(image.convert("RGB")) - number % 36) <= 1


def test_animations_move_and_other_files_do_not(folder):
    frames = [Image.fromarray(shade(number, (64, 64))) for number in range(5)]
    frames[0].save(folder / "b.gif", save_all=True, append_images=frames[1:], duration=130)
    frames[0].save(folder / "still.jpg")
    assert Image.open(io.BytesIO(moving_thumbnail(one_clip(str(folder), "b.gif")))).n_frames == 5
    with pytest.raises(DatasetError, match="still.jpg"):
        moving_thumbnail(one_clip(str(folder), "still.jpg"))
    with pytest.raises(DatasetError, match="no picture"):
        one_clip(str(folder), "../b.gif")


@pytest.mark.parametrize("name", ["../a.mp4", ".a.mp4", "none.mp4", "none.frames", "../clips/walk.frames", "walk"])
def test_no_poster_of_other_files(folder, name):
    with pytest.raises(DatasetError, match="no picture"):
        one_picture(str(folder), name)


def test_captions_masks_and_places_of_clips_are_edited(folder):
    (result,) = caption_edits.edit_captions(str(folder), [CaptionEdit("a.mp4", "a cat", "a dog runs")])
    assert (result.status, (folder / "a.txt").read_text()) == ("saved", "a cat")
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, format="PNG")
    assert picture_edits.write_mask(str(folder), "a.mp4", mask.getvalue())
    assert rows(folder)[0]["a.mp4"].mask
    assert Image.open(io.BytesIO(read_mask(str(folder), "a.mp4", CLIPS))).size == (64, 64)
    assert picture_edits.exclude(str(folder), ["a.mp4"], True) == ["a.mp4"]
    assert rows(folder)[0]["a.mp4"].excluded
    moved, failed = picture_edits.discard(str(folder), ["a.mp4"])
    assert moved == ["a.mp4"] and not failed
    assert not {"a.mp4", "a.txt", "a-masklabel.png"} & set(os.listdir(folder))
    assert picture_edits.restore(str(folder), ["a.mp4"]) == (["a.mp4"], [])
    assert {"a.mp4", "a.txt", "a-masklabel.png"} <= set(os.listdir(folder))


def test_captions_of_a_captioner_are_saved_beside_clips(folder):
    """Also beside one that shares its name with a picture."""
    first, second = (Image.fromarray(shade(number, (64, 64))) for number in (1, 2))
    first.save(folder / "b.webp", save_all=True, append_images=[second], lossless=True)
    first.save(folder / "two.png")
    (folder / "walk.txt").unlink()
    dataset = scan_folder(str(folder), "", 64, 1, None, CLIPS)
    clips = [example for example in dataset.examples if "/" not in example.source.name]
    pictures, dataset = decode_pictures(replace(dataset, examples=tuple(clips)))
    names = [example.source.name for example in dataset.examples]
    assert names == ["a.mp4", "b.webp", "two.png", "two.webm"] and len(pictures) == 4
    assert save_captions(dataset, [f"new {name}" for name in names])[1] == 4
    read = scan_folder(str(folder), "", 64, 1, None, CLIPS)
    captions = {example.source.name: example.captions for example in read.examples}
    assert all(captions[name] == (f"new {name}",) for name in names)
    assert (folder / "a.txt.bak").read_text() == "a dog runs"


def test_a_clip_is_not_rotated(folder):
    with pytest.raises(DatasetError, match="'a.mp4' cannot be rotated here"):
        picture_edits.rotate(str(folder), "a.mp4", 90)


def test_damaged_uploads_are_named(folder):
    (folder / "broken.mp4").write_bytes(b"no video")
    added = uploads.check_added(str(folder), ["a.mp4", "broken.mp4"])
    assert [row.name for row in added.unreadable] == ["broken.mp4"]
