"""Tests of names, notes and picked saves of runs: kept complete, read strictly, and no user file is overwritten."""

import json
import os

import pytest
from graft_pack.trainers.errors import RunError, SettingsError
from graft_pack.trainers.runs import history, notes, records, saves
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.runs.run import Run

NAME = "toy-00000001"


@pytest.fixture
def folders(tmp_path):
    return Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "emb")))


@pytest.fixture
def run(folders):
    """Return a run with saves of steps 2 and 4, and one of step 1 at an earlier version's place."""
    run = Run.named(folders, NAME)
    os.makedirs(run.folder)
    with open(run.recipe_path, "w") as file:
        json.dump({"recipe": {"steps": 9}}, file)
    for folder, step in ((run.adapters, 2), (run.adapters, 4), (os.path.join(folders.adapters, NAME), 1)):
        write(os.path.join(folder, f"step-{step:08d}.safetensors"), b"step %d" % step)
    return run


def write(path, data):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def listed(folders):
    """Return the files that the host's loaders list, below the adapters folder."""
    return sorted(
        os.path.relpath(os.path.join(folder, name), folders.adapters)
        for folder, _, names in os.walk(folders.adapters)
        for name in names
    )


def test_saves_are_not_listed_until_one_is_picked(folders, run):
    earlier = os.path.join(NAME, "step-00000001.safetensors")
    assert listed(folders) == [earlier]
    assert list(saves.list_saves(folders, run)) == [1, 2, 4]
    picked = saves.pick_save(folders, run, 4)
    assert picked == {"adapter": f"{NAME}-step-4.safetensors"} and listed(folders) == [picked["adapter"], earlier]
    with open(os.path.join(folders.adapters, picked["adapter"]), "rb") as file:
        assert file.read() == b"step 4"
    # A listed file stays where workflows name it, and a second pick makes no second file.
    assert saves.pick_save(folders, run, 1) == {"adapter": earlier}
    assert saves.pick_save(folders, run, 4) == picked and len(listed(folders)) == 2


def test_a_run_that_started_over_does_not_offer_the_saves_of_before(folders, run):
    with open(run.recipe_path, "w") as file:
        json.dump({"recipe": {"steps": 9}, saves.SAVES_IN_FOLDER: True}, file)
    assert list(saves.list_saves(folders, run)) == [2, 4]
    with pytest.raises(RunError, match="no save of step 1"):
        saves.pick_save(folders, run, 1)


def test_a_picked_save_has_the_runs_title(folders, run):
    notes.write_notes(run, notes.Notes("My cat: red"))
    theirs = os.path.join(folders.adapters, "My-cat-red-step-2.safetensors")
    write(theirs, b"of the user")
    os.symlink(theirs, theirs.replace("step-2", "step-2-2"))
    assert saves.pick_save(folders, run, 2) == {"adapter": "My-cat-red-step-2-3.safetensors"}
    with open(theirs, "rb") as file:
        assert file.read() == b"of the user"


def test_an_embedding_is_picked_too(folders, run):
    write(os.path.join(run.embeddings, "step-00000004.safetensors"), b"word")
    names = {"adapter": f"{NAME}-step-4.safetensors", "embedding": f"{NAME}-step-4.safetensors"}
    assert saves.pick_save(folders, run, 4) == names
    assert os.listdir(folders.embeddings) == [names["embedding"]]


@pytest.mark.parametrize("step", [3, 0, -1, 10**12])
def test_a_step_without_a_save_is_refused(folders, run, step):
    with pytest.raises(RunError, match="no save of step"):
        saves.pick_save(folders, run, step)


def test_links_are_no_saves(folders, run, tmp_path):
    write(str(tmp_path / "secret"), b"secret")
    os.symlink(tmp_path / "secret", os.path.join(run.adapters, "step-00000005.safetensors"))
    os.symlink(tmp_path, run.embeddings)
    assert list(saves.list_saves(folders, run)) == [1, 2, 4]


def test_notes_are_kept_and_found_by_search(folders, run):
    other = Run.named(folders, "other-00000002")
    os.makedirs(other.folder)
    with open(other.recipe_path, "w") as file:
        json.dump({"recipe": {"steps": 9}}, file)
    os.utime(run.folder, (5, 5))
    notes.write_notes(run, notes.parse_notes("  The red\n cat ", "rank 8\nwas better "))
    assert notes.read_notes(run) == notes.Notes("The red cat", "rank 8\nwas better")
    assert os.stat(run.folder).st_mtime == 5, "the history's order is that of the trainings"
    for text, found in (("RED cat", 1), ("was better", 1), ("blue", 0), ("", 2), ("toy", 1)):
        assert history.list_summaries(folders, text, 0, 9)[1] == found, text
    ((summary,), _) = history.list_summaries(folders, "red", 0, 9)
    assert summary.notes.title == "The red cat" and summary.saves == (1, 2, 4)


@pytest.mark.parametrize(
    "title, note",
    [("x" * 81, ""), ("", "x" * 2001), (5, ""), ("", None), ("a\0b", ""), ("", "\x1b[0m"), ("\ud800", "")],
)
def test_notes_that_are_no_text_are_refused(title, note):
    with pytest.raises(SettingsError):
        notes.parse_notes(title, note)


@pytest.mark.parametrize(
    "held", [b"", b"{", b"[]", b"null", b'{"title": 5, "note": ""}', b'{"title": "a"}', b"\xff", b" " * 100_000, b"["]
)
def test_a_damaged_file_of_notes_counts_for_nothing(folders, run, held):
    write(os.path.join(run.folder, "notes.json"), held)
    assert notes.read_notes(run) == notes.Notes()
    assert records.record_of(run).name == NAME and history.list_summaries(folders, "", 0, 9)[1] == 1


def test_notes_that_are_a_link_are_not_read_nor_written_through(folders, run, tmp_path):
    outside = tmp_path / "outside.json"
    outside.write_text('{"title": "secret", "note": ""}')
    os.symlink(outside, os.path.join(run.folder, "notes.json"))
    assert notes.read_notes(run) == notes.Notes()
    notes.write_notes(run, notes.Notes("mine"))
    assert notes.read_notes(run).title == "mine" and "secret" in outside.read_text()
