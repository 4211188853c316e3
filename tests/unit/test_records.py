"""Tests of the list of runs on disk: it contains runs only, whatever else lies there."""

import os
import sys

import pytest
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.runs import records
from graft_pack.trainers.runs.folders import Folders, is_name
from graft_pack.trainers.text import safe_name
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def folders(tmp_path):
    """Return folders with a run, `toy-00000001`, and one outside that looks like a run."""
    found = Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "emb")))
    for folder in (tmp_path / "runs" / "toy-00000001", tmp_path / "secret-00000001"):
        folder.mkdir(parents=True)
        (folder / "recipe.json").write_text('{"recipe": {"steps": 4}}')
    return found


def test_a_run_is_found_and_told_of(folders):
    run = records.find_run(folders, "toy-00000001")
    record = records.record_of(run)
    assert (record.name, record.step, record.steps, record.status) == ("toy-00000001", 0, 4, "unfinished")
    assert [one.name for one in records.list_records(folders, 10)] == ["toy-00000001"]


@given(st.text(max_size=80))
def test_every_label_gives_a_run_that_can_be_found_again(text):
    assert is_name(f"{safe_name(text)}-0123abcd") and is_name(f"{safe_name(text)}-0123abcd-2")


@given(st.text(max_size=40) | st.text(alphabet="./\\:~-0a", max_size=20))
def test_a_name_is_one_part_of_a_path(text):
    for name in (text, f"{text}-0123abcd"):
        if is_name(name):
            assert os.path.basename(name) == name and not set(name) & set('/\\:*?"<>|\0\n') and name[0] != "."


@pytest.mark.parametrize("name", ["con.x-00000001", "NUL.-00000001", "lpt1.a-00000001"])
def test_names_that_windows_keeps_are_none(name):
    assert not is_name(name)
    assert is_name(f"{safe_name(name)}-00000001")


def test_a_folder_that_no_run_can_have_is_not_found(folders, tmp_path):
    """It was made on another system or by hand."""
    for name in ("con.x-00000001", "cache", ".hidden-00000001"):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "recipe.json").write_text('{"recipe": {"steps": 4}}')
        with pytest.raises(RunError, match="no such run"):
            records.find_run(folders, name)


@pytest.mark.parametrize(
    "name", ["../secret-00000001", "..\\secret-00000001", "", ".", "toy-00000001/", "toy-00000002"]
)
def test_what_is_no_run_is_not_found(folders, name):
    with pytest.raises(RunError, match="no such run"):
        records.find_run(folders, name)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("what", ["folder", "recipe", "log"])
def test_links_lead_nowhere(folders, tmp_path, what):
    secret = tmp_path / "secret-00000001"
    (secret / "metrics.jsonl").write_text('{"event": "secret"}\n')
    run = tmp_path / "runs" / "other-00000001"
    if what == "folder":
        run.symlink_to(secret)
    else:
        run.mkdir()
        if what == "recipe":
            (run / "recipe.json").symlink_to(secret / "recipe.json")
        else:
            (run / "recipe.json").write_text('{"recipe": {"steps": 4}}')
            (run / "metrics.jsonl").symlink_to(secret / "metrics.jsonl")
    if what == "log":
        assert records.read_events(records.find_run(folders, run.name), 10) == []
    else:
        with pytest.raises(RunError):
            records.find_run(folders, run.name)
        assert [one.name for one in records.list_records(folders, 10)] == ["toy-00000001"]


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"recipe": []}', '{"recipe": {"steps": "4"}}', "[" * 100_000, "\xff" * 9]
)
def test_a_recipe_that_is_none_is_said_to_be(folders, tmp_path, text):
    (tmp_path / "runs" / "toy-00000001" / "recipe.json").write_text(text, encoding="latin-1")
    with pytest.raises(RunError, match=r"recipe\.json"):
        records.record_of(records.find_run(folders, "toy-00000001"))
    assert records.list_records(folders, 10) == []


@given(st.binary(max_size=200))
def test_any_log_is_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("log")
    (folder / "metrics.jsonl").write_bytes(data + b'\n{"event": "step", "step": 3}\n')
    run = records.Run(str(folder), "", "")
    assert records.read_events(run, 1)[-1:] == [{"event": "step", "step": 3}]


def test_numbers_that_json_has_not_become_nothing():
    value = {"a": float("nan"), "b": [float("inf"), 1.5, (2, -float("inf"))], 3: "x"}
    assert records.jsonable(value) == {"a": None, "b": [None, 1.5, [2, None]], "3": "x"}
