"""Tests of Graft in ComfyUI's own page: nodes mount, the example opens cleanly, values survive, Run trains once."""

import copy
import json
import shutil

import pytest
from graft_pack.trainers.recipe.options import GIVE_WAY
from PIL import Image
from safetensors.numpy import save_file

from docs.build import make_locales
from docs.build.make_workflows import TINY
from tests.support.browser import EMPTY
from tests.support.host import ROOT
from tests.support.workflow import find_nodes, read_workflow
from tests.toy import world

pytestmark = [pytest.mark.browser, pytest.mark.server]

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
LORA = ROOT / "example_workflows" / "Train a LoRA.json"

# Types that the frontend draws as widgets; other types are sockets.
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


# Loaders whose file an example names, with its folder below models/. Newer frontends mark one whose file is missing.
FILES = {
    "GraftLoadAdapter": "loras",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
}

# Widgets that some nodes have besides those of their schema; they are never saved.
DRAWN = {
    "GraftTrainLoRA": ["graft_panel"],
    "GraftTrainEmbedding": ["graft_panel"],
    "GraftTrainDreamBooth": ["graft_panel"],
    "GraftFineTune": ["graft_panel"],
    "GraftTrainSlider": ["graft_panel"],
    "GraftTrainPreference": ["graft_panel"],
    "GraftInspectDataset": ["graft_report"],
    "GraftLoadDataset": ["Open dataset", "Add pictures"],
}


@pytest.fixture(scope="module")
def schemas(server):
    """Return {node id: schema} of Graft's nodes as the page gets them."""
    return {name: info for name, info in server.object_info().items() if name.startswith("Graft")}


@pytest.fixture
def errors(page):
    """Return a function of the page's errors since this test began."""
    known = len(page.read_errors())
    return lambda: page.read_errors()[known:]


def list_inputs(info):
    """Return [(name, type)] in the schema's order, with COMBO for a list of choices."""
    rows = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind = info["input"][group][name][0]
            rows.append((name, "COMBO" if isinstance(kind, list) else kind))
    return rows


def is_forced(info, name):
    """Report whether an input of a widget's type is a socket without a widget."""
    given = {**info["input"].get("required", {}), **info["input"].get("optional", {})}[name]
    return len(given) > 1 and bool(given[1].get("forceInput"))


def add_every_node(page, schemas):
    """Add one node of each kind to an empty graph; return {node id: its row of list_nodes}."""
    page.load(EMPTY)
    page.add_nodes([(name, 400 * (place % 4), 500 * (place // 4)) for place, name in enumerate(schemas)])
    return {node["type"]: node for node in page.list_nodes()}


def test_every_node_mounts_with_all_its_widgets_and_sockets(page, schemas, errors, renderer):
    nodes = add_every_node(page, schemas)
    for name, info in schemas.items():
        inputs = list_inputs(info)
        widgets = [given for given, kind in inputs if kind in WIDGETS and not is_forced(info, given)]
        widgets += DRAWN.get(name, [])
        assert list(nodes[name]["widgets"]) == widgets
        sockets = {given["name"]: given["type"] for given in nodes[name]["inputs"]}
        assert sockets == dict(inputs)
        made = [(output["name"], output["type"]) for output in nodes[name]["outputs"]]
        assert made == list(zip(info["output_name"], info["output"], strict=True))
    if renderer:
        # In the new renderer every node is an element of the page, with a row for each widget.
        page.fit()
        page.wait_for(f"return document.querySelectorAll('.lg-node').length === {len(schemas)};")
        rows, basic = page.js("""
            const nodes = [...document.querySelectorAll('.lg-node')].map(
                element => [app.graph.getNodeById(element.dataset.nodeId), element]);
            const isBasic = widget => !(widget.advanced ?? widget.options?.advanced);
            return [
                Object.fromEntries(nodes.map(([node, element]) => [
                    node.type, element.querySelectorAll('.lg-node-widget').length])),
                Object.fromEntries(nodes.map(([node]) => [node.type, node.widgets.filter(isBasic).length])),
            ];""")
        # Newer frontends fold advanced widgets away, behind a button of each node.
        assert rows in ({name: len(nodes[name]["widgets"]) for name in schemas}, basic)
    assert errors() == []


def test_widgets_start_at_their_defaults(page, schemas):
    nodes = add_every_node(page, schemas)
    for name, info in schemas.items():
        for group in info["input"].values():
            for given, (_, *rest) in group.items():
                if rest and rest[0].get("default") is not None and not is_forced(info, given):
                    assert nodes[name]["widgets"][given] == rest[0]["default"], (name, given)


def test_every_node_has_its_help_page_where_the_browser_looks(page, schemas):
    for name in schemas:
        text = page.js("return await (await fetch(`/extensions/graft/docs/${args[0]}.md`)).text();", name)
        assert text.startswith("# Graft"), name


def test_texts_for_translators_arrive(page, schemas):
    languages = page.js("return await (await fetch('/api/i18n')).json();")
    arrived = languages["en"]
    for language in ("en", *make_locales.LANGUAGES):
        assert set(schemas) <= set(languages[language]["nodeDefs"]), language
        assert set(make_locales.SETTINGS) <= set(languages[language]["settings"]), language
    assert make_locales.MAIN["dataTypes"].items() <= arrived["dataTypes"].items()
    for language in ("en", *make_locales.LANGUAGES):
        assert set(languages[language]["settings"]["Graft_GiveWay"]["options"]) == set(GIVE_WAY)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_open_with_no_missing_node_and_no_error(page, server, errors, path, renderer):
    workflow = read_workflow(path)
    for kind, folder in FILES.items():
        for loader in find_nodes(workflow, kind):
            server.path("models", folder).mkdir(parents=True, exist_ok=True)
            save_file({}, server.path("models", folder, loader["widgets_values"][0]))
            page.js("await app.refreshComboInNodes();")
    for loader in find_nodes(workflow, "LoadImage"):
        Image.new("RGB", (8, 8)).save(server.path("input", loader["widgets_values"][0]))
        page.js("await app.refreshComboInNodes();")
    for loader in find_nodes(workflow, "CheckpointLoaderSimple"):
        # An existing file, because newer frontends mark a node whose model file is missing.
        loader["widgets_values"] = [TINY["Checkpoint"]["ckpt_name"]]
    page.load(workflow)
    page.fit()
    # Newer frontends keep ids as text.
    found = {str(node["id"]): node["type"] for node in page.list_nodes()}
    assert found == {str(node["id"]): node["type"] for node in workflow["nodes"]}
    assert page.js("return app.graph.nodes.filter(node => node.has_errors || !node.constructor.nodeData).map("
                   "node => node.type).filter(type => !type.endsWith('Note'));") == []  # fmt: skip
    assert "missing" not in page.read_text().lower()
    assert page.js("return [...app.graph.links.values()].length;") == len(workflow["links"])
    assert errors() == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_offered_as_templates(server, path):
    assert path.stem in server.get("/api/workflow_templates")["graft"]
    assert json.loads(server.request(f"/api/workflow_templates/graft/{path.name.replace(' ', '%20')}"))


def change(value, options):
    """Return another value of a widget, if there is another choice."""
    if "options" in options:
        others = [choice for choice in options["options"] if choice != value]
        return others[-1] if others else value
    if isinstance(value, str):
        return "something else"
    step = options.get("step", 1)
    # The page keeps numbers within their range.
    return value + step if value + step <= options.get("max", value + step) else value - step


def test_saving_and_loading_keeps_what_was_set(page, schemas, renderer):
    nodes = add_every_node(page, schemas)
    wanted = {}
    for name, info in schemas.items():
        for given, (kind, *rest) in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            if given in nodes[name]["widgets"]:
                options = {**(rest[0] if rest else {}), **({"options": kind} if isinstance(kind, list) else {})}
                wanted[name, given] = change(nodes[name]["widgets"][given], options)
    page.set_widgets([(nodes[name]["id"], given, value) for (name, given), value in wanted.items()])
    saved = page.serialize()
    for node in saved["nodes"]:
        # Files from before panel and report existed do not contain them among the values.
        own = [name for name in nodes[node["type"]]["widgets"] if name not in DRAWN.get(node["type"], [])]
        assert len(node.get("widgets_values", [])) == len(own), node["type"]
    page.load(EMPTY)
    page.load(saved)
    loaded = {node["type"]: node["widgets"] for node in page.list_nodes()}
    assert {(name, given): loaded[name][given] for name, given in wanted} == wanted
    unchanged = {given for (name, given), value in wanted.items() if nodes[name]["widgets"][given] == value}
    assert unchanged <= {"folder", "adapter_name", "embedding_name", "start_from"}


def open_tiny_example(page, server, folder, steps):
    """Open the example in the page and type in the tiny base's values as a user does."""
    shutil.copytree(world.CONCEPT_FOLDER / TINY["Photos"]["folder"], server.path("input", folder), dirs_exist_ok=True)
    values = copy.deepcopy(TINY)
    values["Photos"]["folder"] = folder
    values["Train"]["steps"] = steps
    for title in ("Sample before", "Sample after"):
        values[title]["steps"] = 1
    workflow = read_workflow(LORA)
    page.load(workflow)
    for title, widgets in values.items():
        for name, value in widgets.items():
            page.set_widget(find_nodes(workflow, title)[0]["id"], name, value)


def sent(entry):
    """Return the prompt of a history entry without Preview Any, which sends back its text and affects nothing."""
    return {node: value for node, value in entry["prompt"][2].items() if value["class_type"] != "PreviewAny"}


def read_steps(run):
    """Return the steps in a run's log, in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["step"] for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("inner", [False, True], ids=["graph", "subgraph"])
def test_preview_options_saved_before_the_model_input_keep_links_and_values(page, errors, renderer, inner):
    page.load(EMPTY)
    kinds = ("GraftRunOptions", "PrimitiveStringMultiline", "GraftPreviewOptions", "GraftTrainLoRA")
    first, text, node, trainer = page.add_nodes([(kind, 500 * place, 100) for place, kind in enumerate(kinds)])
    page.connect(first, 0, node, "options")
    page.connect(text, 0, node, "negative_prompt")
    page.connect(node, 0, trainer, "options")
    set_values = {"prompts": "a red toy", "every": 7, "seed": 5}
    page.set_widgets([(text, "value", "blurry"), *((node, *one) for one in set_values.items())])
    if inner:
        page.js("app.graph.convertToSubgraph(new Set([app.graph.getNodeById(args[0])]));", node)
    workflow = page.serialize()
    forget_inputs(workflow["definitions"]["subgraphs"][0] if inner else workflow, "GraftPreviewOptions")
    page.load(workflow)
    again = page.serialize()
    again = again["definitions"]["subgraphs"][0] if inner else again
    (saved,) = (one for one in again["nodes"] if one["type"] == "GraftPreviewOptions")
    ends = {saved["inputs"][slot]["name"] for target, slot in map(end_of, again["links"]) if target == saved["id"]}
    # Newer frontends show the seed of a new subgraph's node outside, which is a link inside.
    assert ends - ({"seed"} if inner else set()) == {"options", "negative_prompt"}
    prompt = page.to_prompt()
    (found,) = (one["inputs"] for one in prompt.values() if one["class_type"] == "GraftPreviewOptions")
    sources = {name: prompt[found.pop(name)[0]]["class_type"] for name in ("options", "negative_prompt")}
    assert sources == dict(zip(("options", "negative_prompt"), kinds, strict=False))
    assert set_values.items() <= found.items() and found["strength"] == 1 and "model" not in found
    assert errors() == []


def test_a_widget_that_a_subgraph_shows_of_older_preview_options_stays_shown(page, errors, renderer):
    """The frontend finds it by the place of its input, which the newer socket has moved."""
    page.load(EMPTY)
    kinds = ("PrimitiveStringMultiline", "GraftPreviewOptions", "GraftTrainLoRA")
    text, node, trainer = page.add_nodes([(kind, 500 * place, 100) for place, kind in enumerate(kinds)])
    page.connect(text, 0, node, "negative_prompt")
    page.connect(node, 0, trainer, "options")
    outer = page.js("""
        const inner = app.graph.getNodeById(args[0]);
        const {node} = app.graph.convertToSubgraph(new Set([inner]));
        node.disconnectInput(node.inputs.findIndex(input => input.name === 'negative_prompt'));
        return node.id;""", node)  # fmt: skip
    workflow = page.serialize()
    forget_inputs(workflow["definitions"]["subgraphs"][0], "GraftPreviewOptions")
    page.load(workflow)
    page.set_widget(outer, "negative_prompt", "blurry")
    (found,) = (one["inputs"] for one in page.to_prompt().values() if one["class_type"] == "GraftPreviewOptions")
    assert found["negative_prompt"] == "blurry"
    assert errors() == []


def end_of(link):
    """Return (node, slot) at the end of a saved link, in a graph's form or a subgraph's."""
    return (link["target_id"], link["target_slot"]) if isinstance(link, dict) else (link[3], link[4])


def forget_inputs(graph, kind):
    """Take the inputs `model` and `strength` from a saved graph's node, as it was before they were added."""
    (node,) = (one for one in graph["nodes"] if one["type"] == kind)
    places = [place for place, slot in enumerate(node["inputs"]) if slot["name"] in ("model", "strength")]
    node["inputs"] = [slot for slot in node["inputs"] if slot["name"] not in ("model", "strength")]
    # The last value is that of `strength`.
    node["widgets_values"] = node["widgets_values"][:-1]
    for link in graph["links"]:
        target, slot = end_of(link)
        if target == node["id"]:
            link["target_slot" if isinstance(link, dict) else 4] = slot - sum(place < slot for place in places)


def test_run_pressed_twice_trains_once_and_more_steps_extend_it(page, server, errors):
    open_tiny_example(page, server, "pressed_twice", steps=2)
    first = server.wait(page.queue())
    again = server.wait(page.queue())
    # Not only is the log unchanged: the page sent the same values, the seeds included.
    assert sent(first) == sent(again)
    (run,) = server.path("output", "graft").glob("pressed_twice-*")
    assert read_steps(run) == [1, 2]

    train = find_nodes(read_workflow(LORA), "Train")[0]["id"]
    page.set_widget(train, "steps", 3)
    server.wait(page.queue())
    assert list(server.path("output", "graft").glob("pressed_twice-*")) == [run]
    assert read_steps(run) == [1, 2, 3]
    assert errors() == []


def test_apply_adapter_shows_its_remarks_until_a_run_has_none(page, errors, renderer):
    page.load(EMPTY)
    node = page.add_node("GraftApplyAdapter")
    run = "app.graph.getNodeById(args[0]).onExecuted({ text: [args[1]] });"
    lines = "return [...document.querySelectorAll('.graft-report p')].map((line) => line.textContent);"
    for remarks in (["3 keys of 40 fit no layer", "2 weights changed"], ["1 key"], [], ["2 keys"]):
        page.js(run, node, "\n".join(remarks))
        page.wait_for(
            lines.replace("return", "const shown =") + f"return shown.join() === {json.dumps(','.join(remarks))};"
        )
    assert errors() == []
    assert "graft_remarks" not in json.dumps(page.serialize())
