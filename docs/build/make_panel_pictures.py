"""Pictures of the live panel, in ComfyUI's two themes and renderers, for docs/runs.md and the suite.

    python -m docs.build.make_panel_pictures

Writes four files assets/panel_THEME_RENDERER.jpg: one training on the tiny base per renderer, seen in both themes when
most of it is done.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests import demo
from tests.support import panel as panels
from tests.support.browser import Browser
from tests.support.pack import hide_root
from tests.support.server import ComfyServer

from .make_pictures import COVERS, PICTURES

THEMES = ("dark", "light")
RENDERERS = {"canvas": False, "nodes2": True}  # True for the new renderer
WINDOW = (1500, 1400)
SCALE = 1.25
WIDTH = 480
STEPS = 120
SEEN = 0.6  # fraction of the steps done when the pictures are taken


def take_looks(page, scale=1.0):
    """Return {theme: picture of the trainer} without the page's overlays, and restore the theme."""
    before = page.get_setting("Comfy.ColorPalette")
    page.set_setting("Comfy.NodeBadge.NodeSourceBadgeMode", "None")
    hide = "document.querySelectorAll(args[0]).forEach(cover => { cover.style.visibility = args[1]; });"
    page.js(hide, COVERS, "hidden")
    page.js("""
        const others = app.graph.nodes.filter(node => !node.type.startsWith('GraftTrain'));
        others.forEach((node, place) => { node.pos = [node.type === 'GraftSaveAdapter' ? 3000 : -3000, 300 * place]; });
        app.canvas.deselectAll?.();""")  # fmt: skip
    try:
        return {theme: take_look(page, theme, scale) for theme in THEMES}
    finally:
        page.js(hide, COVERS, "")
        page.set_setting("Comfy.ColorPalette", before)


def take_look(page, theme, scale):
    page.set_setting("Comfy.ColorPalette", theme)
    panels.look_at(page, scale)
    panels.PanelView(page).wait_until_drawn()
    time.sleep(0.3)
    return page.shoot().crop(find_node(page))


def find_node(page, margin=14):
    """Return (left, top, right, bottom) of the trainer in the page, in pixels."""
    left, top, right, bottom = page.js("""
        const whole = document.querySelector('.lg-node:has(.graft-panel)');
        if (whole) {
            const box = whole.getBoundingClientRect();
            return [box.left, box.top, box.right, box.bottom];
        }
        const [x, y, width, height] = app.graph.nodes.find(node => node.type.startsWith('GraftTrain')).boundingRect;
        const {left, top} = app.canvas.canvas.getBoundingClientRect();
        const corners = [[x, y], [x + width, y + height]].map(corner => app.canvas.ds.convertOffsetToCanvas(corner));
        return corners.flatMap(([across, down]) => [across + left, down + top]);""")
    return round(left - margin), round(top - margin), round(right + margin), round(bottom + margin)


def run_and_take(browser, server, name, steps):
    """Return {theme: picture} of a training in the page, seen when most of it is done."""
    page = browser.open(server.url, {"Comfy.VueNodes.Enabled": RENDERERS[name]})
    page.load(panels.draw_graph(page, demo.TINY["Photos"]["folder"]))
    panels.set_values(page, steps=steps, batch_size=4, prompts=demo.TINY["Prompt"]["value"], every=steps // 6,
                      name=name, validation_fraction=0.25, validate_every=steps // 12)  # fmt: skip
    page.js("app.graph.nodes.find(node => node.type === 'GraftTrainLoRA').title = 'Train a LoRA';")
    panels.look_at(page, SCALE)
    prompt = page.queue()
    view = panels.PanelView(page)
    view.wait_for_step(round(SEEN * steps), timeout=900)
    view.pictures()
    taken = take_looks(page, SCALE)
    # On a busy machine the training may be done by now.
    if view.phase() == "training":
        view.press("Stop and keep")
    server.wait(prompt)
    return taken


def write(taken, name, folder):
    """Writes the pictures of a renderer for docs/runs.md; their paths."""
    paths = []
    for theme, picture in taken.items():
        paths.append(Path(folder) / f"panel_{theme}_{name}.jpg")
        small = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
        small.save(paths[-1], quality=82, optimize=True)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="train for fewer steps, to try this program")
    parser.add_argument("--out", type=Path, default=PICTURES, help="the folder they are written to")
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-panel-") as scratch:
        folder = Path(scratch)
        server: ComfyServer = demo.prepare(folder, demo.Line())
        with server, Browser(folder / "chromium", *WINDOW) as browser:
            for name in RENDERERS:
                for path in write(run_and_take(browser, server, name, args.steps), name, args.out):
                    print(path, path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
