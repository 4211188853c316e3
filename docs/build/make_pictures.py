"""Make the pictures of README and of the template browser: the example, run on the tiny base in the real page.

python -m docs.build.make_pictures           assets/graph.jpg, assets/before_after.png, the thumbnail
python -m docs.build.make_pictures --unrun   assets/graph.jpg only, as the example opens
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests import demo
from tests.support.browser import Browser
from tests.support.host import ROOT
from tests.support.pack import hide_root
from tests.support.server import ComfyServer
from tests.support.workflow import find_nodes, read_workflow

from .make_thumbnails import EXAMPLES, draw_thumbnail
from .make_workflows import TINY

PICTURES = ROOT / "assets"
THUMBNAIL = demo.WORKFLOW.with_suffix(".jpg")
# Large enough that the editor draws its texts.
WINDOW = (2800, 1640)
WIDTH = 1800

# Overlays of the page over the graph.
COVERS = ".side-toolbar-container, .minimap-main-container, .workflow-tabs-container, .actionbar-container, .p-toast"


def take_graph(page, path, width=WIDTH, **saving):
    """Take a picture of the whole graph without the page's overlays, at most `width` wide."""
    page.fit()
    page.js("document.querySelectorAll(args[0]).forEach(cover => { cover.style.visibility = 'hidden'; });", COVERS)
    time.sleep(1)
    shot = page.shoot()
    left, top, right, bottom = find_graph(page)
    cut = shot.crop((max(0, left), max(0, top), min(shot.width, right), min(shot.height, bottom)))
    cut.thumbnail((width, width), Image.Resampling.LANCZOS)
    path.parent.mkdir(exist_ok=True)
    cut.save(path, **saving)
    print(path, cut.size, path.stat().st_size, flush=True)


def find_graph(page, margin=16):
    """Return (left, top, right, bottom) of all nodes and groups in the page, in pixels."""
    corners = page.js("""
        const boxes = [...app.graph.nodes, ...app.graph.groups].map(item => item.boundingRect ?? item.getBounding?.());
        const low = [0, 1].map(side => Math.min(...boxes.map(box => box[side])));
        const high = [0, 1].map(side => Math.max(...boxes.map(box => box[side] + box[side + 2])));
        const {x, y} = app.canvas.canvas.getBoundingClientRect();
        return [low, high].flatMap(point => {
            const [left, top] = app.canvas.ds.convertOffsetToCanvas(point);
            return [left + x, top + y];
        });""")
    return [round(corner + (margin if place > 1 else -margin)) for place, corner in enumerate(corners)]


def run_in_page(page, server, steps=None):
    """Enter the tiny base's values, press Run and wait; return (workflow, history entry)."""
    workflow = read_workflow(demo.WORKFLOW)
    page.load(workflow)
    for title, widgets in TINY.items():
        for name, value in widgets.items():
            page.set_widget(find_nodes(workflow, title)[0]["id"], name, value)
    page.set_widget(find_nodes(workflow, "Size and number")[0]["id"], "batch_size", demo.PICTURES)
    if steps:
        page.set_widget(find_nodes(workflow, "Train")[0]["id"], "steps", steps)
    entry = server.wait(page.queue())
    page.wait_for("return app.graph.nodes.filter(node => node.type === 'SaveImage').every(node => node.imgs?.length);")
    return workflow, entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unrun", action="store_true", help="only a picture of the graph as it opens")
    parser.add_argument("--steps", type=int, help="train for fewer steps, to try this program")
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-pictures-") as scratch:
        folder = Path(scratch)
        server = ComfyServer(folder / "server") if args.unrun else demo.prepare(folder, demo.Line())
        with server, Browser(folder / "chromium", *WINDOW) as browser:
            page = browser.open(server.url)
            if args.unrun:
                page.load_file(demo.WORKFLOW)
            else:
                workflow, entry = run_in_page(page, server, args.steps)
                demo.draw_comparison(server, workflow, entry, PICTURES / "before_after.png")
                draw_thumbnail(server, workflow, entry, EXAMPLES[demo.WORKFLOW.stem][1], THUMBNAIL)
            take_graph(page, PICTURES / "graph.jpg", quality=80, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
