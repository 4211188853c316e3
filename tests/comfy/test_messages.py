"""Tests of the messages that training nodes send to the pages, and of those kept for pages that open later."""

import math
from types import SimpleNamespace

import pytest


@pytest.fixture
def browser(comfy, monkeypatch):
    from graft_pack.nodes.host.server import messages as browser

    monkeypatch.setattr(browser, "MESSAGES", browser.MessageStore())
    return browser


@pytest.fixture
def sent(browser, monkeypatch):
    """Return the list of messages sent to the pages, in order."""
    messages = []
    server = SimpleNamespace(send_sync=lambda event, message: messages.append((event, message)))
    monkeypatch.setattr(browser, "prompt_server", lambda: server)
    return messages


def message(event, node="3", workflow="w", **fields):
    return {"node": node, "workflow": workflow, "prompt_id": "p", "event": event, **fields}


def test_the_last_message_of_each_kind_is_kept_in_order(browser, sent):
    for event, fields in [
        ("begin", {}),
        ("run", {"name": "r"}),
        ("step", {"step": 1}),
        ("saved", {}),
        ("step", {"step": 2}),
    ]:
        browser.send(message(event, **fields))
    kept = browser.MESSAGES.messages()
    assert [one["event"] for one in kept] == ["begin", "run", "saved", "step"] and kept[-1]["step"] == 2
    assert len(sent) == 5 and all(event == "graft.progress" for event, _ in sent)


def test_what_begins_anew_forgets_its_own_and_nothing_else(browser):
    for node, workflow in (("3", "w"), ("3", "other"), ("1:3", "w")):
        for event in ("begin", "failed"):
            browser.MESSAGES.note(message(event, node, workflow))
    browser.MESSAGES.note(message("begin"))
    kept = [(one["node"], one["workflow"], one["event"]) for one in browser.MESSAGES.messages()]
    assert kept == [
        ("3", "other", "begin"),
        ("3", "other", "failed"),
        ("1:3", "w", "begin"),
        ("1:3", "w", "failed"),
        ("3", "w", "begin"),
    ]


def test_no_more_is_kept_than_of_so_many_nodes(browser):
    for node in range(500):
        browser.MESSAGES.note(message("begin", str(node)))
    nodes = [one["node"] for one in browser.MESSAGES.messages()]
    assert nodes == [str(node) for node in range(500 - browser._MOST_NODES, 500)]


def test_numbers_that_json_has_not_become_none(browser, sent):
    browser.send(message("step", loss=math.nan, losses=[1.0, math.inf]))
    assert sent[0][1]["loss"] is None and sent[0][1]["losses"] == [1.0, None]


@pytest.mark.parametrize(
    "extra, found",
    [
        ({"extra_pnginfo": {"workflow": {"id": "an id"}}}, "an id"),
        ({"extra_pnginfo": {"workflow": {}}}, ""),
        ({"extra_pnginfo": {"workflow": {"id": 5}}}, ""),
        ({"extra_pnginfo": {"workflow": {"id": "x" * 1000}}}, ""),
        ({"extra_pnginfo": {"workflow": ["id"]}}, ""),
        ({"extra_pnginfo": None}, ""),
        ({}, ""),
    ],
)
def test_the_workflow_of_a_prompt(browser, monkeypatch, extra, found):
    running = {0: (0, "another", {}, {"extra_pnginfo": {"workflow": {"id": "no"}}}, []), 1: (1, "p", {}, extra, [])}
    server = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=running))
    monkeypatch.setattr(browser, "prompt_server", lambda: server)
    assert browser.workflow_of("p") == found
    assert browser.workflow_of("nobody's") == ""
    # The run keeps it, if there is one; anyone may have written the data beside a prompt.
    workflow = (extra.get("extra_pnginfo") or {}).get("workflow")
    assert browser.graph_of("p") == {"prompt": {}, **({"workflow": workflow} if isinstance(workflow, dict) else {})}


def test_runs_of_one_node_are_kept_apart_by_their_inputs(browser):
    for inputs, event in (("a", "begin"), ("a", "done"), ("b", "begin"), ("b", "step"), ("a", "begin")):
        browser.MESSAGES.note(message(event, inputs=inputs))
    kept = [(one["inputs"], one["event"]) for one in browser.MESSAGES.messages()]
    assert kept == [("b", "begin"), ("b", "step"), ("a", "begin")]


GRAPH = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a"}, "_meta": {"title": "x"}},
    "2": {"class_type": "GraftRunOptions", "inputs": {"name": "n", "save_every": 5, "validation_fraction": 0.1}},
    "3": {"class_type": "GraftPreviewOptions", "inputs": {"prompts": "p", "options": ["2", 0]}},
    "4": {"class_type": "GraftTrainLoRA", "inputs": {"model": ["1", 0], "steps": 9, "rank": 4, "options": ["3", 0]}},
    "5": {"class_type": "KSampler", "inputs": {"model": ["4", 0], "steps": 20}},
}


def test_the_sources_of_a_training_decide_its_run(browser, monkeypatch):
    running = {1: (1, "p", GRAPH, {}, [])}
    server = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=running))
    monkeypatch.setattr(browser, "prompt_server", lambda: server)
    found = browser.sources_of("p", "4")
    assert found == {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "a"}},
        "2": {"class_type": "GraftRunOptions", "inputs": {"name": "n", "validation_fraction": 0.1}},
        "4": {"class_type": "GraftTrainLoRA", "inputs": {"model": ["1", 0], "rank": 4, "options": ["2", 0]}},
    }
    assert browser.sources_of("p", "5")["5"]["inputs"]["steps"] == 20, "another node's steps decide"
    assert browser.sources_of("p", "9") is None and browser.sources_of("other", "4") is None
    assert len({browser.digest_of(browser.sources_of("p", node)) for node in ("1", "4", "9")}) == 3
    monkeypatch.setattr(browser, "_SOURCES_LIMIT", 100)
    assert browser.sources_of("p", "4") is None


def test_the_steps_of_a_trainer_before_this_one_decide(browser, monkeypatch):
    """It starts from what they made. Its own steps do not decide its run."""
    later = {"class_type": "GraftTrainLoRA", "inputs": {"model": ["1", 0], "steps": 9, "adapter": ["4", 2]}}
    graph = {**GRAPH, "7": later}
    server = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running={1: (1, "p", graph, {}, [])}))
    monkeypatch.setattr(browser, "prompt_server", lambda: server)
    found = browser.sources_of("p", "7")
    assert "steps" not in found["7"]["inputs"]
    assert found["4"]["inputs"]["steps"] == GRAPH["4"]["inputs"]["steps"]


UNSET = {
    "GraftRunOptions": {"name": "", "on_existing": "auto", "save_every": 7, "validation_fraction": 0.0},
    "GraftPreviewOptions": {"prompts": ["1", 0], "every": 5},
    "GraftMemoryOptions": {"micro_batch": 2},
    "GraftOptimizerOptions": {"optimizer": "auto", "beta1": -1},
    "GraftObjectiveOptions": {"loss": "auto"},
    "GraftAdapterOptions": {"start_from": "auto", "alpha": 0.0},
    "GraftPivotalOptions": {"name": ""},
}


@pytest.mark.parametrize("kind", UNSET)
def test_an_option_node_that_sets_nothing_is_no_source(browser, monkeypatch, kind):
    """Neither at the end of a chain nor within it; a set value makes it one."""

    def sources(*chain):
        options = {f"o{place}": {"class_type": name, "inputs": dict(inputs)} for place, (name, inputs) in chain}
        for place in list(range(len(options)))[1:]:
            options[f"o{place}"]["inputs"]["options"] = [f"o{place - 1}", 0]
        train = {**GRAPH["4"]["inputs"], "options": [f"o{len(options) - 1}", 0]} if options else {"model": ["1", 0]}
        graph = {**GRAPH, **options, "4": {"class_type": "GraftTrainLoRA", "inputs": train}}
        running = {1: (1, "p", graph, {}, [])}
        server = SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=running))
        monkeypatch.setattr(browser, "prompt_server", lambda: server)
        return browser.sources_of("p", "4")

    unset, other = (kind, UNSET[kind]), ("GraftOptimizerOptions", {"optimizer": "Lion"})
    assert "options" not in sources((0, unset))["4"]["inputs"]
    for chain in ([unset, other], [other, unset], [unset, other, unset]):
        found = sources(*enumerate(chain))
        assert [entry["inputs"] for entry in found.values() if entry["class_type"].endswith("Options")] == [other[1]]
    if kind in ("GraftPreviewOptions", "GraftMemoryOptions"):
        return
    name = next(iter(UNSET[kind]))
    assert sources((0, (kind, {**UNSET[kind], name: "else"})))["4"]["inputs"]["options"] == ["o0", 0]


def test_inputs_that_choose_no_run_are_the_recipes_own(browser):
    """The skipped widgets are fields that a recipe's identity leaves out."""
    from graft_pack.trainers.recipe.options import RECIPE_OPTIONS

    free = {name for name, option in RECIPE_OPTIONS.items() if not option.decides}
    skipped = {"save_every", "keep_last", "validate_every", "gradient_check", "tensorboard", "processes"}
    skipped |= {"keep_best", "stop_when", "patience", "tag_frequency", "give_way"}
    assert browser._NEUTRAL["GraftRunOptions"] == skipped
    assert skipped | {"steps"} < free
    assert free - skipped >= {"name", "on_existing", "start_from"}


def test_where_the_host_keeps_no_workflows_none_is_kept(browser, monkeypatch):
    from comfy.cli_args import args
    from graft_pack.nodes.host.actions import train as training

    monkeypatch.setattr(training, "graph_of", lambda prompt: {"prompt": {"1": {}}} if prompt == "p" else {})
    kept = [training._graph(SimpleNamespace(prompt=prompt)) for prompt in ("p", "nobody's")]
    assert kept == [{"prompt": {"1": {}}}, None]
    monkeypatch.setattr(args, "disable_metadata", True)
    assert training._graph(SimpleNamespace(prompt="p")) is None


def test_a_host_without_a_server_is_told_nothing(browser, monkeypatch):
    monkeypatch.setattr(browser, "prompt_server", lambda: None)
    browser.send(message("begin"))
    assert browser.workflow_of("p") == ""


def test_steps_that_come_fast_are_told_together_and_none_is_lost(comfy, monkeypatch):
    from graft_pack.nodes.host.server import control, progress

    told = []
    clock = iter(x * 0.03 for x in range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    training = control.Training("3", "p")
    monkeypatch.setattr(training, "send", lambda event, payload: told.append((event, payload)))
    report = progress.Progress(training, 40)
    for step in range(1, 41):
        report("step", {"event": "step", "step": step, "steps": 40, "loss": float(step), "lr": 1.0, "seconds": 0.03})
    assert 5 <= len(told) <= 25
    assert [loss for _, payload in told for loss in payload["losses"]] == [float(step) for step in range(1, 41)]
    assert told[-1][1]["step"] == 40
    used, there_is = told[-1][1]["memory"]
    assert 0 < used < there_is


def test_the_page_gets_the_accuracy_of_the_last_fifty_steps(comfy, monkeypatch):
    from graft_pack.nodes.host.server import control, progress

    told = []
    training = control.Training("3", "p")
    monkeypatch.setattr(training, "send", lambda event, payload: told.append(payload))
    monkeypatch.setattr(progress, "_PAUSE", 0.0)
    report = progress.Progress(training, 60)
    event = {"event": "step", "steps": 60, "loss": 0.5, "lr": 1.0, "seconds": 0.03}
    for step in range(1, 61):
        report("step", {**event, "step": step, "accuracy": float(step > 30)})
    assert [told[step - 1]["accuracy"] for step in (30, 40, 60)] == [0.0, 0.25, 0.6]
