"""Tests of edits of a dataset's folder: captions, choices, removal, rotation, masks, added files, thumbnails."""

import io
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from graft_pack.trainers.curation import caption_edits, picture_edits, uploads
from graft_pack.trainers.curation.caption_edits import CaptionEdit
from graft_pack.trainers.curation.folder import one_picture
from graft_pack.trainers.curation.page import PageOptions, find_alike, read_mask, read_page, thumbnail
from graft_pack.trainers.data.dataset_file import read_dataset_file
from graft_pack.trainers.data.scan import ScanOptions, scan_folder
from graft_pack.trainers.errors import DatasetError, GraftError
from PIL import Image

from tests.support.odd_files import quarters


def draw(path, seed, size=(96, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.NEAREST).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    for number, name in enumerate(("a.png", "b.png", "10_dog/c.png", "d.png", "d.jpg")):
        draw(root / name, number)
    (root / "a.txt").write_text("a red hat, street\n")
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "b.png", "text": "from a table"}))
    return root


def page(folder, **options):
    return read_page(str(folder), PageOptions(**options), None, None)


def rows(folder, **options):
    return {row.name: row for row in page(folder, **options).pictures}


def edit(folder, name, text, was):
    (result,) = caption_edits.edit_captions(str(folder), [CaptionEdit(name, text, was)])
    return result


def trained(folder):
    dataset = scan_folder(str(folder), "", 64, 1)
    return {example.source.name: example for example in dataset.examples}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_captions_are_shown_with_their_origin(folder):
    found = {name: (row.caption, row.origin, row.file) for name, row in rows(folder).items()}
    assert found == {
        "a.png": ("a red hat, street", "file", "a.txt"),
        "b.png": ("from a table", "table", "b.txt"),
        "10_dog/c.png": ("dog", "folder", "10_dog/c.txt"),
        "d.png": ("", "none", "d.png.txt"),
        "d.jpg": ("", "none", "d.jpg.txt"),
    }


@pytest.mark.parametrize(
    "name, other", [("b.png", "from a table"), ("10_dog/c.png", "dog"), ("a.png", "older"), ("d.png", "")]
)
def test_an_empty_caption_is_refused_if_another_takes_its_place(folder, name, other):
    if name == "a.png":
        (folder / "a.caption").write_text(other)
    before, shown = files(folder), rows(folder)[name]
    result = edit(folder, name, " ", shown.caption)
    assert result.status == ("failed" if other else "saved")
    assert f"takes the caption '{other}'" in result.error or not other
    if other:
        assert files(folder) == before
    # The folder then holds what is shown.
    assert trained(folder)[name].captions == (rows(folder)[name].caption.strip(),)


@pytest.mark.parametrize("name", ["a.png", "b.png", "10_dog/c.png", "d.png", "d.jpg"])
def test_an_edited_caption_is_trained_and_shown(folder, name):
    before = rows(folder)[name]
    result = edit(folder, name, "new, words", before.caption)
    assert (result.status, result.text, result.file) == ("saved", "new, words", before.file)
    assert (rows(folder)[name].caption, rows(folder)[name].origin) == ("new, words", "file")
    assert trained(folder)[name].captions == ("new, words",)
    # Only this picture's.
    others = [other for other in rows(folder) if other != name]
    assert all(trained(folder)[other].captions != ("new, words",) for other in others)


def test_the_first_text_that_an_edit_replaces_is_kept(folder):
    edit(folder, "a.png", "second", "a red hat, street")
    edit(folder, "a.png", "third", "second")
    assert (folder / "a.txt").read_text() == "third"
    assert (folder / "a.txt.bak").read_text() == "a red hat, street\n"
    # The copy is no caption, and no file to report.
    assert page(folder).left_out == ()


def test_an_edit_of_another_page_is_not_overwritten(folder):
    edit(folder, "a.png", "first page", "a red hat, street")
    result = edit(folder, "a.png", "second page", "a red hat, street")
    assert (result.status, result.text) == ("conflict", "first page")
    assert (folder / "a.txt").read_text() == "first page"
    # The same text from both is no conflict.
    assert edit(folder, "a.png", "first page", "a red hat, street").status == "saved"


def test_of_edits_at_once_one_is_saved_and_the_others_are_told(folder):
    results = []
    texts = [f"text {number}" for number in range(8)]
    threads = [
        threading.Thread(target=lambda text=text: results.append(edit(folder, "a.png", text, "a red hat, street")))
        for text in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.status for result in results) == ["conflict"] * 7 + ["saved"]
    (saved,) = [result.text for result in results if result.status == "saved"]
    assert (folder / "a.txt").read_text() == saved
    assert {result.text for result in results} == {saved}


@pytest.mark.parametrize("text", ["nul \0", "x" * 10_001, "lone \ud800"])
def test_a_text_that_training_would_refuse_is_not_written(folder, text):
    before = files(folder)
    result = edit(folder, "a.png", text, "a red hat, street")
    assert result.status == "failed" and result.error
    assert files(folder) == before


@pytest.mark.parametrize("name", ["../a.png", "gone.png", "a.txt", "", ".", "/etc/passwd", "10_dog", "a.png\0"])
def test_names_that_the_folder_does_not_hold_are_refused(folder, name):
    before = files(folder)
    assert edit(folder, name, "x", "").status == "failed"
    for work in (
        lambda: picture_edits.exclude(str(folder), [name], True),
        lambda: picture_edits.set_center(str(folder), name, (0.1, 0.1)),
        lambda: picture_edits.rotate(str(folder), name, 90),
        lambda: picture_edits.write_mask(str(folder), name, b""),
        lambda: one_picture(str(folder), name),
        lambda: read_mask(str(folder), name, ScanOptions()),
    ):
        with pytest.raises(GraftError):
            work()
    for work in (picture_edits.discard, picture_edits.restore):
        moved, failed = work(str(folder), [name])
        assert moved == [] and [row[0] for row in failed] == [name]
    assert uploads.check_added(str(folder), [name]).duplicates == ()
    assert files(folder) == before


def test_nothing_is_written_through_a_link(folder, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (folder / "b.txt").symlink_to(outside)
    (folder / ".trash").symlink_to(tmp_path, target_is_directory=True)
    (folder / "a-masklabel.png").symlink_to(outside)
    (folder / "graft_dataset.json").symlink_to(outside)
    assert edit(folder, "b.png", "x", "from a table").status == "failed"
    for work in (
        lambda: picture_edits.exclude(str(folder), ["a.png"], True),
        lambda: picture_edits.write_mask(str(folder), "a.png", png(Image.new("L", (96, 64)))),
        lambda: picture_edits.discard(str(folder), ["a.png"]),
        lambda: picture_edits.rotate(str(folder), "a.png", 90),
    ):
        with pytest.raises(GraftError):
            work()
    assert outside.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["outside.txt", "photos"]


def test_excluding_and_including_again(folder):
    assert picture_edits.exclude(str(folder), ["a.png", "d.jpg"], True) == ["a.png", "d.jpg"]
    assert sorted(trained(folder)) == ["10_dog/c.png", "b.png", "d.png"]
    assert [name for name, row in rows(folder).items() if row.excluded] == ["a.png", "d.jpg"]
    assert picture_edits.exclude(str(folder), ["d.jpg"], False) == ["a.png"]
    assert sorted(trained(folder)) == ["10_dog/c.png", "b.png", "d.jpg", "d.png"]


def test_a_folder_without_included_pictures_says_so(folder):
    picture_edits.exclude(str(folder), list(rows(folder)), True)
    with pytest.raises(DatasetError, match="a.png: excluded from training") as caught:
        trained(folder)
    assert "Include excluded pictures" in caught.value.cure
    assert all(row.excluded for row in rows(folder).values())


def test_repeats_and_centers(folder):
    picture_edits.set_repeats(str(folder), "10_dog", 4)
    picture_edits.set_repeats(str(folder), "", 2)
    picture_edits.set_center(str(folder), "a.png", (0.5, 0.0))
    assert page(folder).folders == {"": 2, "10_dog": 4}
    row = rows(folder, resolution=64)["a.png"]
    assert (row.crop[1], row.center, row.repeats) == (0.0, (0.5, 0.0), 2)
    picture_edits.set_repeats(str(folder), "10_dog", None)
    picture_edits.set_center(str(folder), "a.png", None)
    assert page(folder).folders == {"": 2, "10_dog": 10}
    left, top, width, height = rows(folder, resolution=64)["a.png"].crop
    assert (left, width) == (0.0, 1.0) and 0.0 < top == pytest.approx((1 - height) / 2, abs=0.01)
    with pytest.raises(DatasetError):
        picture_edits.set_repeats(str(folder), "gone", 2)


def test_discarded_pictures_come_back_as_they_were(folder):
    draw(folder / "a-masklabel.png", 9)
    before = files(folder)
    assert picture_edits.discard(str(folder), ["a.png", "10_dog/c.png"]) == (["a.png", "10_dog/c.png"], [])
    assert sorted(trained(folder)) == ["b.png", "d.jpg", "d.png"]
    assert not (folder / "a.txt").exists() and not (folder / "a-masklabel.png").exists()
    assert page(folder).left_out == ()
    assert picture_edits.restore(str(folder), ["a.png", "10_dog/c.png"]) == (["a.png", "10_dog/c.png"], [])
    assert files(folder) == before


def test_a_file_in_the_way_is_not_replaced(folder):
    picture_edits.discard(str(folder), ["a.png"])
    draw(folder / "a.png", 99)
    new = (folder / "a.png").read_bytes()
    restored, failed = picture_edits.restore(str(folder), ["a.png"])
    assert restored == [] and failed[0][0] == "a.png"
    assert (folder / "a.png").read_bytes() == new
    # A second removal keeps both.
    picture_edits.discard(str(folder), ["a.png"])
    assert len([name for name in files(folder) if name.endswith("a.png") and name.startswith(".trash")]) == 2


@pytest.mark.parametrize("is_link", [False, True], ids=["restored", "discarded"])
def test_a_picture_moves_with_its_caption_or_not_at_all(folder, is_link):
    if is_link:
        (folder / "a.txt").rename(folder / "other.txt")
        (folder / "a.txt").symlink_to(folder / "other.txt")
        move = picture_edits.discard
    else:
        picture_edits.discard(str(folder), ["a.png"])
        (folder / "a.txt").write_text("another picture's")
        move = picture_edits.restore
    before = files(folder)
    moved, failed = move(str(folder), ["a.png"])
    assert moved == [] and [name for name, _ in failed] == ["a.png"]
    assert files(folder) == before
    (folder / "a.txt").unlink()
    assert move(str(folder), ["a.png"]) == (["a.png"], [])


def test_a_shared_caption_stays_with_the_other_picture(folder):
    (folder / "d.txt").write_text("of both")
    picture_edits.discard(str(folder), ["d.png"])
    assert trained(folder)["d.jpg"].captions == ("of both",)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "turned JPEG", "16 bits", "palette"])
def test_rotation_keeps_the_pixels(folder, kind, degrees):
    picture = Image.fromarray(quarters(0)).resize((96, 64), Image.NEAREST)
    suffix = {"JPEG": "jpg", "turned JPEG": "jpg", "WEBP": "webp", "TIFF": "tif", "BMP": "bmp"}.get(kind, "png")
    path = folder / f"e.{suffix}"
    saving = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    if kind == "turned JPEG":
        exif = Image.Exif()
        exif[0x0112] = 6
        saving = {"quality": 95, "exif": exif}
    if kind == "16 bits":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    if kind == "palette":
        picture = picture.quantize(16)
    picture.save(path, **saving)
    draw(folder / "e-masklabel.png", 3, (96, 64))
    name = path.name
    before, mask = trained(folder)[name].source.open(), trained(folder)[name].mask.open()
    original = path.read_bytes()
    picture_edits.set_center(str(folder), name, (0.25, 0.125))
    picture_edits.rotate(str(folder), name, degrees)
    turn = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}[degrees]
    after = trained(folder)[name]
    difference = np.abs(np.asarray(after.source.open(), int) - np.asarray(before.transpose(turn), int))
    assert difference.max() <= (12 if "JPEG" in kind else 0)
    assert after.size == after.source.open().size
    assert (np.asarray(after.mask.open()) == np.asarray(mask.transpose(turn))).all()
    assert after.center == {90: (0.875, 0.25), 180: (0.75, 0.875), 270: (0.125, 0.75)}[degrees]
    # The file as it was is in the trash.
    assert original in files(folder / ".trash").values()


def test_rotation_keeps_colors_below_full_transparency(folder):
    pixels = np.dstack([quarters(0), np.zeros(quarters(0).shape[:2], np.uint8)])
    Image.fromarray(pixels).save(folder / "e.webp", lossless=True, exact=True)
    picture_edits.rotate(str(folder), "e.webp", 90)
    assert np.array_equal(np.asarray(Image.open(folder / "e.webp")), np.rot90(pixels, -1))


@pytest.mark.parametrize("name", ["e.webp", "e.png", "e.tif"])
def test_no_picture_of_an_animation_is_lost_by_rotation(folder, name):
    first, second = (Image.new("RGB", (32, 16), color) for color in ("red", "blue"))
    first.save(folder / name, save_all=True, append_images=[second])
    before = files(folder)
    with pytest.raises(DatasetError, match=f"'{name}' holds several pictures"):
        picture_edits.rotate(str(folder), name, 90)
    assert files(folder) == before


@pytest.mark.parametrize("place", ["cutouts", "../cutouts"])
def test_a_mask_in_a_folder_of_masks_is_rotated_too(folder, place):
    masks = (folder / place).resolve()
    draw(masks / "a.png", 9, (96, 64))
    before = files(folder)
    mask = Image.open(masks / "a.png")
    if ".." in place:
        with pytest.raises(DatasetError, match="mask of 'a.png' is in another folder") as caught:
            picture_edits.rotate(str(folder), "a.png", 90, str(masks))
        assert caught.value.cure and files(folder) == before
        # Only that of this picture matters.
        picture_edits.rotate(str(folder), "b.png", 90, str(masks))
        return
    picture_edits.rotate(str(folder), "a.png", 90, str(masks))
    turned = Image.open(masks / "a.png")
    assert (np.asarray(turned) == np.asarray(mask.transpose(Image.Transpose.ROTATE_270))).all()
    assert Image.open(folder / "a.png").size == (64, 96)


@pytest.mark.parametrize("kind", ["control_folder", "control_folder_2", "worse_folder"])
@pytest.mark.parametrize("place", ["before", "../before"])
def test_a_picture_that_is_paired_with_it_is_rotated_too(folder, place, kind):
    sources = (folder / place).resolve()
    draw(sources / "a.jpg", 9, (96, 64))
    before = files(folder)
    paired = {"control_folder_3": "", kind: str(sources)}
    if ".." in place:
        with pytest.raises(DatasetError, match=f"picture of 'a.png' in {kind} is in another folder") as caught:
            picture_edits.rotate(str(folder), "a.png", 90, paired=paired)
        assert caught.value.cure and caught.value.input == kind and files(folder) == before
        # Only that of this picture matters.
        picture_edits.rotate(str(folder), "b.png", 90, paired=paired)
        return
    picture_edits.rotate(str(folder), "a.png", 90, paired=paired)
    assert Image.open(sources / "a.jpg").size == Image.open(folder / "a.png").size == (64, 96)
    assert before["before/a.jpg"] in files(folder / ".trash").values()
    picture_edits.rotate(str(folder), "a.png", 270, paired=paired)
    assert Image.open(sources / "a.jpg").size == (96, 64)


def test_pictures_that_a_table_pairs_are_rotated_together(folder):
    draw(folder / "before" / "x.jpg", 9)
    rows = [
        {"file_name": "a.png", "control_file_name": "before/x.jpg", "worse_file_name": "d.jpg"},
        {"file_name": "b.png", "control_file_name": "d.png"},
        {"file_name": "d.png", "control_file_name": "before/x.jpg"},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:1])))
    picture_edits.rotate(str(folder), "a.png", 90)
    sizes = {name: Image.open(folder / name).size for name in ("a.png", "before/x.jpg", "d.jpg", "b.png")}
    assert sizes == {**dict.fromkeys(sizes, (64, 96)), "b.png": (96, 64)}
    # A source that is a picture with a source of its own, and a source of two pictures.
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = files(folder)
    for name, other in (("b.png", "d.png"), ("a.png", "d.png")):
        with pytest.raises(DatasetError, match=f"'{name}' and '{other}' have the same picture"):
            picture_edits.rotate(str(folder), name, 90)
    assert files(folder) == before


def test_folders_of_paired_pictures_may_lie_beside_each_other(folder):
    paired = {"control_folder": str(folder / "before"), "worse_folder": str(folder / "worse")}
    for number, place in enumerate(paired.values()):
        draw(Path(place) / "a.png", number, (96, 64))
    picture_edits.rotate(str(folder), "a.png", 90, paired=paired)
    assert all(Image.open(Path(place) / "a.png").size == (64, 96) for place in (folder, *paired.values()))


def test_a_source_of_two_pictures_is_not_rotated(folder):
    draw(folder / "more" / "a.png", 3, (96, 64))
    draw(folder / "before" / "a.png", 9, (96, 64))
    before = files(folder)
    with pytest.raises(DatasetError, match="'a.png' and 'more/a.png' have the same picture in control_folder"):
        picture_edits.rotate(str(folder), "a.png", 90, paired={"control_folder": str(folder / "before")})
    assert files(folder) == before


def test_a_format_that_cannot_be_written_is_not_rotated(folder):
    Image.new("RGB", (64, 64)).save(folder / "e.gif")
    before = files(folder)
    with pytest.raises(DatasetError, match="GIF"):
        picture_edits.rotate(str(folder), "e.gif", 90)
    assert files(folder) == before


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def test_a_painted_mask_is_trained(folder):
    mask = Image.fromarray(np.arange(64 * 96, dtype=np.uint32).reshape(64, 96).astype(np.uint8))
    assert picture_edits.write_mask(str(folder), "a.png", png(mask))
    assert (np.asarray(trained(folder)["a.png"].mask.open()) == np.asarray(mask)).all()
    shown = Image.open(io.BytesIO(read_mask(str(folder), "a.png", ScanOptions())))
    assert (np.asarray(shown) == np.asarray(mask)).all()
    assert rows(folder)["a.png"].mask
    # Another one replaces it, and the first one is kept.
    other = Image.new("L", (96, 64), 7)
    assert picture_edits.write_mask(str(folder), "a.png", png(other))
    assert trained(folder)["a.png"].mask.open().getextrema() == (7, 7)
    assert any(name.endswith("a-masklabel.png") for name in files(folder / ".trash"))
    assert not picture_edits.write_mask(str(folder), "a.png", b"")
    assert trained(folder)["a.png"].mask is None
    with pytest.raises(DatasetError, match="no mask"):
        read_mask(str(folder), "a.png", ScanOptions())


def test_a_painted_mask_counts_before_one_in_a_folder_of_masks(folder):
    (folder / "masks").mkdir()
    Image.new("L", (96, 64), 50).save(folder / "masks" / "a.png")
    picture_edits.write_mask(str(folder), "a.png", png(Image.new("L", (96, 64), 200)))
    assert trained(folder)["a.png"].mask.open().getextrema() == (200, 200)


@pytest.mark.parametrize("content", [b"no picture", png(Image.new("L", (64, 64))), png(Image.new("L", (96, 64)))[:60]])
def test_a_mask_that_does_not_fit_is_refused(folder, content):
    before = files(folder)
    with pytest.raises(DatasetError):
        picture_edits.write_mask(str(folder), "a.png", content)
    assert files(folder) == before


def test_added_duplicates_are_removed_and_unreadable_files_named(folder):
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "10_dog" / "a.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "f.png").write_bytes(b"no picture")
    (folder / "g.jxl").write_bytes(b"x")
    draw(folder / "h.png", 50)
    (folder / "i.png").write_bytes((folder / "h.png").read_bytes())
    (folder / "h.txt").write_text("words")
    new = ["e.png", "10_dog/a.png", "f.png", "g.jxl", "h.png", "i.png", "h.txt", "gone.png"]
    added = uploads.check_added(str(folder), new)
    assert added.duplicates == (("e.png", "a.png"), ("i.png", "h.png"))
    # A picture in another folder may be meant: a source picture, or another concept.
    assert added.kept == ("10_dog/a.png", "f.png", "g.jxl", "h.png", "h.txt")
    assert [row.name for row in added.unreadable] == ["f.png", "g.jxl"]
    assert not (folder / "e.png").exists() and (folder / "a.png").exists()


def test_flags_and_problems(folder):
    (folder / "broken.png").write_bytes(b"x")
    draw(folder / "tiny.png", 70, (16, 16))
    found = rows(folder, trigger="sks", resolution=64)
    assert "trigger missing" in found["a.png"].flags
    assert "no caption" not in found["d.png"].flags, "the trigger is its caption"
    assert "no caption" in rows(folder)["d.png"].flags
    assert found["broken.png"].problem and found["broken.png"].size is None
    assert "small" in found["tiny.png"].flags


def test_pictures_that_look_alike(folder):
    image = Image.open(folder / "a.png")
    image.resize((192, 128), Image.NEAREST).save(folder / "z.png")
    pairs, broken = find_alike(str(folder), PageOptions(), None)
    assert ("a.png", "z.png") in pairs and broken == []


def test_thumbnails_are_made_once_and_again_for_a_changed_picture(folder, tmp_path):
    cache = tmp_path / "cache"
    draw(folder / "a.png", 1, (1024, 512))
    first = thumbnail(one_picture(str(folder), "a.png"), str(cache))
    image = Image.open(io.BytesIO(first))
    assert (image.format, image.size) == ("WEBP", (256, 128))
    (kept,) = (path for path in cache.rglob("*") if path.is_file())
    kept.write_bytes(b"from the cache")
    assert thumbnail(one_picture(str(folder), "a.png"), str(cache)) == b"from the cache"
    draw(folder / "a.png", 2, (512, 1024))
    second = thumbnail(one_picture(str(folder), "a.png"), str(cache))
    assert Image.open(io.BytesIO(second)).size == (128, 256)


def test_a_hidden_or_outer_picture_is_not_sent(folder, tmp_path):
    draw(tmp_path / "outer.png", 1)
    draw(folder / ".hidden" / "a.png", 1)
    (folder / "link.png").symlink_to(tmp_path / "outer.png")
    for name in ("../outer.png", ".hidden/a.png", "..\\outer.png", str(tmp_path / "outer.png")):
        with pytest.raises(DatasetError):
            one_picture(str(folder), name)
    with pytest.raises(DatasetError):
        one_picture(str(folder), "link.png").open()


def test_a_full_disk_loses_nothing(folder, monkeypatch):
    before = files(folder)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert edit(folder, "a.png", "new", "a red hat, street").status == "failed"
    for work in (
        lambda: picture_edits.exclude(str(folder), ["a.png"], True),
        lambda: picture_edits.rotate(str(folder), "a.png", 90),
        lambda: picture_edits.write_mask(str(folder), "a.png", png(Image.new("L", (96, 64)))),
    ):
        with pytest.raises(GraftError):
            work()
    assert files(folder) == before
    assert read_dataset_file(str(folder)).excluded == frozenset()
