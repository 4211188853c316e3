"""Make the blueprint "Train a LoRA from a folder", a subgraph for the node library, with the real frontend.

python -m docs.build.make_blueprint
"""

import json
import sys
import tempfile
import uuid
from pathlib import Path

from tests.support.browser import Browser
from tests.support.host import ROOT
from tests.support.pack import hide_root
from tests.support.server import ComfyServer

from .make_workflows import Sketch, omit_restored

FOLDER = ROOT / "subgraphs"
NAME = "Train a LoRA from a folder"
# Widgets of inner nodes that the subgraph shows, {title: names}.
SHOWN = {
    "Photos": ["folder", "trigger", "resolution"],
    "Train": ["steps", "learning_rate", "rank", "batch_size", "seed"],
    "Save": ["filename_prefix"],
}
FOLDER_NAME = "my_photos"

CONVERT = """
    const [inner, shown, name] = args;
    const items = new Set(inner.map(id => app.graph.getNodeById(id)));
    const {subgraph, node} = app.graph.convertToSubgraph(items);
    subgraph.name = name;
    node.title = name;
    for (const [title, widgets] of Object.entries(shown)) {
        const part = subgraph.nodes.find(node => node.title === title);
        for (const widget of widgets) {
            const slot = part.inputs.find(input => input.widget?.name === widget);
            subgraph.addInput(widget, slot.type).connect(slot, part);
        }
    }
    for (const other of [...app.graph.nodes]) if (other !== node) app.graph.remove(other);
    node.pos = [0, 0];
    node.setSize([400, node.computeSize()[1]]);
    subgraph.inputNode.pos = [-260, 40];
    subgraph.outputNode.pos = [1040, 40];
    return app.graph.serialize();"""


def draw(page):
    """Return the workflow that contains only the subgraph."""
    sketch = Sketch(page)
    node = sketch.node
    base = node("CheckpointLoaderSimple", "Base", (-600, 0), (320, 100))
    photos = node("GraftLoadDataset", "Photos", (0, 0), (420, 640), folder=FOLDER_NAME)
    given = {"model": (base, 0), "clip": (base, 1), "vae": (base, 2), "dataset": (photos, 0)}
    train = node("GraftTrainLoRA", "Train", (480, 0), (420, 630), given)
    saved = node("GraftSaveAdapter", "Save", (480, 720), (420, 122), {"adapter": (train, 2)}, filename_prefix="my_lora")
    # Outside connections become outputs of the subgraph.
    put = node("GraftApplyAdapter", "Put on", (1200, 0), (420, 240),
               {"model": (train, 0), "clip": (train, 1), "adapter": (train, 2)})  # fmt: skip
    loss = node("GraftPlotLoss", "Plot", (1200, 400), (420, 240), {"loss": (train, 3)})
    path = node("PreviewAny", "Path", (1200, 800), (420, 180), {"source": (saved, 0)})
    assert put and loss and path
    return page.js(CONVERT, [photos, train, saved], SHOWN, NAME)


def settle(workflow):
    """Return the workflow without values that change from one drawing to the next."""
    fixed = json.dumps(workflow)
    found = [workflow["id"], *(one["id"] for one in workflow["definitions"]["subgraphs"])]
    for one in workflow["definitions"]["subgraphs"]:
        found += [slot["id"] for slot in (*one["inputs"], *one["outputs"])]
    for place, identity in enumerate(found):
        fixed = fixed.replace(identity, str(uuid.uuid5(uuid.NAMESPACE_URL, f"graft/{NAME}/{place}")))
    workflow = json.loads(fixed)
    for node in workflow["nodes"]:
        # The inputs list the shown widgets already. Frontends from ComfyUI 0.33 on quarantine these entries with their
        # values, and then prefer these values over the user's edits.
        del node["properties"]["proxyWidgets"]
    workflow["revision"] = 0
    workflow["extra"] = {}
    return omit_restored(workflow)


def main():
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-blueprint-") as scratch:
        with ComfyServer(Path(scratch) / "server") as server, Browser(Path(scratch) / "chromium") as browser:
            workflow = settle(draw(browser.open(server.url)))
    path = FOLDER / f"{NAME}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(workflow, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
