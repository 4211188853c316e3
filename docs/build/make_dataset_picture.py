"""Make the picture of the dataset page for the help of Graft Load Dataset, after a run on the tests' small pictures.

python -m docs.build.make_dataset_picture
python -m docs.build.make_dataset_picture --theme light --out picture.png
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests import demo
from tests.support import graphs
from tests.support.base import get_tiny_base
from tests.support.browser import Browser
from tests.support.dataset_page import DatasetView
from tests.support.pack import hide_root
from tests.support.server import ComfyServer, link

from .make_help_pictures import FILE

WINDOW = (1440, 590)
STEPS = 60
# A wrong caption, so that a loss stands out.
WRONG = {"02": "a large red ring on a pink background"}
WIDTH = 560


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theme", choices=["dark", "light"], default="dark")
    parser.add_argument("--out", type=Path, default=FILE.with_name("page.avif"))
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-dataset-") as scratch:
        server = ComfyServer(Path(scratch) / "server")
        photos = server.path("input", "my_photos")
        shutil.copytree(demo.CONCEPTS / "toy", photos)
        for name, caption in WRONG.items():
            (photos / f"{name}.txt").write_text(caption)
        link(get_tiny_base(), server.path("models", "checkpoints", graphs.CHECKPOINT))
        with server, Browser(Path(scratch) / "chromium", *WINDOW) as browser:
            server.run(graphs.training("my_photos", STEPS))
            page = browser.open(server.url, {"Comfy.ColorPalette": args.theme})
            view = DatasetView(page).open("my_photos", trigger="sks", resolution=64)
            view.select("01.png")
            page.wait_for("return [...document.querySelectorAll('.graft-loss')].every(one => one.textContent);")
            page.wait_for("return [...document.querySelectorAll('.graft-tile img')].every(one => one.naturalWidth);")
            time.sleep(1)
            box = page.js("const {left, top, right, bottom} = document.querySelector('.graft-dataset')"
                          ".getBoundingClientRect(); return [left, top, right, bottom];")  # fmt: skip
            picture = page.shoot().crop(tuple(round(side) for side in box))
            picture.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
            picture.save(args.out, **({"quality": 30, "speed": 0} if args.out.suffix == ".avif" else {}))
            print(args.out, args.out.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
