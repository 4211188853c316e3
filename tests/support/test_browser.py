"""Tests of the real frontend in a real browser, and of its agreement with this package's own conversion."""

import pytest
from PIL import Image

from tests.support.browser import EMPTY
from tests.support.host import ROOT
from tests.support.workflow import read_workflow, to_prompt

pytestmark = [pytest.mark.browser, pytest.mark.server]

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.fixture(scope="module")
def page(server, chromium):
    Image.new("RGB", (16, 16)).save(server.path("input", "support.png"))
    return chromium.open(server.url)


def build_graph(page):
    """Build a text-to-image graph with a loaded picture and one bypassed node, in the editor."""
    page.load(EMPTY)
    types = "CheckpointLoaderSimple CLIPTextEncode EmptyLatentImage KSampler VAEDecode ImageInvert SaveImage LoadImage"
    ids = {name: page.add_node(name, 300 * place) for place, name in enumerate(types.split())}
    ids["GraftTrainLoRA"] = page.add_node("GraftTrainLoRA", 0, 600)
    ids["GraftLoadDataset"] = page.add_node("GraftLoadDataset", 0, 900)
    for source, slot, target, name in [
        ("CheckpointLoaderSimple", 0, "GraftTrainLoRA", "model"),
        ("CheckpointLoaderSimple", 1, "GraftTrainLoRA", "clip"),
        ("CheckpointLoaderSimple", 2, "GraftTrainLoRA", "vae"),
        ("GraftLoadDataset", 0, "GraftTrainLoRA", "dataset"),
        ("GraftTrainLoRA", 0, "KSampler", "model"),
        ("CheckpointLoaderSimple", 1, "CLIPTextEncode", "clip"),
        ("CLIPTextEncode", 0, "KSampler", "positive"),
        ("CLIPTextEncode", 0, "KSampler", "negative"),
        ("EmptyLatentImage", 0, "KSampler", "latent_image"),
        ("KSampler", 0, "VAEDecode", "samples"),
        ("CheckpointLoaderSimple", 2, "VAEDecode", "vae"),
        ("VAEDecode", 0, "ImageInvert", "image"),
        ("ImageInvert", 0, "SaveImage", "images"),
    ]:
        page.connect(ids[source], slot, ids[target], name)
    page.js("app.graph.getNodeById(args[0]).mode = 4;", ids["ImageInvert"])
    return ids


def keep_known(prompt, info):
    """Return the prompt without inputs that only the editor's own widgets add, such as PreviewAny's text."""
    for node in prompt.values():
        schema = info[node["class_type"]]["input"]
        known = {**schema.get("required", {}), **schema.get("optional", {})}
        node["inputs"] = {name: value for name, value in node["inputs"].items() if name in known}
    return prompt


def test_conversion_agrees_with_the_frontend(page, server):
    ids = build_graph(page)
    page.set_widget(ids["KSampler"], "steps", 3)
    page.set_widget(ids["CLIPTextEncode"], "text", "a large red circle")
    page.set_widget(ids["GraftTrainLoRA"], "seed", 5)
    info = server.object_info()
    assert to_prompt(page.serialize(), info) == keep_known(page.to_prompt(), info)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_convert_as_the_frontend_does(page, server, path):
    page.load_file(path)
    info = server.object_info()
    assert to_prompt(read_workflow(path), info) == keep_known(page.to_prompt(), info)


def test_queue_runs_on_the_server(page, server):
    page.load(EMPTY)
    image = page.add_node("EmptyImage")
    page.set_widget(image, "width", 24)
    page.connect(image, 0, page.add_node("PreviewImage", 400), "images")
    assert len(server.download(server.wait(page.queue()))) == 1
    assert page.read_errors() == []


def test_settings_reach_the_page(page):
    page.set_setting("Comfy.VueNodes.Enabled", True)
    assert page.get_setting("Comfy.VueNodes.Enabled") is True
    page.wait_for("return document.querySelectorAll('[data-node-id]').length > 0;")
    page.set_setting("Comfy.VueNodes.Enabled", False)
