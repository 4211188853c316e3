"""Make the picture of the dataset page on the help page of Graft Load Dataset, on the tests' small pictures.

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
from tests.support.browser import Browser
from tests.support.dataset_page import DatasetView
from tests.support.pack import hide_root
from tests.support.server import ComfyServer

from .make_help_pictures import FOLDER

WINDOW = (1440, 760)
WIDTH = 800


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--theme", choices=["dark", "light"], default="dark")
    parser.add_argument("--out", type=Path, default=FOLDER / "page.avif")
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-dataset-") as scratch:
        server = ComfyServer(Path(scratch) / "server")
        shutil.copytree(demo.CONCEPTS / "toy", server.path("input", "my_photos"))
        with server, Browser(Path(scratch) / "chromium", *WINDOW) as browser:
            page = browser.open(server.url, {"Comfy.ColorPalette": args.theme})
            view = DatasetView(page).open("my_photos", trigger="sks", resolution=64)
            view.select("01.png")
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
