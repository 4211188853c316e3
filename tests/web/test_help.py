"""Tests of integration into ComfyUI: help opens from every node, texts follow the language, the blueprint runs."""

import json
import re
import shutil

import pytest

from docs.build import make_blueprint, make_locales
from docs.build.make_workflows import TINY
from tests.support.browser import EMPTY
from tests.support.host import ROOT, read_version
from tests.toy import world

pytestmark = [pytest.mark.browser, pytest.mark.server]

# The page requests this file before the shared one of all languages; a missing one is no error of ours.
IN_THE_LANGUAGE = "/docs/Graft"

PICTURES = (ROOT / "web" / "docs" / "pictures" / "workflows.svg").read_text(encoding="ascii")
VIEWS = {name: [int(n) for n in box.split()] for name, box in re.findall(r'<view id="(\w+)" viewBox="(.*?)"', PICTURES)}

OPEN = """
    const node = app.graph.getNodeById(args[0]);
    app.canvas.selectNode(node);
    app.canvas.select(node);
    app.canvas.setDirty(true, true);
    const until = async (find) => {
        for (let turn = 0; turn < 800; turn += 1) {
            const found = find();
            if (found) return found;
            await new Promise(resolve => setTimeout(resolve, 50));
        }
        throw new Error(`${node.type}: no help`);
    };
    (await until(() => document.querySelector('[data-testid=info-button]'))).click();
    await until(() => document.querySelector('.node-help-content h1')?.textContent.trim() === args[1]);
    const image = await until(() => [...document.querySelectorAll('.node-help-content img')].find(
        image => image.naturalWidth > 0));
    const {width, height} = image.getBoundingClientRect();
    const links = [...document.querySelectorAll('.node-help-content a')].map(link => link.href);
    return {image: image.src, shape: width / height, links};"""


def test_help_opens_from_every_node(page, server, renderer):
    """By the button above a node, in the host's viewer, with its picture; trainers link to the choosing page."""
    schemas = {name: info for name, info in server.object_info().items() if name.startswith("Graft")}
    # The node whose help is open must not come first, because a second press closes it.
    for name in sorted(schemas):
        page.load(EMPTY)
        title = schemas[name]["display_name"].partition(" (")[0]
        found = page.js(OPEN, page.add_node(name), title)
        # A view of one file that holds all of them; the dataset's page shows its own page first.
        assert "/extensions/graft/docs/pictures/" in found["image"], name
        if ".svg" in found["image"]:
            picture = found["image"].partition("#")[2]
            _, _, width, height = VIEWS[picture]
            assert found["shape"] == pytest.approx(width / height, rel=0.02), name
        if name.startswith("GraftTrain") or name == "GraftFineTune":
            (link,) = [link for link in found["links"] if "choosing" in link]
            assert "<h1>Choosing a method</h1>" in server.request(link.removeprefix(server.url)).decode()
    assert [error for error in page.read_errors() if IN_THE_LANGUAGE not in error] == []


FOLLOW = """
    const link = document.createElement('a');
    link.href = args[0];
    link.addEventListener('click', event => event.preventDefault());
    document.body.append(link);
    link.click();
    link.remove();
    return link.href;"""


@pytest.mark.parametrize(
    "written, followed",
    [
        ("x/extensions/graft/docs/choosing/index.html", "/extensions/graft/docs/choosing/index.html"),
        ("/elsewhere.html", "/elsewhere.html"),
    ],
)
def test_links_between_help_pages_follow_the_packs_folder(page, server, written, followed):
    """Pages assume the folder's usual name; the page's links use the folder that its own script came from."""
    assert page.js(FOLLOW, written) == server.url + followed


def test_the_blueprint_is_offered_and_trains(page, server):
    """The node library lists it; inserted into a graph and run, it trains and saves."""
    (key,) = [key for key, one in server.get("/global_subgraphs").items() if one["name"] == make_blueprint.NAME]
    held = json.loads(server.get(f"/global_subgraphs/{key}")["data"])
    page.load(held)
    (node,) = page.list_nodes()
    shown = [name for names in make_blueprint.SHOWN.values() for name in names]
    assert sorted(name for name in node["widgets"] if name != "graft_panel") == sorted(shown)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "blueprint"), dirs_exist_ok=True)
    base = page.add_node("CheckpointLoaderSimple")
    page.set_widget(base, "ckpt_name", TINY["Checkpoint"]["ckpt_name"])
    for slot, name in enumerate(("model", "clip", "vae")):
        page.connect(base, slot, node["id"], name)
    values = {"folder": "blueprint", "resolution": 64, "steps": 1, "filename_prefix": "from_blueprint"}
    for name, value in values.items():
        page.set_widget(node["id"], name, value)
    server.wait(page.queue())
    assert list(server.path("output", "loras").glob("from_blueprint*.safetensors"))


def test_texts_follow_the_language_of_the_page(server, chromium):
    """The panel's texts at once; node texts if the frontend keeps packs' translations (0.3.75 does not)."""
    page = chromium.open(server.url, {"Comfy.Locale": "fr"})
    table = make_locales.read_table("fr")
    page.load(EMPTY)
    node = page.add_node("GraftTrainLoRA")
    said = page.wait_for("return document.querySelector('.graft-panel .graft-state')?.textContent;")
    assert said == table["Ready"] != "Ready"
    told = page.js("return document.querySelector('.graft-panel .graft-facts').textContent;")
    assert table["Time left"] in told and "Time left" not in told
    if read_version(server.comfy) >= (0, 4, 0):
        assert page.js("return app.graph.getNodeById(args[0]).title;", node) == table["Graft Train LoRA (Training)"]
        assert page.js(
            "return app.graph.getNodeById(args[0]).widgets.find(widget => widget.name === 'steps').label;", node
        ) == table["steps"]  # fmt: skip
