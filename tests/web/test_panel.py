"""Tests of the live panel in ComfyUI's own page, in both renderers: a real training watched, steered, found again."""

import copy
import json
import time
import uuid

import numpy as np
import pytest
from selenium.webdriver.common.by import By

from docs.build import make_blueprint, make_panel_pictures
from tests.support import graphs
from tests.support import panel as panels
from tests.support.browser import EMPTY, Browser
from tests.support.history import HistoryView
from tests.support.host import ROOT
from tests.support.server import PromptInterrupted

pytestmark = [pytest.mark.browser, pytest.mark.server]

PAGE = ROOT / "docs" / "runs.md"
# For tests of what the server does, which take long: `make soak` runs them in both renderers.
IN_NEW_RENDERER = pytest.mark.soak(only_for={"new_renderer": False})
LONG = 3000
SHORT = 6

# The note's line on every training of these tests, because small pictures train fast.
WARNING = "resolution 64 is far from the 512 pixels that SD1 was made for."


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "nodes2"])
def new_renderer(request):
    return request.param


@pytest.fixture(scope="module")
def page(server, chromium, new_renderer):
    return chromium.open(server.url, {"Comfy.VueNodes.Enabled": new_renderer})


@pytest.fixture
def opened(page, graph, request, server):
    """Return opened(steps, **preview and run options), which loads the graph as the test's own workflow and run."""
    known = len(page.read_errors())

    def open_graph(steps, **fields):
        name = "".join(letter for letter in request.node.name if letter.isalnum())
        workflow = {**graph, "id": str(uuid.uuid5(uuid.NAMESPACE_DNS, request.node.name))}
        page.load(workflow)
        panels.set_values(page, steps=steps, name=name, **fields)
        panels.look_at(page)
        return panels.PanelView(page)

    yield open_graph
    server.interrupt()
    server.poll(server.is_idle, 60, "the queue")
    assert page.read_errors()[known:] == []


def test_a_run_fills_the_panel(opened, page, server, new_renderer, tmp_path):
    panel = opened(SHORT, every=3, validation_fraction=0.2, validate_every=2)
    assert (panel.phase(), panel.buttons()) == ("idle", [])
    server.wait(page.queue())
    panel.wait("finished")
    assert panel.count() == f"{SHORT} / {SHORT}"
    assert panel.points() == list(range(1, SHORT + 1))
    assert [step for step, _ in panel.state()["validation"]] == [2, 4, 6]
    assert panel.pictures() == ["Base", "3", "6"]
    assert panel.is_drawn()
    assert not panel.has_host_preview(), "the pictures are in the panel"
    facts = panel.facts()
    assert facts["Learning rate"] == "2e-3" and facts["Epoch"] != "\u2013"
    assert all(float(facts[name]) > 0 for name in ("Loss", "Smoothed", "Validation"))
    assert f"of {SHORT}" in panel.label("canvas") and "Validation loss" in panel.label("canvas")
    assert "Finished" in panel.announced()
    assert panel.list_cramped() == []
    assert (count_dots(page) >= 2) == new_renderer
    check_looks(page, panel, new_renderer, tmp_path)
    # Queued again unchanged: the host answers from its cache, and the panel stays the same.
    entry = server.wait(page.queue())
    assert entry["outputs"] and panel.phase() == "finished"
    # With a changed input that does not affect the result: the run is returned, and the panel says so.
    panels.set_values(page, save_every=400)
    server.wait(page.queue())
    panel.wait("returned")
    panel.wait_for_past()
    assert panel.points() == list(range(1, SHORT + 1)) and panel.pictures() == ["Base", "3", "6"]
    name = panel.state()["run"].rpartition("-")[0]
    assert len(list(server.path("output", "graft").glob(f"{name}-*"))) == 1, "one run, however often it is queued"


def count_dots(page):
    """Count the sockets of Graft's own types that the trainer shows in a color; on the canvas they are not elements."""
    return page.js("""
        const dots = document.querySelectorAll('.lg-node:has(.graft-panel) [style*="color-datatype-GRAFT_"]');
        return [...dots].filter(dot => getComputedStyle(dot).backgroundColor !== 'rgba(0, 0, 0, 0)').length;""")


def check_looks(page, panel, new_renderer, folder):
    """Check the panel pictures of docs/runs.md: the panel is drawn in each theme, in the theme's shades."""
    taken = make_panel_pictures.take_looks(page)
    written = make_panel_pictures.write(taken, "nodes2" if new_renderer else "canvas", folder)
    assert all((ROOT / "assets" / path.name).exists() and path.name in PAGE.read_text() for path in written)
    shades = {theme: np.asarray(picture.convert("L"), dtype=float) for theme, picture in taken.items()}
    assert np.median(shades["dark"]) < 80 and np.median(shades["light"]) > 175
    # Lines, letters and pictures: in each theme they are visible and not in the other theme's colors.
    assert all(np.abs(shade - np.median(shade)).std() > 15 for shade in shades.values())
    # The panel also follows the change back.
    panel.wait_until_drawn()


@pytest.fixture(scope="module")
def other_chromium(tmp_path_factory):
    """Start a second Chromium with its own profile."""
    with Browser(tmp_path_factory.mktemp("other")) as browser:
        yield browser


@pytest.fixture
def other_browser(other_chromium):
    yield other_chromium
    other_chromium.leave()


@IN_NEW_RENDERER
def test_a_reload_finds_the_run_and_another_browser_stops_it(opened, page, server, new_renderer, other_browser):
    opened(LONG, every=LONG, save_every=LONG)
    prompt = page.queue()
    panel = panels.PanelView(page)
    panel.wait_for_step(4)
    saved = page.serialize()
    page.open()
    # The page restores its workflow by itself; if it does not, the user opens it again.
    if not page.js("return app.graph.nodes.some(node => node.type === 'GraftTrainLoRA');"):
        page.load(saved)
    panels.look_at(page)
    panel.wait("training")
    seen = panel.wait_for_step(6)
    panel.wait_for_past()
    assert len(panel.points()) >= seen - 1, "the steps before the reload are there"
    assert panel.pictures() == ["Base"]
    other = other_browser.open(server.url, {"Comfy.VueNodes.Enabled": new_renderer})
    other.load(saved)
    panels.look_at(other)
    theirs = panels.PanelView(other)
    theirs.wait_for_step(seen + 1)
    theirs.press("Stop and keep")
    theirs.wait("stopped")
    assert other.read_errors() == []
    other.load(EMPTY)
    panel.wait("stopped")
    entry = server.wait(prompt)
    assert len(list(server.path("output", "graft", panel.state()["run"], "adapters").iterdir())) == 1
    kept = [text for output in entry["outputs"].values() for text in output.get("text", [])]
    assert any(f"stopped before {LONG}" in text for text in kept)
    assert server.path("output", "loras", "panel_00001_.safetensors").exists(), "the graph behind it went on"
    assert panel.buttons() == ["Resume"]


@IN_NEW_RENDERER
def test_save_pause_and_resume_by_the_buttons(opened, page, server):
    panel = opened(LONG)
    first = page.queue()
    panel.wait_for_step(2)
    panel.press("Save now")
    page.wait_for("return document.querySelector('.graft-saved')?.textContent.startsWith('Saved at step');")
    panel.press("Pause")
    panel.wait("paused")
    with pytest.raises(PromptInterrupted):
        server.wait(first)
    assert panel.buttons() == ["Resume"]
    reached = panel.state()["step"]
    panel.press("Resume")
    panel.wait("training")
    panel.wait_for_text(".graft-state", f"resumed at step {reached}")
    # The chart shows the steps before the pause.
    panel.wait_for_past()
    panel.press("Stop and keep")
    panel.wait("stopped")


@pytest.fixture
def least(server):
    """Let trainings give way without a least training time."""
    server.post("/settings/Graft.GiveWayAfter", 0)
    yield
    server.post("/settings/Graft.GiveWayAfter", 60)


def queue_picture(server, seed):
    """Queue a prompt that draws until it is interrupted; return its id."""
    graph = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    graphs.sampling(graph, "a large red circle", ["1", 0], ["1", 1], "other", seed=seed, steps=3000)
    return server.queue(graph)


@IN_NEW_RENDERER
def test_it_gives_way_and_says_why_it_waits(opened, page, server, least, other_browser, new_renderer):
    # Without sample pictures on the way: the panel says so while it draws them.
    panel = opened(LONG, every=LONG)
    prompt = page.queue()
    panel.wait_for_step(2)
    assert panel.gives_way() == [False, "Other prompts wait until the training ends."]
    page.driver.find_element(By.CSS_SELECTOR, ".graft-way").click()
    page.wait_for("return document.querySelector('.graft-way').ariaPressed === 'true';")
    assert "pauses for prompts without a training" in panel.gives_way()[1] and panel.list_cramped() == []
    drawn = queue_picture(server, 1)
    panel.wait("waiting")
    page.wait_for("return document.querySelector('.graft-note').textContent.includes('run first: 1. Training contin');")
    assert panel.text(".graft-state") == f"Waiting for other prompts at step {panel.state()['step']}"
    assert panel.buttons() == ["Remove from queue"] and panel.gives_way() is None and panel.list_cramped() == []
    # The sidebar lists the queue; another browser sees the same.
    history = HistoryView(page).open()
    page.wait_for("""
        const queue = document.querySelector('.graft-queue');
        return /running now[^]*Waiting for other prompts, .* left/.test(queue?.innerText);""")
    title, first, run, state = history.queue()
    assert title.startswith("Queue: ") and first == "Other prompts, running now: 1"
    assert run == panel.state()["run"] and state.startswith("Waiting for other prompts, ") and state.endswith(" left")
    history.wait_for_card(run, "card.dataset.status === 'waiting'")
    other = other_browser.open(server.url, {"Comfy.VueNodes.Enabled": new_renderer})
    other.load(page.serialize())
    panels.look_at(other)
    theirs = panels.PanelView(other)
    theirs.wait("waiting")
    server.interrupt()
    with pytest.raises(PromptInterrupted):
        server.wait(drawn)
    for view in (panel, theirs):
        view.wait("training")
        # Until its first step, the panel names the work before it.
        view.wait_for_text(".graft-state", "Training, resumed at step")
        assert view.gives_way()[0]
    # Trainings of the queue are named in order.
    later = server.queue(server.get(f"/graft/runs/{run}/workflow")["prompt"])
    for view in (panel, theirs):
        view.page.wait_for(
            "return /Queue: .* 1\\. .*, 2\\. /.test(document.querySelector('.graft-note').textContent);", 90
        )
    server.post("/graft/queue/remove", {"prompt_id": later})
    for view in (panel, theirs):
        view.page.wait_for("return !document.querySelector('.graft-note').textContent.includes('Queue: ');", 90)
    # Removed from the queue by one browser: both say so, and it can be resumed.
    queue_picture(server, 2)
    for view in (panel, theirs):
        view.wait("waiting")
        # Before this its own prompt may still be ending: no prompt is before it.
        view.wait_for_text(".graft-note", "run first: 1.")
    panel.press("Remove from queue")
    for view in (panel, theirs):
        view.wait("removed")
        view.wait_for_text(".graft-note", "Its prompt was removed")
        assert view.buttons() == ["Resume"]
    history.wait_for_card(run, "card.dataset.status === 'paused'")
    server.interrupt()
    history.press(f"Resume: {run}")
    panel.wait("training")
    assert prompt not in [item[1] for item in server.get("/queue")["queue_running"]]
    panel.press("Stop and keep")
    panel.wait("stopped")
    history.close()
    assert other.read_errors() == []


@IN_NEW_RENDERER
def test_hours_hold_a_training_in_both_browsers(opened, page, server, other_browser, new_renderer):
    panel = opened(LONG, every=LONG)
    prompt = page.queue()
    panel.wait_for_step(2)
    clock = server.get("/graft/queue")["clock"]
    later = f"{(int(clock[:2]) + 2) % 24:02d}:00"
    page.driver.find_element(By.CSS_SELECTOR, ".graft-clock").click()
    page.wait_for("return document.querySelector('.graft-hours').checkVisibility();")
    assert panel.list_cramped() == []
    page.wait_for(
        "return /^The server's time, now ..:..$/.test(document.querySelector('.graft-hours span').textContent);"
    )
    page.js("""
        const [input] = document.querySelectorAll('.graft-hours input');
        input.value = args[0];
        input.dispatchEvent(new Event('change'));""", later)  # fmt: skip
    other = other_browser.open(server.url, {"Comfy.VueNodes.Enabled": new_renderer})
    other.load(page.serialize())
    panels.look_at(other)
    theirs = panels.PanelView(other)
    for view in (panel, theirs):
        view.wait("waiting")
        view.page.wait_for(
            f"return document.querySelector('.graft-state').textContent.startsWith('Waiting until {later} at');"
        )
        assert "continues then by itself" in view.text(".graft-note") and view.buttons() == ["Remove from queue"]
        assert view.list_cramped() == []
    other.driver.find_element(By.CSS_SELECTOR, ".graft-clock").click()
    assert other.wait_for("return document.querySelector('.graft-hours input').value;") == later
    other.js("""
        const [input] = document.querySelectorAll('.graft-hours input');
        input.value = '';
        input.dispatchEvent(new Event('change'));""")
    for view in (panel, theirs):
        view.wait("training")
    assert prompt in [item[1] for item in server.get("/queue")["queue_running"]]
    # One end of a pause waits for the other one, whatever the server says meanwhile.
    ends = [f"{(int(clock[:2]) + hours) % 24:02d}:30" for hours in (3, 5)]
    fill = """
        const input = document.querySelectorAll('.graft-hours input')[args[0]];
        input.value = args[1];
        input.dispatchEvent(new Event('change'));"""
    values = "return [...document.querySelectorAll('.graft-hours input')].map(input => input.value).join() === "
    other.js(fill, 1, ends[0])
    panel.wait_for_step(panel.wait_for_step(1) + 2)
    assert server.get("/graft/queue")["prompts"][0]["pause"] == ["", ""]
    other.js(fill, 2, ends[1])
    for view in (page, other):
        view.wait_for(f"{values}',{','.join(ends)}';")
    assert server.get("/graft/queue")["prompts"][0]["pause"] == ends
    assert other.read_errors() == []


def marks_of(page):
    """Return the steps that the chart marks, best save and early end, and the last step."""
    return page.js("""
        const { curve, step } = document.querySelector('.graft-panel').graftTraining;
        return [curve.best, curve.end, step];""")


@IN_NEW_RENDERER
def test_the_chart_marks_the_best_save_and_the_early_end(opened, page, server):
    checks = {"validation_fraction": 0.2, "validate_every": 2, "keep_best": "on", "patience": 2}
    panel = opened(LONG, every=LONG, stop_when="validation stops falling", **checks)
    server.wait(page.queue())
    panel.wait("stopped")
    best, end, step = marks_of(page)
    assert end == step == best + 2 * 2 < LONG
    losses = dict(panel.state()["validation"])
    assert losses[best] == min(losses.values())
    assert f"has not fallen since step {best}. Run returns the saved result." in panel.text(".graft-note")
    assert f"Best at step {best}." in panel.label("canvas")
    assert panel.buttons() == ["Resume"] and panel.list_cramped() == []
    saved = page.serialize()
    page.open()
    page.load(saved)
    panels.look_at(page)
    panel.wait("stopped")
    panel.wait_for_past()
    assert marks_of(page) == [best, end, step], "after a reload too"


def test_the_panel_names_the_hardest_and_the_memorized_pictures(opened):
    panel = opened(SHORT)
    panel.simulate("begin")
    panel.simulate("step", step=50, steps=90, epoch=0, loss=0.1, lr=1e-4, seconds=1.0)
    assert not panel.page.js("return document.querySelector('.graft-pictures').checkVisibility();")
    hardest = [["<b>a</b>.png", 2.5], ["b.png", 1.4]]
    panel.simulate("pictures", step=50, hardest=hardest, memorized=[["c.png", 0.3]])
    said = panel.page.wait_for("return document.querySelector('.graft-pictures').textContent;")
    assert said == "Hardest pictures: <b>a</b>.png 2.50, b.png 1.40\nMemorized pictures: c.png 0.30"
    assert panel.list_cramped() == []


def test_a_training_inside_a_subgraph(opened, page, server):
    opened(2)
    outer = page.js("""
        const node = app.graph.nodes.find(node => node.type === 'GraftTrainLoRA');
        const { subgraph, node: outer } = app.graph.convertToSubgraph(new Set([node]));
        return String(outer.id);""")
    prompt = page.to_prompt()
    (inner,) = [name for name, value in prompt.items() if value["class_type"] == "GraftTrainLoRA"]
    assert inner.startswith(f"{outer}:")
    server.wait(page.queue())
    panel = look_inside(page, outer)
    panel.wait("finished")
    assert panel.points() == [1, 2]
    saved = page.serialize()
    page.open()
    page.load(saved)
    panel = look_inside(page, outer)
    panel.wait("finished")
    panel.wait_for_past()
    assert panel.points() == [1, 2], "after a reload too"
    page.js("app.canvas.setGraph(app.rootGraph ?? app.graph);")


def test_the_node_of_a_blueprint_shows_its_training(opened, page, server, folder, new_renderer):
    """The outer node shows progress, loss and buttons while it runs."""
    opened(2)
    blueprint = json.loads((make_blueprint.FOLDER / f"{make_blueprint.NAME}.json").read_text())
    page.load(blueprint)
    outer = page.list_nodes()[0]["id"]
    base = page.add_node("CheckpointLoaderSimple", -500)
    page.set_widget(base, "ckpt_name", graphs.CHECKPOINT)
    for slot, name in enumerate(("model", "clip", "vae")):
        page.connect(base, slot, outer, name)
    # Each renderer trains its own values: a run that was stopped is returned, and shown, for the same ones.
    values = {"folder": folder, "resolution": 64, "steps": LONG, "rank": 2 + new_renderer, "filename_prefix": "bp"}
    for name, value in values.items():
        page.set_widget(outer, name, value)
    panel = look_at_outer(page)
    assert (panel.phase(), panel.buttons()) == ("idle", [])
    queued = page.queue()
    panel.wait_for_step(3)
    assert panel.phase() == "training" and panel.buttons() == ["Stop and keep", "Save now", "Pause"]
    assert panel.list_cramped() == [] and panel.is_drawn()
    assert "graft_panel" not in json.dumps(page.serialize()), "the panel is no part of the workflow"
    panel.press("Stop and keep")
    panel.wait("stopped")
    server.wait(queued)
    assert panel.buttons() == ["Resume"]
    saved = page.serialize()
    page.open()
    page.load(saved)
    panel = look_at_outer(page)
    panel.wait("stopped")
    assert values.items() <= list_widgets(page).items(), "the edits are there after a reload"


# A linked widget in `proxyWidgets`, as frontends up to 1.32 save it; newer ones quarantine it with its value.
ENTRY = ["-1", "rank"]
QUARANTINE = {"originalEntry": ENTRY, "reason": "missingSourceNode", "hostValue": 16, "attemptedAtVersion": 1}


@pytest.mark.parametrize(
    "properties",
    [{"proxyWidgets": [ENTRY]}, {"proxyWidgetErrorQuarantine": [QUARANTINE]}],
    ids=["frontend 1.32", "frontend 1.49"],
)
def test_edits_of_an_older_blueprint_survive_a_reload(opened, page, properties):
    """Workflows that earlier versions of the frontend or of the pack saved keep their edits."""
    opened(2)
    workflow = json.loads((make_blueprint.FOLDER / f"{make_blueprint.NAME}.json").read_text())
    (node,) = workflow["nodes"]
    names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    node["widgets_values"][names.index("rank")] = 32
    if "proxyWidgets" in properties:
        properties = {"proxyWidgets": [["-1", name] for name in names]}
    page.load({**workflow, "nodes": [{**node, "properties": properties}]})
    look_at_outer(page)
    assert list_widgets(page)["rank"] == 32, "the last edit"
    page.set_widget(node["id"], "rank", 8)
    saved = page.serialize()
    assert "proxyWidgetErrorQuarantine" not in json.dumps(saved)
    page.load(saved)
    look_at_outer(page)
    assert list_widgets(page)["rank"] == 8


@pytest.mark.parametrize("kind, name, later", [("GraftSaveAdapter", "filename_prefix", "model")])
def test_a_subgraph_saved_before_an_input_was_added_keeps_its_links(opened, page, kind, name, later):
    """A new socket moves a node's widgets one place on; a link in a subgraph names its input by the place."""
    opened(2)
    workflow = json.loads((make_blueprint.FOLDER / f"{make_blueprint.NAME}.json").read_text())
    (subgraph,) = workflow["definitions"]["subgraphs"]
    (node,) = [node for node in subgraph["nodes"] if node["type"] == kind]
    place = [slot["name"] for slot in node["inputs"]].index(later)
    del node["inputs"][place]
    for link in subgraph["links"]:
        if link["target_id"] == node["id"] and link["target_slot"] > place:
            link["target_slot"] -= 1
    page.load(workflow)
    look_at_outer(page)
    page.set_widget(workflow["nodes"][0]["id"], name, "as I wrote it")
    assert name in list_widgets(page)
    (inner,) = [node["inputs"] for node in page.to_prompt().values() if node["class_type"] == kind]
    assert inner[name] == "as I wrote it"


def list_widgets(page):
    """Return the widgets of the subgraph's node as {name: value}."""
    (widgets,) = [node["widgets"] for node in page.list_nodes() if "trigger" in node["widgets"]]
    return widgets


def look_at_outer(page):
    """Return the panel of a subgraph's node; the inner trainer's hidden panel is removed from the page."""
    page.wait_for("return app.graph.nodes.some(node => node.widgets?.some(one => one.name === 'graft_panel'));")
    page.js("""
        const inner = app.graph.nodes.find(node => node.subgraph).subgraph.nodes;
        for (const node of inner) node.widgets?.find(one => one.name === 'graft_panel')?.element.remove();""")
    panels.look_at(page)
    return panels.PanelView(page)


def look_inside(page, node):
    """Open a node's subgraph and return the panel of the trainer in it."""
    page.js("app.canvas.setGraph(app.graph.getNodeById(args[0]).subgraph);", node)
    panels.look_at(page)
    return panels.PanelView(page)


def test_another_workflow_with_the_same_nodes_is_not_shown_it(opened, page, server, graph):
    panel = opened(2)
    prompt = page.queue()
    panel.wait("finished")
    server.wait(prompt)
    mine = page.serialize()
    page.load({**graph, "id": str(uuid.uuid4())})
    panels.look_at(page)
    assert panel.phase() == "idle"
    page.load(mine)
    panel.wait("finished")
    assert panel.points() == [1, 2]


def test_a_template_opened_again_shows_no_run_of_other_values(opened, page, server):
    """Templates have fixed workflow ids, so the panel matches a run by its inputs, whatever its workflow."""
    panel = opened(2)
    server.wait(page.queue())
    panel.wait("finished")
    trained = page.serialize()
    other = copy.deepcopy(trained)
    (node,) = [node for node in other["nodes"] if node["type"] == "GraftLoadDataset"]
    node["widgets_values"] = [f"{value} two" if value == "" else value for value in node["widgets_values"]]
    page.load(other)
    panels.look_at(page)
    time.sleep(1)
    assert (panel.phase(), panel.count(), panel.text(".graft-state")) == ("idle", "", "Ready")
    page.load(trained)
    panels.look_at(page)
    panel.wait("finished")
    assert panel.points() == [1, 2] and panel.text(".graft-note") == WARNING


def test_a_run_answered_from_the_cache_is_shown(opened, page, server):
    panel = opened(2)
    server.wait(page.queue())
    panel.wait("finished")
    page.load({**page.serialize(), "id": str(uuid.uuid4())})
    panels.look_at(page)
    queued = page.queue()
    panel.wait("finished")
    assert panel.count() == "2 / 2" and panel.points() == [1, 2]
    messages = dict(server.wait(queued)["status"]["messages"])
    assert panel.where()["node"] in messages["execution_cached"]["nodes"], "the host trained nothing"


def test_values_changed_after_a_run_are_said(opened, page, server):
    panel = opened(2)
    server.wait(page.queue())
    panel.wait("finished")
    for values, said in (
        ({"save_every": 9, "every": 7}, ""),
        ({"steps": 5}, "Press Run to continue to step 5."),
        ({"steps": 2, "seed": 8}, "You changed values since. Run trains with the new values."),
        ({"seed": 0}, ""),
    ):
        panels.set_values(page, **values)
        page.js("api.dispatchCustomEvent('graphChanged');")
        note = json.dumps("\n".join([said, WARNING] if said else [WARNING]))
        page.wait_for(f"return document.querySelector('.graft-panel .graft-note').textContent === {note};")
        assert panel.phase() == "finished" and panel.points() == [1, 2]


def test_an_untouched_option_node_changes_nothing(opened, page, server):
    """The panel compares the values that decide the result, not the number of option nodes."""
    panel = opened(2)
    server.wait(page.queue())
    panel.wait("finished")
    nodes = {node["type"]: node["id"] for node in page.list_nodes()}
    added = page.add_node("GraftAdapterOptions", 400, 900)
    changed = f"You changed values since. Run trains with the new values.\n{WARNING}"
    page.connect(nodes["GraftObjectiveOptions"], 0, added, "options")
    page.connect(added, 0, nodes["GraftTrainLoRA"], "options")
    assert read_note_of_change(page) == WARNING
    page.set_widget(added, "dropout", 0.1)
    assert read_note_of_change(page) == changed
    page.set_widget(added, "dropout", 0.0)
    assert read_note_of_change(page) == WARNING
    # Without the three nodes that set nothing; the preview's prompts do not affect the result.
    page.connect(nodes["GraftRunOptions"], 0, nodes["GraftTrainLoRA"], "options")
    assert read_note_of_change(page) == WARNING
    assert panel.phase() == "finished"


def read_note_of_change(page):
    """Return the panel's note after the page has read the changed graph."""
    page.js("api.dispatchCustomEvent('graphChanged');")
    time.sleep(1)
    return page.js("return document.querySelector('.graft-panel .graft-note').textContent;")


def test_a_live_run_of_changed_values_keeps_its_buttons(opened, page, server):
    panel = opened(LONG)
    page.queue()
    panel.wait_for_step(2)
    panels.set_values(page, seed=3)
    page.js("api.dispatchCustomEvent('graphChanged');")
    note = "document.querySelector('.graft-panel .graft-note').textContent"
    page.wait_for(f"return {note}.startsWith('This training was queued');")
    panel.press("Stop and keep")
    panel.wait("stopped")


def test_the_panel_is_neither_saved_nor_queued(opened, page):
    opened(SHORT)
    (node,) = [node for node in page.serialize()["nodes"] if node["type"] == "GraftTrainLoRA"]
    assert len(node["widgets_values"]) == 5
    assert "graft" not in str(node.get("properties", {})).lower().replace("grafttrainlora", "").replace("graft ", "")
    (entry,) = [value for value in page.to_prompt().values() if value["class_type"] == "GraftTrainLoRA"]
    assert "graft_panel" not in entry["inputs"]


def test_an_error_is_shown_with_its_cure(opened, page, server):
    panel = opened(SHORT, min_timestep=900, max_timestep=100)
    prompt = page.queue()
    panel.wait("failed")
    note = panel.text(".graft-note")
    assert note.startswith("min_timestep 900 is not below max_timestep 100.\n"), note
    assert len(note.splitlines()[1]) > 10, "the cure"
    server.poll(lambda: server.get(f"/history/{prompt}"), 60, "the end")
    # The page itself logs the failed prompt; that is not the panel's error.
    page.errors.clear()
    time.sleep(0.2)
    page.driver.get_log("browser")


@pytest.mark.parametrize(
    "event, fields, said",
    [
        (
            "memory",
            {"done": "turned on checkpointing for 5 blocks"},
            "ran out in step 3: turned on checkpointing for 5 blocks.",
        ),
        (
            "estimate",
            {
                "seconds": None,
                "missing": 3 << 30,
                "free": 2 << 30,
                "fits": False,
                "cures": ["checkpointing", "offload"],
            },
            "needs 3.0 GB more memory than is in use now, but only 2.0 GB are free. It would fit with these Graft "
            "Memory Options: checkpointing, offload.",
        ),
        (
            "estimate",
            {"seconds": None, "missing": None, "free": None, "fits": False, "cures": []},
            "A step needs more memory than the device has.",
        ),
        ("spike", {"loss": 9.0, "highest": 1.0, "pictures": ["a.png"]}, "Skipped step 3"),
    ],
)
def test_what_a_run_did_to_help_itself_is_said(opened, event, fields, said):
    panel = opened(SHORT)
    panel.simulate("begin")
    panel.simulate("step", step=2, steps=9, epoch=0, loss=0.1, lr=1e-4, seconds=1.0)
    panel.simulate(event, step=3, **fields)
    panel.simulate("step", step=3, steps=9, epoch=0, loss=0.1, lr=1e-4, seconds=1.0)
    time.sleep(0.25)
    assert said in panel.text(".graft-note")


def test_the_preferred_share_is_shown_for_pairs_alone(opened):
    panel = opened(SHORT)
    panel.simulate("begin")
    shown = "return document.querySelector('.graft-panel [data-name=\"Accuracy\"]').checkVisibility();"
    step = {"steps": 9, "epoch": 0, "loss": 0.1, "lr": 1e-4, "seconds": 1.0}
    for number, fields in enumerate(({}, {"accuracy": 0.625}), 1):
        panel.simulate("step", step=number, **step, **fields)
        time.sleep(0.25)
        assert panel.page.js(shown) == bool(fields)
    assert panel.facts()["Accuracy"] == "63 %"
    assert panel.list_cramped() == []


def test_warnings_are_shown_and_leave_room_for_buttons(opened, page):
    """For an unknown kind the page shows the server's own text."""
    panel = opened(SHORT)
    panel.simulate("begin")
    rows = [
        {"kind": "skipped", "count": 2, "total": 4, "names": "a.png: broken; b.png: too small", "text": "..."},
        {"kind": "batch", "batch": 8, "count": 2, "text": "..."},
        {"kind": "of later", "text": "Something that came later."},
    ]
    panel.simulate("warnings", warnings=rows)
    panel.simulate(
        "adapter warnings", warnings=[{"kind": "unread", "count": 2, "total": 40, "names": "a, b", "text": "..."}]
    )
    panel.simulate("damaged state", step=4, states=[8, 6])
    panel.simulate("step", step=1, steps=9, epoch=0, loss=0.1, lr=1e-4, seconds=1.0)
    time.sleep(0.25)
    assert panel.text(".graft-note").splitlines() == [
        "2 of 4 files skipped: a.png: broken; b.png: too small",
        "batch_size 8 is larger than the dataset: a step uses at most all 2 pictures.",
        "Something that came later.",
        "2 of 40 keys of the adapter to start from fit no layer and have no effect: a, b",
        "The save of step 8, 6 is damaged. Training resumed from step 4.",
    ]
    assert panel.list_cramped() == []


def test_work_before_the_first_step_is_named(opened):
    panel = opened(SHORT)
    panel.simulate("begin")
    panel.simulate("cache", name="a.png", done=16, total=16)
    for name, said in (
        ("loading", "Loading the model"),
        ("gradients", "Checking gradients"),
        ("measuring", "Measuring a step"),
        ("training", "Training"),
        ("previews", "Drawing sample pictures"),
    ):
        panel.simulate("phase", name=name)
        time.sleep(0.25)
        assert panel.text(".graft-state") == said
    panel.simulate("step", step=1, steps=9, epoch=0, loss=0.1, lr=1e-4, seconds=1.0)
    time.sleep(0.25)
    assert panel.text(".graft-state") == "Training"


@pytest.mark.parametrize(
    "measured, steps, speed",
    [
        (1.5, [20.0], "1.5 s/step"),
        (20.0, [2.0], "2.0 s/step"),
        (None, [20.0, 2.0], "2.0 s/step"),
        (20.0, [2.0, 2.0, 2.0], "2.0 s/step"),
        (2.0, [9.0, 2.0, 2.0, 30.0, 2.0], "2.0 s/step"),
    ],
)
def test_time_left_is_right_from_the_first_report(opened, measured, steps, speed):
    """A slow first step, or a single slow step, does not distort it."""
    panel = opened(SHORT)
    panel.simulate("begin")
    if measured is not None:
        panel.simulate("estimate", step=0, seconds=measured, missing=1, free=None, fits=True, cures=[])
    for step, seconds in enumerate(steps, 1):
        panel.simulate("step", step=step, steps=20 + len(steps), epoch=0, loss=0.1, lr=1e-4, seconds=seconds)
    time.sleep(0.25)
    facts = panel.facts()
    assert facts["Speed"] == speed
    assert facts["Time left"] == f"{round(20 * float(speed.split()[0]))} s"


def test_updates_come_at_most_ten_times_a_second(opened, page):
    panel = opened(SHORT)
    panel.simulate("begin")
    changes = page.js("""
        const count = document.querySelector('.graft-count');
        let changes = 0;
        new MutationObserver(() => { changes += 1; }).observe(count, {childList: true, subtree: true});
        const began = performance.now();
        let step = 0;
        while (performance.now() - began < 2000) {
            step += 1;
            const where = args[0];
            api.dispatchCustomEvent('graft.progress', {...where, event: 'step', step, steps: 100000, epoch: 0,
                                                       loss: 0.1, lr: 1e-4, seconds: 0.01});
            await new Promise(resolve => setTimeout(resolve, 4));
        }
        return changes;""", panel.where())  # fmt: skip
    assert 3 <= changes <= 21


def test_texts_are_never_markup(opened, page):
    panel = opened(SHORT)
    evil = "<img src=x onerror=\"document.title='taken'\">"
    for event, fields in (
        ("begin", {}),
        ("run", {"name": evil, "step": 0, "steps": 10}),
        ("cache", {"name": evil, "done": 1, "total": 2}),
        ("failed", {"message": evil, "cure": evil, "step": 0, "saved": 0}),
    ):
        panel.simulate(event, **fields)
        time.sleep(0.25)
    assert evil in panel.text(".graft-note")
    assert page.js("return document.querySelectorAll('.graft-panel img').length;") == 0
    assert page.js("return document.title;") != "taken"
    # The invented run does not exist, and the page's console logs that.
    page.driver.get_log("browser")


def test_pictures_are_enlarged_by_keys_beside_the_bases_own(opened, page, server):
    panel = opened(2, every=1)
    server.wait(page.queue())
    panel.wait("finished")
    page.wait_for("return document.querySelectorAll('.graft-thumb').length === 3;")
    thumb = page.driver.find_elements(By.CSS_SELECTOR, ".graft-thumb")[1]
    page.driver.execute_script("arguments[0].focus();", thumb)
    thumb.send_keys("\ue007")
    captions = ".graft-viewer figure:not([hidden]) figcaption"
    shown = f"return [...document.querySelectorAll('{captions}')].map(one => one.textContent);"
    assert page.js(shown) == ["Base", "Step 1"]
    page.driver.switch_to.active_element.send_keys("\ue014")
    assert page.js(shown) == ["Base", "Step 2"]
    page.driver.switch_to.active_element.send_keys("\ue00c")
    page.wait_for("return !document.querySelector('.graft-viewer');")
    assert len(page.js("return app.graph.nodes.map(node => node.type);")) == len(panels.NODES)
