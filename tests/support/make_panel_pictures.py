"""Pictures of the live panel for README: a training on the tiny base in the real page, by theme and renderer.

    python -m tests.support.make_panel_pictures

Writes assets/panel.jpg: dark and light beside each other, the node as the canvas draws it and as Nodes 2.0 does.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests import demo

from . import panel as panels
from .browser import Browser
from .make_pictures import COVERS, PICTURES
from .pack import hide_root
from .server import ComfyServer

# [(theme, whether in the new renderer)], from left to right.
LOOKS = [("dark", False), ("light", True)]
WINDOW = (1500, 1400)
SCALE = 1.25
STEPS = 120
SEEN = 0.7  # share of the steps that are done when the picture is taken


def take_node(page):
    """A picture of the trainer without what the page lays over it."""
    page.js("document.querySelectorAll(args[0]).forEach(cover => { cover.style.visibility = 'hidden'; });", COVERS)
    page.js("""
        const others = app.graph.nodes.filter(node => !node.type.startsWith('GraftTrain'));
        others.forEach((node, place) => { node.pos = [node.type === 'GraftSaveAdapter' ? 3000 : -3000, 300 * place]; });
        app.canvas.deselectAll?.();
        app.canvas.setDirty(true, true);""")  # fmt: skip
    panels.look_at(page, SCALE)
    shot = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    return shot.crop(find_node(page))


def find_node(page, margin=14):
    """(left, top, right, bottom) of the trainer in the page, in pixels."""
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


def run_and_take(browser, server, theme, new_renderer, steps):
    """A training in the page, seen when most of it is done."""
    page = browser.open(server.url, {"Comfy.ColorPalette": theme, "Comfy.VueNodes.Enabled": new_renderer})
    page.load(panels.draw_graph(page, demo.TINY["Photos"]["folder"]))
    panels.set_values(page, steps=steps, batch_size=4, prompts=demo.TINY["Prompt"]["value"], every=steps // 6,
                      name=f"{theme}-{new_renderer}", validation_fraction=0.25, validate_every=steps // 12)  # fmt: skip
    page.js("app.graph.nodes.find(node => node.type === 'GraftTrainLoRA').title = 'Train a LoRA';")
    panels.look_at(page, SCALE)
    prompt = page.queue()
    view = panels.PanelView(page)
    view.wait_for_step(round(SEEN * steps), timeout=900)
    view.pictures()
    picture = take_node(page)
    view.press("Stop and keep")
    server.wait(prompt)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="train for fewer steps, to try this program")
    parser.add_argument("--out", type=Path, default=PICTURES / "panel.jpg")
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-panel-") as scratch:
        folder = Path(scratch)
        server: ComfyServer = demo.prepare(folder, demo.Line())
        with server, Browser(folder / "chromium", *WINDOW) as browser:
            taken = [run_and_take(browser, server, theme, new, args.steps) for theme, new in LOOKS]
    height = max(picture.height for picture in taken)
    sheet = Image.new("RGB", (sum(picture.width for picture in taken), height), taken[0].getpixel((2, 2)))
    left = 0
    for picture in taken:
        sheet.paste(picture.getpixel((2, 2)), (left, 0, left + picture.width, height))
        sheet.paste(picture, (left, 0))
        left += picture.width
    sheet.save(args.out, quality=86, optimize=True)
    print(args.out, sheet.size, args.out.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
