"""Tests of a run's folder: saved states, names, and refusals."""

import json
import os
import random
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.formats import files, json_files
from graft_pack.trainers.formats.adapter import Adapter
from graft_pack.trainers.formats.embedding import Embedding
from graft_pack.trainers.runs.checkpoint import State
from graft_pack.trainers.runs.folders import Halt, Products
from graft_pack.trainers.runs.loss_by_picture import LossByPicture
from graft_pack.trainers.runs.loss_by_timestep import BUCKETS, LossByTimestep
from graft_pack.trainers.runs.records import read_events, read_graph
from graft_pack.trainers.runs.run import Run
from graft_pack.trainers.text import safe_name
from PIL import Image

from tests.support.diffusers_host import same_state

PRODUCTS = Products(Adapter({"x": torch.zeros(1)}), Embedding({"clip_l": torch.zeros(1, 768)}, "word"))


def make_state(step=7):
    """Return a state with a value in every field."""
    return State(
        step=step,
        batches=2 * step,
        losses=[0.1, 1 / 3, 1e-30],
        validation=[(5, 0.25)],
        trainables={"a.b": torch.randn(3, 2), "c/d": torch.randn(1)},
        ema={"a.b": torch.randn(3, 2), "c/d": torch.randn(1)},
        optimizer={0: {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 2)}, 1: {"d": 0.5, "k": 3}},
        scaler={"scale": 65536.0, "_growth_tracker": 3},
        loss_by_timestep=LossByTimestep(2, [[1 / 3] * BUCKETS], [[1] * BUCKETS]),
        loss_by_picture=LossByPicture({"a.png": (3, 1 / 3)}),
    )


@pytest.fixture
def run(tmp_path):
    return Run(str(tmp_path / "run"), str(tmp_path / "loras"), str(tmp_path / "emb"))


def test_a_state_comes_back_to_the_bit(run):
    state = make_state()
    run.save(state, PRODUCTS, 2)
    back = run.load(10)
    assert same_state(back, state)
    assert same_state(state, back)


def test_the_latest_state_within_the_limit_is_taken(run):
    for step in (2, 4, 6):
        run.save(make_state(step), PRODUCTS, 10)
    assert [run.load(limit).step for limit in (2, 5, 6, 100)] == [2, 4, 6, 6]
    assert run.load(1) is None


@pytest.mark.parametrize("damage", ["empty", "junk", "half", "other version", "no header"])
def test_a_damaged_state_counts_as_absent(run, damage):
    from graft_pack.trainers.formats import files

    for step in (2, 4):
        run.save(make_state(step), PRODUCTS, 10)
    path = run.state_path(4)
    with open(path, "rb") as file:
        data = file.read()
    tensors, metadata = files.read_tensors(path)
    if damage == "other version":
        text = metadata["state"].replace('"version": 1', '"version": 99')
        assert text != metadata["state"]
        files.write_tensors(path, tensors, {"state": text})
    elif damage == "no header":
        files.write_tensors(path, tensors, {})
    else:
        with open(path, "wb") as file:
            file.write({"empty": b"", "junk": b"junk" * 100, "half": data[: len(data) // 2]}[damage])
    assert run.load(10).step == 2


def test_half_a_line_in_the_log_is_dropped(run, tmp_path):
    (tmp_path / "run").mkdir()
    for step in (1, 2, 3):
        run.log({"event": "step", "step": step})
    with open(tmp_path / "run" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "st')
    run.forget_after(2)
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 2


@pytest.mark.parametrize(
    "text, name",
    [
        ("my photos", "my-photos"),
        ("../../etc", "etc"),
        ("a/b\\c", "a-b-c"),
        ("", "run"),
        ("...", "run"),
        ("x" * 99, "x" * 60),
    ],
)
def test_any_text_gives_a_folder_name(text, name):
    assert safe_name(text) == name


def test_a_line_that_has_no_room_leaves_no_part_in_the_log(run):
    """A quota lets some of the line's bytes through."""
    os.makedirs(run.folder)
    run.log({"event": "step", "step": 1})
    path = os.path.join(run.folder, "metrics.jsonl")
    before = os.path.getsize(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, hard))
    try:
        with pytest.raises(RunError, match="metrics.jsonl' cannot be written"):
            run.log({"event": "step", "step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.path.getsize(path) == before
    run.log({"event": "step", "step": 2})
    assert [event["step"] for event in read_events(run, 9)] == [1, 2]


def test_starting_over_removes_what_a_run_writes_and_nothing_else(run):
    run.save(make_state(), PRODUCTS, 2)
    run.note_halt("stopped", 7, 9)
    run.write_graph({})
    run.log({"event": "step", "step": 1})
    run.save_samples(1, [Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 255)]])
    theirs = [os.path.join(folder, "mine.safetensors") for folder in (run.folder, run.adapters)]
    theirs.append(os.path.join(run.folder, "samples", "notes.txt"))
    for path in theirs:
        with open(path, "w") as file:
            file.write("the user's")
    run.clear()
    folders = (run.folder, run.adapters, run.embeddings)
    walked = [row for folder in folders for row in os.walk(folder)]
    left = [os.path.join(place, name) for place, _, names in walked for name in names]
    assert sorted(left) == sorted(theirs)
    for path in theirs:
        os.remove(path)
    run.clear()
    assert not any(os.path.exists(folder) for folder in folders)


@pytest.mark.parametrize("place", ["folder", "adapters", "embeddings"])
def test_a_linked_folder_of_a_run_is_neither_written_nor_emptied(run, place, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("step-00000001.safetensors", "state-00000001.safetensors", "metrics.jsonl"):
        (elsewhere / name).write_text("the user's")
    os.symlink(elsewhere, getattr(run, place))
    acts = [
        run.clear,
        run.refuse_links,
        lambda: run.save(make_state(), PRODUCTS, 1),
        lambda: run.write_recipe(None, "", {}),
    ]
    if place == "folder":
        acts += [lambda: run.log({"event": "x"}), lambda: run.save_samples(1, [Image.new("RGB", (8, 8))])]
    for act in acts:
        with pytest.raises(RunError, match="is a link"):
            act()
    assert {path.read_text() for path in elsewhere.iterdir()} == {"the user's"}
    assert len(list(elsewhere.iterdir())) == 3


LINKED = ["metrics.jsonl", "samples", "tensorboard", "recipe.json", "state-00000001.safetensors"]


@pytest.mark.parametrize("name", LINKED)
def test_a_link_inside_a_runs_folder_is_refused(run, name, tmp_path):
    target = tmp_path / "elsewhere"
    target.mkdir() if "." not in name else target.write_text("the user's")
    os.makedirs(run.folder)
    os.symlink(target, os.path.join(run.folder, name))
    for act in (run.clear, run.refuse_links, lambda: run.write_recipe(None, "", {})):
        with pytest.raises(RunError, match=f"{name}' is a link"):
            act()
    if name == "metrics.jsonl":
        with pytest.raises(RunError, match="is a link"):
            run.log({"event": "x"})
    if name == "samples":
        with pytest.raises(RunError, match="is a link"):
            run.save_samples(1, [Image.new("RGB", (8, 8))])
    assert target.is_dir() or target.read_text() == "the user's"
    assert target.is_file() or not list(target.iterdir())


def flips(data, trials, seed=0):
    """Yield (byte, data with one bit flipped) for some hundred bits, and for every bit in soak."""
    source = random.Random(seed)
    for place in range(0, len(data), trials(1 + len(data) // 200, 1)):
        for bit in range(8) if trials(0, 1) else (source.randrange(8),):
            spoilt = bytearray(data)
            spoilt[place] ^= 1 << bit
            yield place, bytes(spoilt)


@pytest.mark.soak
def test_a_flipped_bit_anywhere_in_a_state_is_noticed(run, trials, caplog):
    run.save(make_state(6), PRODUCTS, 3)
    run.save(make_state(7), PRODUCTS, 3)
    data = Path(run.state_path(7)).read_bytes()
    assert run.load(10).step == 7 and run.damaged == []
    unnoticed = []
    for place, spoilt in flips(data, trials):
        Path(run.state_path(7)).write_bytes(spoilt)
        if run.load(10).step != 6:
            unnoticed.append((place, data[max(0, place - 20) : place + 20]))
    assert not unnoticed, unnoticed[:5]
    assert [row["state"] for row in run.damaged] == [7]
    assert "is damaged" in run.damaged[0]["reason"] and "tries an earlier state" in caplog.text


def test_a_state_without_checksums_is_still_loaded(run):
    """An earlier version wrote it this way."""
    state = make_state()
    run.save(state, PRODUCTS, 2)
    files.write_tensors(run.state_path(7), *files.read_tensors(run.state_path(7)), checksums=False)
    assert files.CHECKSUMS not in files.read_header(run.state_path(7))["__metadata__"]
    assert same_state(run.load(10), state)


@pytest.mark.parametrize("name", ["recipe.json", "halted.json", "workflow.json"])
def test_a_flipped_bit_in_a_runs_json_is_noticed(run, name, trials, caplog):
    recipe = SimpleNamespace(as_json=lambda: {"steps": 9, "prompt": "caf\u00e9"})
    run.write_recipe(recipe, "0123456789abcdef", {"images": 3})
    run.note_halt("stopped", 7, 9)
    run.write_graph({"prompt": {"1": {"inputs": {"seed": 20}}}})
    path = Path(run.folder, name)
    data = path.read_bytes()

    def read():
        caplog.clear()
        run.check_identity("0123456789abcdef")
        return run.halt(), read_graph(run), "does not match its checksum" in caplog.text

    expected = read()
    assert expected == (Halt("stopped", 7, 9), {"prompt": {"1": {"inputs": {"seed": 20}}}}, False)
    for place, spoilt in flips(data, trials):
        path.write_bytes(spoilt)
        try:
            found = read()
        except RunError:
            continue
        # The flip may hit the entry's own name, or a character with two encodings; then the values are valid.
        assert (
            found != expected
            or json_files.read_json(str(path)) | {"checksum": 0} == json.loads(data) | {"checksum": 0}
            or ("checksum" not in json_files.read_json(str(path)))
        ), (place, spoilt)


def test_a_clip_is_saved_as_animated_webp_and_listed_beside_pictures(run):
    frames = [Image.new("RGB", (16, 8), (shade, 0, 0)) for shade in (0, 120, 250)]
    paths = run.save_samples(3, [frames, frames[0]], rate=8)
    assert [os.path.basename(path) for path in paths] == ["step-00000003-1.webp", "step-00000003-2.png"]
    assert run.samples() == paths and run.last_sample(9) == paths[0]
    with Image.open(paths[0]) as saved:
        assert (saved.format, saved.n_frames, saved.size) == ("WEBP", 3, (16, 8))
        for number, frame in enumerate(frames):
            saved.seek(number)
            assert abs(saved.convert("RGB").getpixel((4, 4))[0] - frame.getpixel((4, 4))[0]) <= 8
            assert saved.info["duration"] == 125
    assert run.thumbnail(9).startswith("data:image/jpeg")
