"""Tests of the history's view of a run, whatever its folder holds, and of deleting a run."""

import json
import os

import pytest
from graft_pack.trainers.errors import RunError
from graft_pack.trainers.runs import history, records
from graft_pack.trainers.runs.folders import Folders

NAME = "toy-00000001"


@pytest.fixture
def folders(tmp_path):
    return Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "emb")))


@pytest.fixture
def write(folders):
    """Return write(name, losses, checked), which writes a run with these losses of steps 1, 2, ... and returns it."""

    def write_run(name=NAME, losses=(), checked=(), extra=b""):
        run = records.Run.named(folders, name)
        os.makedirs(run.folder)
        with open(run.recipe_path, "w") as file:
            json.dump({"recipe": {"steps": 9, "rank": 4}, "images": 3, "left_out": ["a"]}, file)
        lines = [{"event": "step", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        lines += [{"event": "validation", "step": step, "loss": loss} for step, loss in checked]
        with open(os.path.join(run.folder, "metrics.jsonl"), "wb") as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
            file.write(extra)
        return run

    return write_run


def test_losses_are_means_of_a_tenth_of_the_run(write):
    """Compared with a plain mean of each window; 2 steps per window for 20 steps."""
    values = [5, 3, 4, 1, 2, 9, 8, 7, 6, 5, 4, 3, 2, 3, 4, 5, 6, 7, 3, 4]
    found = history.losses_of(write(losses=values, checked=[(10, 0.5), (20, 0.25)]))
    means = {end: sum(values[end - 2 : end]) / 2 for end in range(2, 21)}
    assert (found.final, found.best) == (means[20], min(means.values()))
    assert means[found.best_step] == found.best
    assert found.checked == ((10, 0.5), (20, 0.25))
    assert [step for step, _ in found.curve] == list(range(1, 21)) and found.curve[0][1] == 5


def test_a_long_curve_is_thinned_and_keeps_its_end(write):
    found = history.losses_of(write(losses=[1.0] * 10_001))
    assert 120 < len(found.curve) <= 240
    assert found.curve[-1] == (10_001, pytest.approx(1.0))


@pytest.mark.parametrize(
    "extra",
    [
        b"",
        b"{",
        b"[1]\n",
        b"\xff\n",
        b'{"event": "step", "step": "3", "loss": 1}\n',
        b'{"event": "step", "step": 3, "loss": 1%s}\n' % (b"0" * 400),
        b"[" * 100_000,
    ],
)
def test_any_log_gives_what_can_be_read_of_it(write, extra):
    odd = b'{"event": "step", "step": 2, "loss": 7}\n{"event": "step", "step": 4, "loss": NaN}\n'
    found = history.losses_of(write(losses=[1.0, 3.0], extra=odd + extra))
    assert found.final == 3.0 and [step for step, _ in found.curve] == [1, 2]


def test_a_log_that_grew_is_read_again(write):
    run = write(losses=[1.0])
    assert history.losses_of(run).final == 1.0
    with open(os.path.join(run.folder, "metrics.jsonl"), "a") as file:
        file.write('{"event": "step", "step": 2, "loss": 4}\n')
    assert history.losses_of(run).final == 4.0


def test_pages_of_the_history(folders, write):
    for number in range(5):
        run = write(f"{'Cat' if number % 2 else 'dog'}-0000000{number}", losses=[number])
        os.utime(run.folder, (number, number))
    assert history.list_summaries(folders, "", 0, 2)[1] == 5
    names = [one.record.name for page in (0, 2, 4) for one in history.list_summaries(folders, "", page, 2)[0]]
    assert names == ["dog-00000004", "Cat-00000003", "dog-00000002", "Cat-00000001", "dog-00000000"]
    found, total = history.list_summaries(folders, "cAT", 0, 9)
    assert total == 2 and found[0].losses.final == 3 and found[0].recipe["rank"] == 4
    assert found[0].facts == {"images": 3} and not found[0].has_graph and found[0].picture is None


def test_a_run_that_is_removed_while_it_is_listed_is_left_out(folders, write, monkeypatch):
    """Another page may delete it after the folder was listed and before the run is read."""
    write()
    gone = write("toy-00000002")
    stat = os.stat

    def remove_first(path, *given, **named):
        if path == gone.folder:
            raise FileNotFoundError(path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "stat", remove_first)
    assert [one.name for one in records.list_records(folders, 10)] == [NAME]
    assert [one.record.name for one in history.list_summaries(folders, "", 0, 10)[0]] == [NAME]


def test_a_file_that_a_training_removes_meanwhile_takes_no_run_out_of_the_list(folders, write, monkeypatch):
    """A saved state is pruned after its folder was listed and before it is read."""
    pruned = os.path.join(write(losses=[1.0]).folder, "state-00000001.safetensors")
    with open(pruned, "w"):
        pass
    stat = os.lstat

    def prune_first(path, *given, **named):
        if path == pruned:
            os.remove(path)
        return stat(path, *given, **named)

    monkeypatch.setattr(os, "lstat", prune_first)
    (found,), _ = history.list_summaries(folders, "", 0, 9)
    assert found.record.name == NAME and found.size > 0


def test_a_deleted_run_is_gone_and_nothing_else(folders, write):
    run, other = write(losses=[1.0]), write("toy-00000002")
    # An earlier version left it there, below the folder that loaders list.
    kept = os.path.join(folders.adapters, run.name, "step-00000001.safetensors")
    for path in (kept, os.path.join(run.adapters, "step-00000001.safetensors")):
        os.makedirs(os.path.dirname(path))
        open(path, "w").close()
    history.delete_run(run)
    assert os.listdir(folders.runs) == [other.name] and os.path.exists(kept)
    with pytest.raises(RunError):
        records.find_run(folders, NAME)


def test_a_run_that_cannot_be_removed_stays_whole(folders, write, monkeypatch):
    run = write(losses=[1.0])

    def refuse(*_):
        raise PermissionError("in use")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(RunError, match="in use"):
        history.delete_run(run)
    assert history.list_summaries(folders, "", 0, 9)[0][0].losses.final == 1.0


def test_what_could_not_be_removed_is_not_listed_and_goes_with_the_next(folders, write, monkeypatch):
    remove = history.shutil.rmtree
    monkeypatch.setattr(history.shutil, "rmtree", lambda *given, **named: None)
    history.delete_run(write())
    assert len(os.listdir(folders.runs)) == 1 and history.list_summaries(folders, "", 0, 9) == ([], 0)
    monkeypatch.setattr(history.shutil, "rmtree", remove)
    history.delete_run(write("toy-00000002"))
    assert os.listdir(folders.runs) == []


@pytest.mark.parametrize("text", ["[]", "{", '{"prompt": 3}'])
def test_a_graph_that_is_none_is_not_given(write, text):
    run = write()
    with pytest.raises(RunError, match="no saved workflow"):
        records.read_graph(run)
    with open(run.graph_path, "w") as file:
        file.write(text)
    if text.startswith("{") and text.endswith("}"):
        assert records.read_graph(run) == {}
    else:
        with pytest.raises(RunError, match=r"workflow\.json"):
            records.read_graph(run)


def test_the_graph_is_kept_and_read_back(write):
    run = write()
    graph = {"prompt": {"1": {"class_type": "A"}}, "workflow": {"nodes": []}}
    run.write_graph({**graph, "other": 1})
    assert records.read_graph(run) == graph and records.has_graph(run)
