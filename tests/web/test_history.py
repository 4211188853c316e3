"""Tests of the run history in ComfyUI's own sidebar, its commands and toasts, on runs of pages and programs."""

import json
import shutil
import urllib.error

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.support import panel as panels
from tests.support import runs
from tests.support.browser import EMPTY
from tests.support.history import HistoryView

pytestmark = [pytest.mark.browser, pytest.mark.server]

LONG = 3000
STEPS = 6
FIRST, SECOND, BARE, NEXT = "history-first", "history-second", "history-bare", "history-next"


@pytest.fixture(scope="module")
def made(server, page, graph, folder):
    """Create runs from the page, and two without a page, one from the other; return {given name: name of its run}."""
    page.load(graph)
    common = {"steps": STEPS, "every": 3, "validation_fraction": 0.2, "validate_every": 2}
    panels.set_values(page, name=FIRST, **common)
    server.wait(page.queue())
    panels.set_values(page, name=SECOND, seed=7, prompts="a large sks toy\na small sks toy")
    server.wait(page.queue())
    bare = runs.graph_of(server, folder, BARE, 2)
    server.run(bare)
    (bare["60"],) = runs.option_nodes(server, GraftRunOptions={"name": NEXT}).values()
    again = {"steps": 1, "adapter": ["3", 2], "options": ["60", 0]}
    bare["5"] = {**bare["3"], "inputs": {**bare["3"]["inputs"], **again}}
    server.run(bare)
    return {name: runs.find_run(server, name).name for name in (FIRST, SECOND, BARE, NEXT)}


@pytest.fixture
def history(page, made):
    """Open the history in the sidebar."""
    known = len(page.read_errors())
    view = HistoryView(page).open()
    yield view
    view.close()
    assert page.read_errors()[known:] == []


@pytest.fixture
def copied(server, made):
    """Create a run for deletion: a copy of another's folder, with an adapter that must stay."""
    name = "history-copied-00000001"
    source = server.path("output", "graft", made[FIRST])
    shutil.copytree(source, source.with_name(name), dirs_exist_ok=True)
    kept = server.path("output", "loras", name, "step-00000006.safetensors")
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes(b"kept")
    yield name, source.with_name(name), kept
    shutil.rmtree(kept.parent)
    shutil.rmtree(source.with_name(name), ignore_errors=True)


def test_the_runs_are_listed_the_last_one_first(history, server, made):
    listed = [made[name] for name in (NEXT, BARE, SECOND, FIRST)]
    assert [name for name in history.names() if name in made.values()] == listed
    card = history.card(made[FIRST])
    history.wait_for_card(made[FIRST], "card.querySelector('img').naturalWidth > 0")
    assert (card["status"], card["curve"], card["open"], card["remove"]) == ("finished", True, True, True)
    assert f"{STEPS} of {STEPS} steps" in card["text"] and "LoRA, SD1, rank 4, 2e-3" in card["text"]
    # A tenth of six steps is one: the last loss, and the lowest.
    log = server.path("output", "graft", made[FIRST], "metrics.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, log) if line["event"] == "step"]
    (listed,) = server.get(f"/graft/history?text={FIRST}")["runs"]
    assert f"Loss {losses[-1]:#.3g}, best {min(losses):#.3g}" in card["text"]
    assert (listed["best"], listed["best_step"]) == (min(losses), losses.index(min(losses)) + 1)
    assert not history.card(made[BARE])["picture"]


def test_a_run_says_from_which_it_started(history, made):
    assert f"Started from {made[BARE]}" in history.card(made[NEXT])["text"]
    assert "Started from" not in history.card(made[BARE])["text"]


def test_runs_are_found_by_name(history, made):
    history.search("SECOND")
    history.page.wait_for("return document.querySelectorAll('.graft-card').length === 1;")
    assert history.names() == [made[SECOND]]
    history.search("no such run")
    history.page.wait_for("return document.querySelector('.graft-empty').textContent.startsWith(\"No run has this\");")
    history.search("")
    history.page.wait_for("return document.querySelectorAll('.graft-card').length >= 3;")


def test_two_runs_are_compared(history, page, made, folder):
    history.choose(made[FIRST])
    history.choose(made[SECOND])
    history.press("Compare 2 runs")
    seen = history.comparison()
    assert [made[FIRST] in seen["legend"][0], made[SECOND] in seen["legend"][1]] == [True, True]
    assert seen["curves"] == [STEPS, STEPS] and seen["dots"] == 2 * STEPS / 2
    assert made[FIRST] in seen["label"] and "best" in seen["label"]
    assert seen["steps"] == ["Base", "Step 3", "Step 6"] and seen["pictures"] == [3, 3]
    assert history.recipes() == {
        "preview_prompts": ["a large sks toy", "a large sks toy, a small sks toy"],
        "seed": ["0", "7"],
    }
    page.driver.find_element("css selector", ".graft-heading input").click()
    everything = history.recipes()
    assert everything["rank"] == ["4", "4"] and everything["dataset"] == [folder, folder]
    assert everything["base_digest"][0] == everything["base_digest"][1] != ""
    # Only the second run has the second prompt.
    history.press("Prompt 2")
    assert history.comparison()["pictures"] == [0, 3]
    page.driver.find_element("css selector", ".graft-samples .graft-thumb").click()
    page.wait_for("return document.querySelector('.graft-viewer img').naturalWidth > 0;")
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait_for("return !document.querySelector('dialog[open]');")
    history.press("Clear the selection")
    assert page.js("return document.querySelector('.graft-foot').hidden;")


def test_one_run_is_looked_at_by_keys(history, page, made):
    # Two quick presses open it once.
    page.js("""
        const name = document.querySelector(`.graft-card[data-run='${args[0]}'] .graft-name`);
        name.addEventListener('click', () => name.dispatchEvent(new MouseEvent('click')), {once: true});
        name.focus();""", made[SECOND])  # fmt: skip
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert history.comparison()["curves"] == [STEPS]
    assert history.recipes()["learning_rate"] == ["0.002"]
    assert page.js("return document.querySelectorAll('dialog[open]').length;") == 1
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait_for("return !document.querySelector('dialog[open]');")
    # Focus returns to its earlier place.
    assert page.js("return document.activeElement.textContent;") == made[SECOND]


def test_a_runs_workflow_is_opened(history, page, made, graph, renderer):
    page.load(EMPTY)
    history.press(f"Open workflow: {made[FIRST]}")
    page.wait_for("return app.graph.nodes.length > 3;")
    opened = page.serialize()
    assert opened["id"] == graph["id"] and len(opened["nodes"]) == len(graph["nodes"])
    names = {node["type"]: node["widgets"].get("name") for node in page.list_nodes()}
    assert names["GraftRunOptions"] == FIRST
    # Its panel recognizes it, because this workflow queued it.
    panels.look_at(page)
    panels.PanelView(page).wait("finished")
    # A program leaves the prompt alone; the page makes a graph of it.
    history.press(f"Open workflow: {made[BARE]}")
    page.wait_for("return app.graph.nodes.length === 4;")
    assert {node["type"]: node["widgets"].get("steps") for node in page.list_nodes()}["GraftTrainLoRA"] == 2


def test_a_run_is_given_a_name_and_a_note(history, page, server, made):
    history.press(f"Name and note: {made[FIRST]}")
    title, note = page.driver.find_elements(By.CSS_SELECTOR, ".graft-notes :is(input, textarea)")
    title.send_keys("The red toy")
    note.send_keys("Better than\nrank 8.")
    history.press("Save")
    history.wait_for_card(made[FIRST], "card.querySelector('.graft-name').textContent === 'The red toy'")
    assert "Better than\nrank 8." in history.card(made[FIRST])["text"]
    assert server.path("output", "graft", made[FIRST], "notes.json").is_file()
    assert page.js("return Boolean(document.querySelector('.graft-card time').textContent);"), "its date"
    history.search("RANK 8")
    page.wait_for("return document.querySelectorAll('.graft-card').length === 1;")
    assert history.names() == [made[FIRST]]
    history.search("")
    page.wait_for("return document.querySelectorAll('.graft-card').length >= 3;")
    # It is sorted by its training, not by its name.
    assert [name for name in history.names() if name in made.values()][-1] == made[FIRST]
    assert server.post(f"/graft/runs/{made[FIRST]}/describe", {"title": "", "note": ""})["title"] == ""


def loras(server):
    return server.object_info("LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]


def test_a_save_is_listed_once_it_is_used(history, page, server, made, renderer):
    page.load(EMPTY)
    name = f"{made[SECOND]}-step-{STEPS}.safetensors"
    server.path("output", "loras", name).unlink(missing_ok=True)
    assert not [one for one in json.dumps(loras(server)).split('"') if made[SECOND] in one]
    history.press(f"Use this LoRA: {made[SECOND]}")
    history.wait_for_toast("Loader added")
    (node,) = page.list_nodes()
    assert (node["type"], node["widgets"]["lora_name"]) == ("LoraLoader", name)
    assert name in json.dumps(loras(server))
    # An earlier step loads from the run itself; the same one is not copied again.
    history.press(made[SECOND])
    history.comparison()
    history.press(f"Use step {STEPS}")
    history.wait_for_toast("Loader added")
    assert len(list(server.path("output", "loras").glob(f"{made[SECOND]}*"))) == 1


def test_a_run_without_previews_has_one_picture(history, page, server, graph):
    page.load(graph)
    panels.set_values(page, name="history-plain", steps=2, prompts="")
    server.wait(page.queue())
    run = runs.find_run(server, "history-plain")
    assert [path.name for path in (run / "samples").iterdir()] == ["step-00000002-1.png"]
    history.wait_for_card(run.name, "card?.querySelector('img')?.naturalWidth > 0")


@pytest.mark.parametrize(
    "path, body, code",
    [
        ("describe", {"title": 5}, 400),
        ("describe", {"title": "x" * 81}, 400),
        ("describe", {"note": "a\u0000"}, 400),
        ("pick", {}, 400),
        ("pick", {"step": "6"}, 400),
        ("pick", {"step": True}, 400),
        ("pick", {"step": 5}, 409),
    ],
)
def test_notes_and_picks_that_make_no_sense_are_refused(server, made, path, body, code):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(f"/graft/runs/{made[FIRST]}/{path}", body)
    assert refused.value.code == code and json.loads(refused.value.read())["error"]


def test_a_run_is_deleted_once_that_is_confirmed(history, page, copied, made, renderer):
    name, run, kept = copied
    history.refresh()
    history.wait_for_card(name, "card")
    place = history.names().index(name)
    history.press(f"Delete: {name}")
    history.answer("Cancel")
    assert run.exists() and name in history.names()
    history.press(f"Delete: {name}")
    history.answer("Delete")
    history.wait_for_card(name, "!card")
    history.wait_for_toast("Run deleted")
    assert not run.exists() and kept.exists() and not list(run.parent.glob(".removed*"))
    assert set(made.values()) <= set(history.names())
    page.wait_for(f"return document.activeElement.textContent === {history.names()[place]!r};")


def test_commands_toasts_and_a_run_that_runs(history, page, server, graph):
    """Commands steer one training from anywhere; the history shows it live and refuses to delete it."""
    page.load(graph)
    panels.set_values(page, steps=LONG, name="history-long")
    command = "await app.extensionManager.command.execute(args[0]);"
    page.js(command, "Graft.Save")
    history.wait_for_toast("Nothing is training")
    page.queue()
    page.wait_for("return Boolean(document.querySelector('.graft-card[data-run^=history-long]'));", 60)
    name = runs.find_run(server, "history-long").name
    history.wait_for_card(name, "card.dataset.status === 'running' && !/Training, 0 of/.test(card.innerText)")
    assert not history.card(name)["remove"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.post(f"/graft/runs/{name}/delete", {})
    assert refused.value.code == 409
    page.js(command, "Graft.Save")
    history.wait_for_toast("Training saved")
    page.js(command, "Graft.Pause")
    history.wait_for_toast("Training paused")
    history.wait_for_card(name, "card.dataset.status === 'paused'")
    page.js(command, "Graft.Pause")
    history.wait_for_toast("Training resumed")
    page.js(command, "Graft.Stop")
    history.wait_for_toast("Training stopped, result kept")
    history.wait_for_card(name, "card.dataset.status === 'stopped'")
    server.poll(server.is_idle, 60, "the queue")
    # The host's cache answers the same graph until its run is deleted; then it must train.
    assert server.get(f"/graft/runs/{name}/workflow")["workflow"]["id"] == graph["id"]


def test_a_deleted_run_is_trained_again(server, folder, made):
    graph = runs.graph_of(server, folder, BARE, 2)
    run = runs.find_run(server, BARE)
    assert server.post(f"/graft/runs/{run.name}/delete", {}) == {"deleted": run.name}
    assert not run.exists()
    assert "2 steps trained" in server.run(graph)["outputs"]["3"]["text"][0]
    assert runs.steps_logged(run) == [1, 2]


@pytest.mark.parametrize("event, fields, said", [
    ("failed", {"message": "The folder is empty.", "cure": "Put pictures into it."}, "The folder is empty."),
    ("done", {"run": "toy-00000001", "step": 9, "steps": 9, "cached": False}, "Training finished"),
])  # fmt: skip
def test_the_end_of_a_training_is_noted(history, graph, event, fields, said):
    history.page.load(graph)
    panel = panels.PanelView(history.page)
    panel.simulate("begin")
    panel.simulate(event, saved=0, **{"step": 0, **fields})
    history.wait_for_toast(said)


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_history_is_accessible(history, page, made, theme):
    page.set_setting("Comfy.ColorPalette", theme)
    history.choose(made[FIRST])
    history.choose(made[SECOND])
    assert page.list_violations(".graft-history") == []
    assert page.list_faint(".graft-history") == []
    history.press("Compare 2 runs")
    history.comparison()
    page.driver.find_element("css selector", ".graft-heading input").click()
    assert page.list_violations(".graft-comparison") == []
    assert page.list_faint(".graft-comparison") == []
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    history.press("Clear the selection")
    page.set_setting("Comfy.ColorPalette", "dark")


QUEUE = """
    const { Queue } = await import('/extensions/graft/history/tab.js');
    const acts = [];
    const queue = new Queue({ remove: (...given) => acts.push(given), move: (...given) => acts.push(given) });
    const training = (name, step) => ({ node: '3', name, run: null, step, steps: 9 });
    const row = (name, running, step) => ({ prompt_id: name, running, trainings: [training(name, step)] });
    const other = (prompt_id) => ({ prompt_id, running: false, trainings: [] });
    const press = (label) => queue.element.querySelector(`[aria-label="${label}"]`).click();
    document.body.append(queue.element);
    try {%s} finally { queue.element.remove(); }"""


def test_progress_and_moves_in_the_queue_keep_the_focus(page):
    focused, text, moved = page.js(QUEUE % """
        queue.show([row('mine', true, 1), row('next', false, 0), other('c')]);
        queue.element.querySelector('button').focus();
        queue.show([row('mine', true, 3), row('next', false, 0), other('c'), other('d')]);
        const first = [document.activeElement.ariaLabel, queue.element.innerText];
        queue.show([row('mine', true, 3), other('c'), other('d'), row('next', false, 0), row('last', false, 0)]);
        return [...first, document.activeElement.ariaLabel];""")  # fmt: skip
    assert focused == moved == "Move down: next"
    assert "Training, 3 of 9 steps" in text and "Other prompts: 2" in text


def test_the_queue_moves_a_training_past_whole_rows(page):
    acts, labels = page.js(QUEUE % """
        const second = { ...row('b', false, 0), trainings: [training('b', 0), training('b2', 0)] };
        queue.show([row('a', true, 1), other('x'), other('y'), second, other('z'), row('c', false, 0)]);
        for (const name of ['Move up: b', 'Move down: b', 'Move up: c', 'Remove from queue: c']) press(name);
        return [acts, [...queue.element.querySelectorAll('button')].map(button => button.ariaLabel)];""")  # fmt: skip
    assert acts == [["b", "x"], ["b", "c"], ["c", "z"], ["c"]]
    moves = ["Move up: b", "Move down: b", "Remove from queue: b"]
    assert labels == [*moves, "Move up: c", "Remove from queue: c"]


def test_resuming_a_run_without_its_prompt_does_not_queue_the_open_graph(page):
    queued, error = page.js("""
        const { Routes } = await import('/extensions/graft/panel/routes.js');
        const queued = [];
        const answer = { ok: true, json: async () => ({ prompt: null }) };
        const requests = { fetchApi: async () => answer, queuePrompt: (...given) => queued.push(given) };
        const routes = new Routes(requests, { queuePrompt: (...given) => queued.push(given) });
        const problem = await routes.resume({ run: 'r' }).catch(({ message }) => message);
        await routes.resume({ run: 'r', node: '3' });
        answer.json = async () => ({ prompt: {} });
        await routes.resume({ run: 'r' });
        return [queued, problem];""")  # fmt: skip
    assert error == "This run has no saved workflow"
    # The open graph for a node; a prompt without a workflow for a card.
    assert queued[0] == [0, 1] and queued[1][1].get("workflow") is None and len(queued) == 2
