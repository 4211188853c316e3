"""Tests of trainers on a wire in the real server: each goes on from the one before, and is a run of its own."""

import re
import shutil

import pytest

from tests.support import graphs, runs
from tests.support.server import PromptError
from tests.toy import world

STEPS = 6
FIRST, SECOND, THIRD = "chain-first", "chain-second", "chain-third"


@pytest.fixture(autouse=True)
def pictures(server):
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "chain"), dirs_exist_ok=True)


def trainer(kind="GraftTrainLoRA", steps=2, **inputs):
    """Return a trainer on the graph's base and dataset."""
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0]}
    values = {"steps": steps, "learning_rate": 1e-3, "batch_size": 2, "seed": 0}
    values |= {} if kind in ("GraftFineTune", "GraftTrainEmbedding") else {"rank": 4}
    return graphs.node(kind, **{**base, **values, **inputs})


def curriculum():
    """Return a graph of three trainers: small pictures, larger ones, and a lower rate. Each has its run's name."""
    graph = graphs.training("chain", STEPS)
    graph["4"] = graphs.node("GraftLoadDataset", folder="chain", trigger="", resolution=96, repeats=1)
    graph["3"] = trainer(steps=STEPS, options=["51", 0])
    graph["5"] = trainer(steps=STEPS, dataset=["4", 0], rank=0, adapter=["3", 2], options=["52", 0])
    graph["6"] = trainer(steps=2, dataset=["4", 0], rank=0, adapter=["5", 2], learning_rate=1e-4, options=["53", 0])
    graph["9"] = graphs.node("GraftSaveAdapter", adapter=["6", 2], filename_prefix="curriculum", format="kohya")
    return graph


def with_names(server, graph):
    for id, name in (("51", FIRST), ("52", SECOND), ("53", THIRD)):
        (node,) = runs.option_nodes(server, GraftRunOptions={"name": name, "save_every": 2}).values()
        graph[id] = node
    return graph


def trained(entry, *nodes):
    """Return {node: whether its summary says that it trained}."""
    return {node: "returned without training" not in entry["outputs"][node]["text"][0] for node in nodes}


def test_killed_in_the_second_trainer_it_resumes_there_and_trains_no_step_twice(make_server):
    server = make_server()
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "chain"))
    with server:
        graph = with_names(server, curriculum())
        with server.listen() as events:
            server.queue(graph, client_id=events.client_id)
            event = events.wait_for("graft.progress", timeout=120, event="step", node="5")
            while event.data["step"] < 3:
                event = events.wait_for("graft.progress", timeout=120, event="step", node="5")
            server.kill()
        first, second = (runs.find_run(server, name) for name in (FIRST, SECOND))
        log = (first / "metrics.jsonl").read_bytes()
        reached = max(runs.states_of(second))
        assert 2 <= reached < STEPS
        server.start()
        with server.listen() as events:
            queued = server.queue(graph, client_id=events.client_id)
            started = {node: events.wait_for("graft.progress", event="run", node=node, timeout=120) for node in "356"}
            entry = server.wait(queued)
        assert {node: event.data["step"] for node, event in started.items()} == {"3": STEPS, "5": reached, "6": 0}
        assert trained(entry, "3", "5", "6") == {"3": False, "5": True, "6": True}
        third = runs.find_run(server, THIRD)
        assert runs.steps_logged(second) == [*range(1, STEPS + 1)]
        logs = [(run / "metrics.jsonl").read_bytes() for run in (first, second, third)]
        assert logs[0] == log
        # Without the host's cache, so that the runs themselves answer.
        server.restart()
        again = server.run(graph)
        assert trained(again, "3", "5", "6") == dict.fromkeys("356", False)
        assert [(run / "metrics.jsonl").read_bytes() for run in (first, second, third)] == logs
        listed = {run["name"]: run["facts"]["made_from"].get("start") for run in server.get("/graft/history")["runs"]}
        assert listed == {first.name: None, second.name: first.name, third.name: second.name}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ["3", 0]}, "input 'model': The connected model already has the connected adapter applied"),
        ({"options": ["50", 0]}, "input 'adapter': An adapter is connected, and start_from .+ too"),
        ({"rank": 2}, "input 'adapter': The adapter to start from has rank 4 in .+, but this run has rank 2"),
        ({"adapter": None}, "input 'rank': rank is 0, which stands for the rank of the adapter"),
    ],
    ids=["applied", "start_from", "rank", "no adapter"],
)
def test_what_cannot_go_on_is_refused(changes, message, server):
    graph = graphs.training("chain", 2)
    graph["3"] = trainer()
    inputs = {"rank": 0, "adapter": ["3", 2], **changes}
    graph["5"] = trainer(**{name: value for name, value in inputs.items() if value is not None})
    if "options" in changes:
        graph["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="start", format="kohya")
        saving = {name: node for name, node in graph.items() if name != "5"}
        path = server.run(saving)["outputs"]["9"]["text"][0]
        name = path.split("/loras/")[1]
        graph |= runs.option_nodes(server, GraftAdapterOptions={"start_from": name})
    with pytest.raises(PromptError) as caught:
        server.run(graph)
    assert re.search(message, caught.value.error["exception_message"])


CHAINS = {
    "DreamBooth": ("GraftTrainDreamBooth", {"train": "LoRA"}),
    "DreamBooth of all weights": ("GraftTrainDreamBooth", {"train": "all weights"}),
    "fine-tune": ("GraftFineTune", {}),
    "textual inversion": ("GraftTrainEmbedding", {"name": "my-toy"}),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_every_trainer_goes_on(chain, server):
    kind, fields = CHAINS[chain]
    if kind == "GraftTrainDreamBooth":
        prompts = {"instance_prompt": "a sks toy", "class_prompt": "a toy", "class_images": 0, "prior_weight": 0.0}
        fields = {**fields, **prompts}
    graph = graphs.training("chain", 2, trigger="sks toy")
    if kind == "GraftTrainEmbedding":
        first, start = {"init_text": "toy", "vectors": 2}, {"init_text": "", "vectors": 2, "embedding": ["3", 1]}
    else:
        first, start = {}, {"adapter": ["3", 2]}
    graph["3"] = trainer(kind, **fields, **first)
    graph["5"] = trainer(kind, **fields, **start)
    entry = server.run(graph)
    names = [entry["outputs"][node]["text"][0].split(":")[0].removeprefix("Run ") for node in ("3", "5")]
    history = {run["name"]: run["facts"]["made_from"].get("start") for run in server.get("/graft/history")["runs"]}
    assert history[names[1]] == names[0] != names[1]
