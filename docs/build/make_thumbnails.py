"""Make thumbnails for the template browser: each example runs on the tiny base, its pictures side by side.

    python -m docs.build.make_thumbnails                    all of them
    python -m docs.build.make_thumbnails --only "NAME"      one; "Train a LoRA" comes from make_pictures as well

The columns are the example's own pictures, such as before on the left and after on the right.
"""

import argparse
import copy
import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

from tests import demo
from tests.support import graphs
from tests.support.pack import hide_root
from tests.support.pairs import write_pairs
from tests.support.workflow import find_nodes, read_workflow, to_prompt

from . import make_workflows as examples

SIDE = 128
# [(values on the tiny base, titles of the nodes whose pictures are the columns, True for a dataset without captions)]
EXAMPLES = {
    "Train a LoRA": (examples.TINY, ("Before", "After"), False),
    "DreamBooth a subject": (examples.TINY_DREAMBOOTH, ("The class after", "The subject"), True),
    "Train a textual-inversion embedding": (examples.TINY_EMBEDDING, ("Before", "After"), True),
    "Pivotal tuning": (examples.TINY_PIVOTAL, ("The word alone", "Word and LoRA"), False),
    "Fine-tune a checkpoint": (examples.TINY_FINE_TUNE, ("Before", "After"), False),
    "Merge and resize adapters": (examples.TINY_MERGE, ("Both", "Merged"), False),
    "Preference from pairs": (examples.TINY_PREFERENCE, ("Before", "After"), False),
    "Curriculum": (examples.TINY_CURRICULUM, ("After the first", "After the last"), False),
    "Concept slider": (examples.TINY_SLIDER, ("Pictures",), False),
}
PAIRS = "Train an edit model from pairs"
CLIP = "Train both experts of Wan 2.2"
LORAS = {"First LoRA": "toy", "Second LoRA": "tint"}
STEPS = 120  # for each of the two merged LoRAs


def draw_thumbnail(server, workflow, entry, titles, path):
    """Draw two pictures of each title's node, one below the other."""
    side = SIDE // 2
    sheet = Image.new("RGB", (SIDE, SIDE), "black")
    columns = [server.download(entry, str(find_nodes(workflow, title)[0]["id"])) for title in titles]
    if len(columns) == 1:
        # Two rows of a slider's five strengths: the strengths -1 and 1.
        columns = [columns[0][1::5], columns[0][3::5]]
    for column, pictures in enumerate(columns):
        for row, data in enumerate(pictures[:2]):
            picture = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (column * side, row * side))
    sheet.save(path, quality=30, optimize=True)
    print(path, path.stat().st_size, flush=True)


def draw_pairs(path):
    """Draw two pictures in gray on the left and in color on the right, since no small base edits pictures."""
    side = SIDE // 2
    sheet = Image.new("RGB", (SIDE, SIDE))
    for row, source in enumerate(sorted((demo.CONCEPTS / "toy").glob("*.png"))[:2]):
        picture = Image.open(source).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(picture.convert("L").convert("RGB"), (0, row * side))
        sheet.paste(picture, (side, row * side))
    sheet.save(path, quality=30, optimize=True)


def draw_clip(path):
    """Draw four frames of a picture that moves to the right, since no small base draws clips."""
    side = SIDE // 2
    sheet = Image.new("RGB", (SIDE, SIDE))
    source = min((demo.CONCEPTS / "toy").glob("*.png"))
    picture = Image.open(source).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    for place in range(4):
        frame = ImageChops.offset(picture, (place - 1) * side // 8, 0)
        sheet.paste(frame, (place % 2 * side, place // 2 * side))
    sheet.save(path, quality=30, optimize=True, progressive=True)


def run(server, name):
    """Run an example with the tiny base's values; return (workflow, history entry)."""
    values, _, uncaptioned = EXAMPLES[name]
    values = copy.deepcopy(values)
    for given in values.values():
        if given.get("folder") == "pairs":
            write_pairs(server.path("input", "pairs"), 24)
        elif "folder" in given:
            given["folder"] = copy_concept(server, given["folder"], uncaptioned)
    if name.startswith("Merge"):
        for title, concept in LORAS.items():
            values[title] = {"adapter_name": train_lora(server, concept)}
        values["Prompt"] = {"value": "a large olis sks toy on a green background"}
    workflow = read_workflow(examples.FOLDER / f"{name}.json")
    return workflow, server.run(to_prompt(workflow, server.object_info(), values), timeout=3600)


def copy_concept(server, concept, uncaptioned):
    """Copy a concept's pictures below the server's input folder; return the folder's name."""
    name = f"{concept}_pictures" if uncaptioned else concept
    folder = server.path("input", name)
    shutil.copytree(demo.CONCEPTS / concept, folder, dirs_exist_ok=True)
    if uncaptioned:
        for caption in folder.glob("*.txt"):
            caption.unlink()
    return name


def train_lora(server, concept):
    """Train a LoRA of a concept into a folder that loaders list; return its name."""
    prompt = graphs.training(copy_concept(server, concept, False), STEPS)
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix=concept, format="kohya")
    return Path(server.run(prompt, timeout=3600)["outputs"]["9"]["text"][0]).name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(EXAMPLES), nargs="+", default=list(EXAMPLES))
    args = parser.parse_args()
    hide_root()
    draw_pairs(examples.FOLDER / f"{PAIRS}.jpg")
    draw_clip(examples.FOLDER / f"{CLIP}.jpg")
    with tempfile.TemporaryDirectory(prefix="graft-thumbnails-") as scratch:
        with demo.prepare(Path(scratch), demo.Line()) as server:
            for name in args.only:
                workflow, entry = run(server, name)
                draw_thumbnail(server, workflow, entry, EXAMPLES[name][1], examples.FOLDER / f"{name}.jpg")


if __name__ == "__main__":
    sys.exit(main())
