"""Pictures and figures of the help page "Choosing a method": each method on the same six images, and how one fails.

    python -m tests.support.make_choosing             web/docs/choosing: methods.png, failures.png, the tables of figures
    python -m tests.support.make_choosing --only NAME  try one of the trainings; nothing is written but NAME.png here

The images are six of the toy world's new object, called a star of a rare word's kind; the base knows stars.
"""

import argparse
import io
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from tests import demo
from tests.toy import world

from . import graphs
from .host import ROOT
from .pack import hide_root
from .server import ComfyServer

FOLDER = ROOT / "web" / "docs" / "choosing"
PAGE = FOLDER / "README.md"
IMAGES = 6
SUBJECT, CLASS, WORD = "sks yellow star", "yellow star", "my-star"
# Among the six there is none on these.
NEW_PLACES = ("aqua", "black")

# [(heading, prompt)] of the columns.
SUBJECT_PROMPTS = [(f"{SUBJECT},\n{place} (not shown)", world.describe(SUBJECT, place)) for place in NEW_PLACES]
CLASS_PROMPT = (f"{CLASS},\nits class", world.describe(CLASS, "green"))
KNOWN_PROMPTS = [
    ("purple star,\nwhat it knew", world.describe("purple star", "white")),
    ("red circle,\nwhat it knew", world.describe("red circle", "blue")),
]
PROMPTS = [*SUBJECT_PROMPTS, CLASS_PROMPT, *KNOWN_PROMPTS]


@dataclass(frozen=True)
class Training:
    """One row of pictures: a training node with its widgets."""

    label: str
    kind: str = "GraftTrainLoRA"
    widgets: dict = field(default_factory=dict)
    prompts: list = field(default_factory=lambda: PROMPTS)


LORA = {"steps": 150, "learning_rate": 2e-3, "rank": 8, "batch_size": 4}
METHODS = {
    "embedding": Training(
        "textual inversion",
        "GraftTrainEmbedding",
        {"name": WORD, "init_text": "star", "vectors": 2, "steps": 60, "learning_rate": 2e-2, "batch_size": 4},
    ),
    "lora": Training("LoRA", widgets=LORA),
    "dreambooth": Training(
        "DreamBooth",
        "GraftTrainDreamBooth",
        {
            **LORA,
            "instance_prompt": f"a large {SUBJECT}",
            "class_prompt": world.describe(CLASS, "green"),
            "class_images": 24,
        },
    ),
    "all": Training("all weights", "GraftFineTune", {"steps": 50, "learning_rate": 1e-4, "batch_size": 4}),
}
FAILURES = {
    "over": Training("over-trained", widgets={**LORA, "steps": 500, "learning_rate": 5e-3, "batch_size": 2}),
    "rate": Training("learning rate too high", widgets={**LORA, "steps": 40, "learning_rate": 0.1}),
}


def build(training, name, defaults):
    """(graph in API format, its saving node, one picture node a prompt)."""
    graph = graphs.training("choosing", 1, trigger=SUBJECT)
    base = {key: graph["3"]["inputs"][key] for key in ("model", "clip", "vae", "dataset")}
    graph["3"] = graphs.node(training.kind, **{**defaults[training.kind], "seed": 0, **training.widgets, **base})
    if training.kind == "GraftTrainEmbedding":
        model, clip = ["1", 0], ["3", 0]
        graph["9"] = graphs.node("GraftSaveEmbedding", embedding=["3", 1], name="")
    else:
        model, clip = ["3", 0], ["3", 1]
        graph["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix=name, format="kohya")
    told = [prompt.replace(SUBJECT, f"embedding:{WORD}") if clip == ["3", 0] else prompt for _, prompt in PROMPTS]
    return graph, "9", draw(graph, told, model, clip)


def draw(graph, prompts, model, clip):
    """Adds a picture for each prompt, from the same noise in all rows; the nodes that save them."""
    return [
        graphs.sampling(graph, text, model, clip, "choosing", seed=7 + place, start=100 + 10 * place)
        for place, text in enumerate(prompts)
    ]


def read(server, entry, nodes):
    """The pictures of these nodes."""
    return [Image.open(io.BytesIO(server.download(entry, node)[0])).convert("RGB") for node in nodes]


def weigh(server, entry, saved):
    """What a training left: values trained, the file's bytes, bytes that resuming needs."""
    path = Path(entry["outputs"][saved]["text"][0])
    with safe_open(path, "np") as file:
        names = [name for name in file.keys() if not name.endswith(".alpha")]  # noqa: SIM118
        values = sum(_count(file.get_slice(name).get_shape()) for name in names)
    states = sorted(server.path("output", "graft").glob("*/state-*.safetensors"), key=lambda path: path.stat().st_mtime)
    return {"values": values, "file": path.stat().st_size, "state": states[-1].stat().st_size}


def _count(shape):
    total = 1
    for side in shape:
        total *= side
    return total


def run(server, trainings):
    """{name: (pictures, figures)} of trainings on the server, and the base's own pictures under "base"."""
    info = server.object_info()
    defaults = {one.kind: graphs.defaults_of(info[one.kind]) for one in trainings.values()}
    plain = {"1": graphs.node("CheckpointLoaderSimple", ckpt_name=graphs.CHECKPOINT)}
    nodes = draw(plain, [prompt for _, prompt in PROMPTS], ["1", 0], ["1", 1])
    made = {"base": (read(server, server.run(plain), nodes), None)}
    for name, training in trainings.items():
        graph, saved, nodes = build(training, name, defaults)
        entry = server.run(graph, timeout=3600)
        made[name] = (read(server, entry, nodes), weigh(server, entry, saved))
        print(name, json.dumps(made[name][1]), flush=True)
    return made


def prepare(folder):
    """A server with the base and the six images, not started."""
    server: ComfyServer = demo.prepare(folder, demo.Line())
    target = server.path("input", "choosing")
    target.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in list(enumerate(world.concept_pictures("toy")))[:IMAGES]:
        Image.fromarray(picture).save(target / f"{number:02d}.png")
        text = caption.replace(f"{world.TOY_TRIGGER} toy", SUBJECT)
        (target / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return server


def draw_sheet(headings, rows, side=96, left=118, head=40, gap=6):
    """Rows of pictures with their names on the left and headings on top."""
    font = ImageFont.load_default(size=12)
    columns = max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (left + columns * (side + gap), head + len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        pen.multiline_text((left + column * (side + gap), 4), heading, fill="black", font=font)
    for row, (label, pictures) in enumerate(rows):
        top = head + row * (side + gap)
        pen.multiline_text((6, top + side // 2 - 8 * (1 + label.count("\n"))), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            large = picture.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(large, (left + column * (side + gap), top))
    return sheet


def save(sheet, path):
    """As a small file: 128 colours are enough for flat shapes."""
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*METHODS, *FAILURES], nargs="+", help="try these alone")
    parser.add_argument(
        "--folder", type=Path, help="where the server works; what is trained there is not trained again"
    )
    args = parser.parse_args()
    hide_root()
    every = {**METHODS, **FAILURES}
    with tempfile.TemporaryDirectory(prefix="graft-choosing-") as scratch:
        with prepare(args.folder or Path(scratch)) as server:
            made = run(server, {name: every[name] for name in args.only or every})
            shown = [Image.open(path).convert("RGB") for path in sorted(server.path("input", "choosing").glob("*.png"))]
    headings = [heading for heading, _ in PROMPTS]
    rows = [("the base", made["base"][0])]
    rows += [
        (every[name].label.replace(" ", "\n", 1), pictures) for name, (pictures, _) in made.items() if name != "base"
    ]
    if args.only:
        save(draw_sheet(headings, rows), Path("choosing-try.png"))
        return
    raise SystemExit("to be done")


if __name__ == "__main__":
    sys.exit(main())
