"""Pictures of the history of runs for docs/runs.md: trainings on the tiny base, listed and compared, in both themes.

    python -m docs.build.make_history_pictures

Writes assets/history-dark.jpg and assets/history-light.jpg: the sidebar and the comparison beside each other.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests import demo
from tests.support import runs
from tests.support.browser import Browser
from tests.support.history import HistoryView
from tests.support.pack import hide_root

from .make_pictures import PICTURES

WINDOW = (1600, 1060)
WIDTH = 1200
STEPS = 90

# Recipe fields of each run, by run name; the last two are compared.
RECIPES = {
    "first-try": {"learning_rate": 5e-4},
    "rank-4": {"rank": 4},
    "higher-rate": {"learning_rate": 6e-3},
}


def train(server, steps):
    """Train the runs, each with its own settings; return their names on disk, the last one first."""
    folder = demo.TINY["Photos"]["folder"]
    previews = {"prompts": demo.TINY["Prompt"]["value"], "every": steps // 5}
    for name, fields in RECIPES.items():
        checked = {"validation_fraction": 0.25, "validate_every": steps // 15}
        graph = runs.graph_of(server, folder, name, steps, previews=previews, **checked)
        graph["3"]["inputs"].update({"batch_size": 4, **fields})
        server.run(graph)
    return [runs.find_run(server, name).name for name in reversed(RECIPES)]


def cut(page, picture, selector):
    """Crop a picture of the page to one element."""
    box = page.js("const {left, top, right, bottom} = document.querySelector(args[0]).getBoundingClientRect();"
                  "return [left, top, right, bottom];", selector)  # fmt: skip
    return picture.crop(tuple(round(side) for side in box))


def look(browser, server, theme, names):
    """Return a picture of the sidebar with the runs and the comparison of two of them, beside each other."""
    page = browser.open(server.url, {"Comfy.ColorPalette": theme})
    history = HistoryView(page).open()
    for name in names[:2]:
        history.choose(name)
        history.wait_for_card(name, "card.querySelector('img').naturalWidth > 0")
    # Wait until the page's opening messages are gone.
    time.sleep(1)
    listed = page.shoot()
    bar = page.js("return document.querySelector('.graft-history').getBoundingClientRect().right;")
    history.press("Compare 2 runs")
    history.comparison()
    time.sleep(0.5)
    compared = cut(page, page.shoot(), ".graft-comparison")
    listed = listed.crop((0, 0, round(bar) + 4, compared.height))
    sheet = Image.new("RGB", (listed.width + compared.width, compared.height))
    sheet.paste(listed, (0, 0))
    sheet.paste(compared, (listed.width, 0))
    sheet.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="train for fewer steps, to try this program")
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-history-") as scratch:
        server = demo.prepare(Path(scratch), demo.Line())
        with server, Browser(Path(scratch) / "chromium", *WINDOW) as browser:
            names = train(server, args.steps)
            for theme in ("dark", "light"):
                path = args.out / f"history-{theme}.jpg"
                look(browser, server, theme, names).save(path, quality=75, optimize=True)
                print(path, path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
