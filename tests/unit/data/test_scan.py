"""Tests of the folder scan: kohya and Hugging Face folders, sidecars, masks, and files that are none of these."""

import json
import os

import numpy as np
import pytest
from graft_pack.trainers.data import captions, pictures, scan
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.data.buckets import choose_crop
from graft_pack.trainers.data.examples import Augmentation, combine
from graft_pack.trainers.data.scan import MASKS, ScanOptions, check_captions, scan_folder
from graft_pack.trainers.errors import DatasetError
from graft_pack.trainers.protocols import Geometry
from PIL import Image


def draw(path, size=(64, 64), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def read(folder, trigger="", resolution=0, repeats=1, handling=None, index=None, **reading):
    return scan_folder(str(folder), trigger, resolution, repeats, handling, ScanOptions(**reading), index)


def by_name(dataset):
    return {example.source.name: example for example in dataset.examples}


def texts_of(dataset):
    return {name: example.captions for name, example in by_name(dataset).items()}


def reasons(dataset):
    return {row.name: row.reason for row in dataset.left_out}


@pytest.fixture
def folder(tmp_path):
    """Create three pictures: one with a .txt, one in a subfolder with a .caption, one without."""
    for name, size in (("a.png", (20, 30)), ("sub/b.jpg", (40, 10)), ("c.webp", (16, 16))):
        draw(tmp_path / "d" / name, size)
    (tmp_path / "d" / "a.txt").write_text("\ufeffa  red\n picture \n", encoding="utf-8")
    (tmp_path / "d" / "sub" / "b.caption").write_text("caf\u00e9", encoding="utf-8")
    return tmp_path / "d"


def test_a_folder_is_read_in_a_stable_order(folder):
    dataset = read(folder, " sks ", 64, 2)
    assert [example.source.name for example in dataset.examples] == ["a.png", "c.webp", "sub/b.jpg"]
    assert [example.captions for example in dataset.examples] == [("a red picture",), ("",), ("caf\u00e9",)]
    assert [example.size for example in dataset.examples] == [(20, 30), (16, 16), (40, 10)]
    assert {example.repeats for example in dataset.examples} == {2}
    assert {example.trigger for example in dataset.examples} == {dataset.trigger} == {"sks"}


# kohya's documentation (train_README, "Previous specification format" and "Aspect Ratio Bucketing"; config_README): a
# folder is "<repeats>_<identifier> <class>"; without a caption file the caption is "<identifier> <class>", with one the
# folder's words are not used; sizes are multiples of 64 within the area of the resolution, 256x1024 and 384x640 are two
# of them at 512; bucket_no_upscale trains smaller pictures at their own size, trimmed to the step.
KOHYA = [
    # (file, picture's size, caption file, repeats, caption, bucket at 512 without and with upscaling)
    ("20_sls frog/a.png", (512, 512), None, 20, "sls frog", (512, 512), (512, 512)),
    ("20_sls frog/b.png", (1280, 768), "a green frog", 20, "a green frog", (640, 384), (640, 384)),
    ("5_cpc rabbit/c.png", (1024, 4096), None, 5, "cpc rabbit", (256, 1024), (256, 1024)),
    ("5_cpc rabbit/d.png", (768, 1280), None, 5, "cpc rabbit", (384, 640), (384, 640)),
    ("1_1girl/e.png", (300, 300), None, 1, "1girl", (256, 256), (512, 512)),
    ("10_sks_dog on grass/f.png", (200, 333), None, 10, "sks_dog on grass", (192, 320), (384, 640)),
]


def test_kohyas_folders_mean_what_its_documentation_says(tmp_path):
    for name, size, text, *_ in KOHYA:
        draw(tmp_path / name, size)
        if text:
            (tmp_path / name).with_suffix(".txt").write_text(text)
    for upscale in (False, True):
        found = by_name(read(tmp_path, handling=Augmentation(upscale=upscale)))
        for name, size, _, repeats, caption, own, enlarged in KOHYA:
            example = found[name]
            assert (example.repeats, example.captions) == (repeats, (caption,)), name
            crop = choose_crop(size, Geometry(512, 64), name, upscale)
            assert crop.bucket == (enlarged if upscale else own), (name, upscale)


@pytest.mark.parametrize(
    "path, repeats, words",
    [
        ("10_sks dog", 1, "sks dog"),
        ("10_sks dog/inner", 1, "sks dog"),
        ("10_sks dog/3_close up", 3, "close up"),
        ("photos", 1, ""),
        ("10 dogs", 1, ""),
        ("4_", 4, ""),
    ],
)
def test_the_nearest_folder_says_repeats_and_words(tmp_path, path, repeats, words):
    draw(tmp_path / "root" / path / "a.png")
    expected = 10 if path.startswith("10_") and repeats == 1 else repeats
    (example,) = read(tmp_path / "root").examples
    assert (example.repeats, example.captions) == (expected, (words,))
    (doubled,) = read(tmp_path / "root", repeats=2).examples
    assert doubled.repeats == 2 * expected


def test_date_as_a_folders_name_is_questioned(tmp_path):
    for name in ("202311_shoot/a.png", "202311_shoot/b.png", "100_sks dog/c.png"):
        draw(tmp_path / name)
    dataset = read(tmp_path)
    (said,) = dataset.warnings
    assert "'202311_shoot'" in said
    assert "2 pictures 202311 times" in said
    assert "202311-shoot" in said
    assert combine(dataset, dataset).warnings == (said, said)
    assert read(tmp_path / "100_sks dog").warnings == ()


def test_a_folder_that_repeats_no_time_is_left_out(tmp_path):
    """sd-scripts does the same with num_repeats below 1."""
    draw(tmp_path / "0_not now" / "a.png")
    draw(tmp_path / "b.png")
    dataset = read(tmp_path)
    assert set(by_name(dataset)) == {"b.png"}
    assert "0 times" in reasons(dataset)["0_not now/a.png"]


def test_the_chosen_folders_own_name_counts_as_well(tmp_path):
    draw(tmp_path / "12_sks dog" / "a.png")
    (example,) = read(tmp_path / "12_sks dog").examples
    assert (example.repeats, example.captions) == (12, ("sks dog",))


def test_hugging_face_folders(tmp_path):
    """Rows follow the datasets library's documentation: file_name relative to the metadata file, and text."""
    for name in ("train/0.png", "train/deep/1.png", "other/2.png", "other/3.png"):
        draw(tmp_path / name)
    rows = [{"file_name": "0.png", "text": "zero"}, {"file_name": "deep/1.png", "text": "one\u2028still one"}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "other" / "metadata.csv").write_text('file_name,text\n2.png,"two, and ""more"""\ngone.png,x\n')
    (tmp_path / "other" / "3.txt").write_text("beside")
    dataset = read(tmp_path)
    assert texts_of(dataset) == {
        "train/0.png": ("zero",),
        "train/deep/1.png": ("one still one",),
        "other/2.png": ('two, and "more"',),
        "other/3.png": ("beside",),
    }
    assert "names 1 missing pictures: gone.png" in reasons(dataset)["other/metadata.csv"]


@pytest.mark.parametrize("wanted", ["../outside.png", "/etc/passwd", "..\\outside.png", "sub/../../outside.png"])
def test_metadata_leads_nowhere_else(tmp_path, wanted):
    draw(tmp_path / "outside.png")
    draw(tmp_path / "d" / "a.png")
    (tmp_path / "d" / "metadata.jsonl").write_text(json.dumps({"file_name": wanted, "text": "x"}))
    dataset = read(tmp_path / "d")
    assert texts_of(dataset) == {"a.png": ("",)}
    assert "metadata.jsonl" in reasons(dataset)


@pytest.mark.parametrize(
    "name, content, expected, as_lines",
    [
        ("a.txt", "one\ntwo\n", ("one two",), ("one", "two")),
        ("a.txt", "", ("",), ("",)),
        ("a.TXT", "one", ("one",), ("one",)),
        ("a.caption", "one", ("one",), ("one",)),
        ("a.json", '{"caption": "one"}', ("one",), ("one",)),
        ("a.json", '{"tags": ["x", "y"], "score": 3}', ("x, y",), ("x, y",)),
        ("a.json", '{"captions": ["one", "two"]}', ("one", "two"), ("one", "two")),
        ("a.json", '["one", "two"]', ("one", "two"), ("one", "two")),
        ("a.json", '{"width": 3}', ("",), ("",)),
    ],
)
def test_sidecars(tmp_path, name, content, expected, as_lines):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    assert texts_of(read(tmp_path)) == {"a.png": expected}
    assert texts_of(read(tmp_path, lines_are_variants=True)) == {"a.png": as_lines}


def test_txt_comes_before_caption_before_json_before_metadata_before_the_folders_words(tmp_path):
    root = tmp_path / "3_words"
    draw(root / "a.png")
    expected = "words"
    for name, content, text in (
        ("metadata.jsonl", '{"file_name": "a.png", "text": "row"}', "row"),
        ("a.json", '{"text": "json"}', "json"),
        ("a.caption", "caption", "caption"),
        ("a.txt", "txt", "txt"),
    ):
        assert texts_of(read(root))["a.png"] == (expected,)
        (root / name).write_text(content)
        expected = text
    assert texts_of(read(root))["a.png"] == ("txt",)


def test_utf16_is_read_by_its_mark_and_other_encodings_are_named(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png"):
        draw(tmp_path / name)
    (tmp_path / "a.txt").write_text("Stra\u00dfe", encoding="utf-16")
    (tmp_path / "b.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    (tmp_path / "c.json").write_text("{no json")
    dataset = read(tmp_path)
    assert texts_of(dataset) == {"a.png": ("Stra\u00dfe",), "d.png": ("",)}
    assert "b.txt" in reasons(dataset)["b.png"]
    assert "UTF-8" in reasons(dataset)["b.png"]
    assert "c.json" in reasons(dataset)["c.png"]


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
def test_caption_is_read_in_every_form_of_unicode(tmp_path, encoding):
    draw(tmp_path / "a.png")
    text = "a cat on \u732b Stra\u00dfe \U0001f431"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts_of(read(tmp_path)) == {"a.png": (text,)}


@pytest.mark.parametrize("content", [b"\0" * 40, b"a cat\0", b"a\0\0cat\0\0\0", b'{"text": "a\\u0000b"}'])
def test_caption_with_nul_characters_is_named(tmp_path, content):
    name = "a.json" if content.startswith(b"{") else "a.txt"
    for picture in ("a.png", "b.png"):
        draw(tmp_path / picture)
    (tmp_path / name).write_bytes(content)
    dataset = read(tmp_path)
    assert set(by_name(dataset)) == {"b.png"}
    assert any(words in reasons(dataset)["a.png"] for words in ("NUL", "UTF-8"))


ZOE_APART, ZOE = "Zoe\u0308", "zo\u00eb"


def test_captions_are_found_by_whole_and_by_folded_names(tmp_path):
    for name in ("a.png", "IMG_1.PNG", f"Sub/{ZOE_APART}.png", "x.png", "X.png", "b.jxl"):
        draw(tmp_path / name) if not name.endswith("jxl") else (tmp_path / name).write_bytes(b"")
    for name in ("a.png.txt", "img_1.TXT", f"Sub/{ZOE}.txt", "x.txt", "b.txt", "gone.txt", "gone.json"):
        (tmp_path / name).write_text(f"of {name.encode('ascii', 'replace').decode()}")
    dataset = read(tmp_path)
    assert texts_of(dataset) == {
        "IMG_1.PNG": ("of img_1.TXT",),
        f"Sub/{ZOE_APART}.png": ("of Sub/zo?.txt",),
        "X.png": ("",),
        "a.png": ("of a.png.txt",),
        "x.png": ("of x.txt",),
    }
    lonely = "a caption without its picture"
    assert reasons(dataset) == {
        "gone.txt": lonely,
        "gone.json": lonely,
        "b.jxl": "Graft cannot read this format; save it as PNG or JPEG",
    }


def test_nearest_name_is_asked_for_the_caption_first(tmp_path):
    draw(tmp_path / "a.png")
    for name in ("A.txt", "a.png.txt", "a.json", "a.txt"):
        (tmp_path / name).write_text(json.dumps(name))
        assert texts_of(read(tmp_path)) == {"a.png": (name if name == "a.json" else f'"{name}"',)}


def test_masks_and_source_pictures_are_found_by_folded_names(tmp_path):
    for name in ("IMG_1.PNG", f"{ZOE_APART}.png", "b.png"):
        draw(tmp_path / "d" / name)
    for name in ("img_1-MaskLabel.png", f"Masks/{ZOE}.png", "Masks/nobody.png"):
        draw(tmp_path / "d" / name, color="white")
    for name in ("img_1.jpg", f"{ZOE}.png", "B.png", "nobody.png"):
        draw(tmp_path / "c" / name)
    (tmp_path / "c" / "b.arw").write_bytes(b"raw")
    dataset = read(tmp_path / "d", control_folder=str(tmp_path / "c"))
    found = by_name(dataset)
    assert found["IMG_1.PNG"].mask.name == "img_1-MaskLabel.png"
    assert found[f"{ZOE_APART}.png"].mask.name == f"Masks/{ZOE}.png"
    assert {name: one.control.source.name for name, one in found.items()} == {
        "IMG_1.PNG": "img_1.jpg (source)",
        f"{ZOE_APART}.png": f"{ZOE}.png (source)",
        "b.png": "B.png (source)",
    }
    said = reasons(dataset)
    assert "without the picture it becomes" in said["nobody.png"]
    assert "not read" in said["b.arw"]
    apart = read(tmp_path / "d", mask_folder=str(tmp_path / "c"))
    assert masks_of(apart)["b.png"] == "B.png"
    assert reasons(apart)["nobody.png"] == "a mask without its picture"


PICTURES = ("a.jfif", "b.jpe", "c.apng", "d.mpo", "e.dib", "f.jif", "g.JFIF")
OTHERS = ("a.jxl", "b.arw", "c.mp4", "d.zip", "e", "f.xyz", "g.cr3", "Thumbs.db", "a_sdxl.npz")


def test_pictures_by_every_usual_ending_are_read_and_the_rest_named(tmp_path):
    kinds = {"apng": "PNG", "dib": "BMP", "mpo": "MPO"}
    for name in PICTURES:
        Image.new("RGB", (64, 64)).save(tmp_path / name, format=kinds.get(name.split(".")[1], "JPEG"))
    for name in OTHERS:
        (tmp_path / name).write_bytes(b"content")
    (tmp_path / "p.heic").write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")
    dataset = read(tmp_path)
    assert set(by_name(dataset)) == set(PICTURES)
    assert set(reasons(dataset)) == {*OTHERS[:-2], "p.heic"}
    assert "video" in reasons(dataset)["c.mp4"]


@pytest.mark.parametrize(
    "name, content",
    [
        ("metadata.csv", "file_name, text\nA.PNG,from metadata\n"),
        ("metadata.csv", ' File_Name ; Text\nA.PNG; "from metadata"\n'),
        ("metadata.csv", "file_name\ttext\nA.PNG\tfrom metadata\n"),
        ("Metadata.CSV", '"file_name","caption"\r\n" a.png","from metadata"\r\n'),
        ("metadata.jsonl", '{"File_Name": "A.png", " Text": "from metadata"}'),
        ("a.json", '{"Caption": "from metadata"}'),
    ],
)
def test_names_of_columns_and_files_in_metadata_are_folded(tmp_path, name, content):
    draw(tmp_path / "a.png")
    (tmp_path / name).write_text(content)
    dataset = read(tmp_path)
    assert (texts_of(dataset), reasons(dataset)) == ({"a.png": ("from metadata",)}, {})


def test_metadata_without_a_column_of_captions_is_named(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,words\na.png,lost\n")
    assert "no row has a caption under caption, captions, text" in reasons(read(tmp_path))["metadata.csv"]


def test_a_caption_file_of_many_megabytes_is_no_caption(tmp_path):
    limit = 16 * 1024 * 1024
    for name, size in (("a", limit), ("b", limit + 1)):
        draw(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a caption".ljust(size))
    dataset = read(tmp_path)
    assert texts_of(dataset) == {"a.png": ("a caption",)}
    assert f"b.txt' cannot be read (it is larger than {limit} bytes" in reasons(dataset)["b.png"]


def test_neither_caption_nor_trigger_is_refused_by_name(folder):
    with pytest.raises(DatasetError, match=r"1 of 3 pictures.*c\.webp"):
        check_captions(read(folder))
    check_captions(read(folder, "sks"))


def masks_of(dataset):
    return {name: example.mask.name if example.mask else None for name, example in by_name(dataset).items()}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_by_name_by_folder_and_by_transparency(tmp_path, kind):
    for name in ("a.png", "sub/b.jpg", "c.png", "plain.png"):
        draw(tmp_path / name)
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    for name in ("a-masklabel.png", "sub/masks/b.png", "masks/c.webp", "masks/nobody.png"):
        draw(tmp_path / name, color="white")
    dataset = read(tmp_path, masks=kind)
    files = {"a.png": "a-masklabel.png", "sub/b.jpg": "sub/masks/b.png", "c.png": "masks/c.webp"}
    expected = {"plain.png": None, "clear.png": "clear.png (alpha)" if kind == "alpha" else None}
    expected |= files if kind != "off" else dict.fromkeys(files)
    assert masks_of(dataset) == expected
    assert "without its picture" in reasons(dataset)["masks/nobody.png"]
    if kind == "alpha":
        assert np.asarray(by_name(dataset)["clear.png"].mask.open()).max() == 0


def test_a_folder_of_pictures_that_is_called_masks_is_no_folder_of_masks(tmp_path):
    draw(tmp_path / "venice" / "masks" / "a.png")
    draw(tmp_path / "venice" / "canal.png")
    assert set(by_name(read(tmp_path))) == {"venice/masks/a.png", "venice/canal.png"}


def test_masks_may_lie_in_a_folder_of_their_own(tmp_path):
    draw(tmp_path / "d" / "sub" / "a.jpg")
    draw(tmp_path / "m" / "sub" / "a.png", color="white")
    assert masks_of(read(tmp_path / "d", mask_folder=str(tmp_path / "m"))) == {"sub/a.jpg": "sub/a.png"}


@pytest.mark.parametrize("kind", ["auto", "off"])
def test_a_folder_of_masks_inside_the_dataset_is_not_trained_on(tmp_path, kind):
    for name in ("a.png", "b.png", "alphas/a.png", "alphas/nobody.png"):
        draw(tmp_path / name)
    (tmp_path / "alphas" / "c.arw").write_bytes(b"raw")
    (tmp_path / "alphas" / "a.txt").write_text("no caption of a picture")
    dataset = read(tmp_path, mask_folder=str(tmp_path / "alphas"), masks=kind)
    assert set(by_name(dataset)) == {"a.png", "b.png"}
    assert masks_of(dataset) == {"a.png": "a.png" if kind == "auto" else None, "b.png": None}
    named = ["a.txt", "c.arw", "nobody.png"] if kind == "auto" else []
    assert sorted(row.name for row in dataset.left_out) == named


def test_the_datasets_own_folder_is_no_folder_of_masks(tmp_path):
    draw(tmp_path / "a.png")
    with pytest.raises(DatasetError, match="every picture would be its own mask") as error:
        read(tmp_path, mask_folder=str(tmp_path / "."))
    assert error.value.input == "mask_folder"


def test_a_folder_inside_may_be_held_out(tmp_path):
    for name in ("a.png", "b.png", "check/c.png"):
        draw(tmp_path / name)
    found = by_name(read(tmp_path, validation_folder="check"))
    assert {name for name, example in found.items() if example.held_out} == {"check/c.png"}
    for wrong in ("chec", "other", "check/deeper"):
        with pytest.raises(DatasetError, match=wrong):
            read(tmp_path, validation_folder=wrong)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "a.txt").write_text("another"),
        lambda folder: Image.new("RGB", (20, 30), "blue").save(folder / "a.png"),
        lambda folder: (folder / "c.webp").unlink(),
        lambda folder: (folder / "c.txt").write_text("now with one"),
        lambda folder: draw(folder / "a-masklabel.png", (20, 30)),
        lambda folder: os.utime(folder / "a.png", ns=(0, 0)) or (folder / "sub").rename(folder / "7_sub"),
    ],
    ids=["caption edited", "picture edited", "picture removed", "caption added", "mask added", "folder renamed"],
)
def test_the_fingerprint_follows_what_is_learnt(folder, tmp_path, change):
    index = str(tmp_path / "index")
    before = read(folder, "sks", 64, index=index).fingerprint()
    cheap = scan.folder_fingerprint(str(folder))
    assert read(folder, "sks", 64, index=index).fingerprint() == before
    assert scan.folder_fingerprint(str(folder)) == cheap
    change(folder)
    assert read(folder, "sks", 64, index=index).fingerprint() != before
    assert scan.folder_fingerprint(str(folder)) != cheap


@pytest.mark.parametrize(
    "other",
    [
        {"trigger": "other"},
        {"resolution": 128},
        {"repeats": 2},
        {"handling": Augmentation(flip=True)},
        {"handling": Augmentation(keep_tokens=1)},
        {"validation_folder": "sub"},
    ],
    ids=str,
)
def test_the_fingerprint_follows_the_widgets(folder, other):
    usual = {"trigger": "sks", "resolution": 64}
    assert read(folder, **{**usual, **other}).fingerprint() != read(folder, **usual).fingerprint()


def test_a_second_look_reads_no_picture(folder, tmp_path, monkeypatch):
    index = str(tmp_path / "index")
    monkeypatch.setattr("graft_pack.trainers.data.index._TIMESTAMP_GRACE_NS", 0)
    first = read(folder, index=index)
    measured = []
    real = pictures.measure_file
    monkeypatch.setattr(pictures, "measure_file", lambda path, name: measured.append(name) or real(path, name))
    assert read(folder, index=index).fingerprint() == first.fingerprint()
    assert measured == []
    draw(folder / "a.png", (20, 30), "blue")
    assert read(folder, index=index).fingerprint() != first.fingerprint()
    assert measured == ["a.png"]
    for file in (tmp_path / "index").iterdir():
        file.write_text("{broken")
    measured.clear()
    read(folder, index=index)
    assert len(measured) == 3


def test_a_file_written_a_moment_ago_is_read_again(folder, tmp_path):
    """Its times might not distinguish the second content from the first."""
    index = str(tmp_path / "index")
    before = read(folder, index=index).fingerprint()
    stat = os.stat(folder / "a.png")
    Image.new("RGB", (20, 30), "green").save(folder / "a.png")
    os.truncate(folder / "a.png", stat.st_size) if os.path.getsize(folder / "a.png") > stat.st_size else None
    os.utime(folder / "a.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert read(folder, index=index).fingerprint() != before


def test_what_changed_between_reading_and_opening_is_noticed(folder):
    example = by_name(read(folder))["a.png"]
    draw(folder / "a.png", (20, 30), "blue")
    with pytest.raises(DatasetError, match=r"a\.png.*changed"):
        example.source.open()
    secret = folder.parent / "secret.png"
    draw(secret, (20, 30), "red")
    (folder / "a.png").unlink()
    (folder / "a.png").symlink_to(secret)
    with pytest.raises(DatasetError, match=r"a\.png.*leads out"):
        example.source.open()


def test_an_empty_folder_and_one_of_ruins_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="holds no picture"):
        read(tmp_path)
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.png.*b\.jpg"):
        read(tmp_path)


def test_combined_datasets_keep_triggers_repeats_and_ways(folder, tmp_path):
    first = read(folder, "one", 64, handling=Augmentation(flip=True))
    both = combine(first, read(folder, "two", 0, 3))
    assert [captions.unvaried_caption(example) for example in both.examples[::3]] == [
        "one, a red picture",
        "two, a red picture",
    ]
    assert [example.handling.flip for example in both.examples] == [True] * 3 + [False] * 3
    assert [example.repeats for example in both.examples] == [1] * 3 + [3] * 3
    assert (both.resolution, both.trigger) == (64, "")
    with pytest.raises(DatasetError, match="different resolutions"):
        combine(both, read(folder, "x", 128))


def test_pipes_and_locked_folders_stop_nobody(tmp_path):
    draw(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    dataset = read(tmp_path)
    assert texts_of(dataset) == {"a.png": ("",)}
    assert "not a regular file" in reasons(dataset)["pipe.png"]
    assert "links to folders" in reasons(dataset)["loop"]


def test_pictures_on_wires_need_as_many_masks_or_one():
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 3
    mask = np.full((32, 32), 255, np.uint8)
    made = from_arrays(pictures, ["a"], "sks", 0, [mask], Augmentation(flip=True))
    assert [example.mask.open().size for example in made.examples] == [(64, 64)] * 3
    assert all(example.handling.flip for example in made.examples)
    with pytest.raises(DatasetError, match="2 masks"):
        from_arrays(pictures, ["a"], "", 0, [mask] * 2)
