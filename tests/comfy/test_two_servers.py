"""Tests of two servers on one output folder, as with two computers on a network drive or two windows of one user."""

import shutil
import urllib.error

import pytest

from tests.support import runs
from tests.support.server import PromptError
from tests.toy import world

LONG = 100_000


@pytest.fixture
def pair(make_server):
    """Create two servers that read the same input folder and write to the same output folder."""
    first = make_server("first")
    output, folder = first.path("output"), first.path("input", "toys")
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
    second = make_server(
        "second", arguments=["--output-directory", str(output), "--input-directory", str(folder.parent)]
    )
    return first.start(), second.start()


def begin(server, graph, steps=2):
    """Queue a training, wait until so many steps are done, and return its prompt."""
    with server.listen() as events:
        queued = server.queue(graph, client_id=events.client_id)
        while events.wait_for("graft.progress", timeout=240, event="step").data["step"] < steps:
            pass
    return queued


def refusal(server, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.post(path, {})
    return caught.value.code, caught.value.read().decode()


def test_two_servers_train_and_delete_one_run_one_after_the_other(pair):
    first, second = pair
    graph = runs.graph_of(first, "toys", "shared", LONG, save_every=5)
    over = runs.graph_of(first, "toys", "shared", LONG, save_every=5, on_existing="start over")
    queued = begin(first, graph)
    run = runs.find_run(first, "shared")
    for other in (graph, over):
        held = f"Another training uses the run '{run.name}': process {first.process.pid} "
        with pytest.raises(PromptError, match=held) as caught:
            second.run(other)
        assert "disk" not in str(caught.value)
    code, text = refusal(second, f"/graft/runs/{run.name}/delete")
    assert code == 409 and f"process {first.process.pid} " in text
    # Another run trains beside it, and its saves remove none of the first run's files.
    second.run(runs.graph_of(first, "toys", "beside", 20, save_every=1))
    logged = len(runs.steps_logged(run))
    first.poll(lambda: len(runs.steps_logged(run)) > logged + 10, 120, "ten more steps")
    # A killed server blocks nothing, and no step was repeated or skipped.
    first.kill()
    taken = begin(second, graph)
    steps = runs.steps_logged(run)
    assert steps == list(range(1, len(steps) + 1))
    second.post(f"/graft/runs/{run.name}/stop", {})
    second.wait(taken)
    assert queued not in second.get("/history")
    second.post(f"/graft/runs/{run.name}/delete", {})
    assert runs.list_runs(first, "shared") == []
    assert [path.name for path in first.path("output", "graft").glob(".*")] == []


def test_a_new_run_beside_another_servers_has_a_folder_of_its_own(pair):
    first, second = pair
    begin(first, runs.graph_of(first, "toys", "apart", LONG, on_existing="new"))
    run = runs.find_run(first, "apart")
    second.run(runs.graph_of(first, "toys", "apart", 3, on_existing="new"))
    other = run.with_name(f"{run.name}-2")
    assert runs.steps_logged(other) == [1, 2, 3]
    logged = runs.steps_logged(run)
    assert logged == list(range(1, len(logged) + 1))


def test_processes_of_a_graph_hold_the_run_together(pair):
    """The graph's server and the trainer are separate processes; if both are killed, neither blocks the run."""
    first, second = pair
    graph = runs.graph_of(first, "toys", "processes", LONG, processes=2, save_every=5)
    graph["3"]["inputs"]["batch_size"] = 2
    begin(first, graph)
    run = runs.find_run(first, "processes")
    with pytest.raises(PromptError, match=f"Another training uses the run '{run.name}'"):
        second.run(graph)
    first.kill()
    queued = begin(second, graph)
    second.post(f"/graft/runs/{run.name}/stop", {})
    second.wait(queued)
    steps = runs.steps_logged(run)
    assert steps == list(range(1, len(steps) + 1))
