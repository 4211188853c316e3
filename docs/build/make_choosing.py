"""Make the pictures and figures of the help page "Choosing a method": every method on six images, and its failures.

    python -m docs.build.make_choosing                         web/docs/choosing: the pictures, the page's figures
    python -m docs.build.make_choosing --only lora --folder F  one training, to try it; writes F/choosing.avif
    python -m docs.build.make_choosing --page                  index.html alone, after an edit of README.md

The images are six of the toy world's new object, captioned as a star with a rare word before it; the base knows stars.
"""

import argparse
import io
import json
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open

from tests import demo
from tests.support import graphs
from tests.support.host import ROOT
from tests.support.pack import hide_root
from tests.support.server import ComfyServer
from tests.toy import world

FOLDER = ROOT / "web" / "docs" / "choosing"
PAGE = FOLDER / "README.md"
MARKS = ("<!-- figures -->", "<!-- end of figures -->")
SHELL = """<!DOCTYPE html>
<!-- Made from README.md by docs/build/make_choosing.py. -->
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Choosing a method - Graft</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border: 1px solid color-mix(in srgb, currentColor 30%, transparent); }
th, td { padding: 0.3rem 0.6rem; text-align: left; }
</style>
</head>
<body>
BODY</body>
</html>
"""
IMAGES = 6
SUBJECT, CLASS, WORD = "sks yellow star", "yellow star", "my-star"
# None of the six images shows these.
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
    # True if prompts contain the trigger.
    told: bool = True
    # Pictures of its row. Noise is large in a file, and one shows it.
    shown: int = len(PROMPTS)


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
# The last is the same LoRA, drawn without its trigger.
FAILURES = {
    "over": Training("over-trained", widgets={**LORA, "steps": 1500, "seed": 1}),
    "rate": Training("rate too high", widgets={**LORA, "steps": 40, "learning_rate": 0.1}, shown=1),
    "untold": Training("no trigger", widgets=LORA, told=False),
}


def build(training, name, defaults):
    """Return (graph in API format, its saving node, one picture node per prompt)."""
    graph = graphs.training("choosing", 1, trigger=SUBJECT)
    base = {key: graph["3"]["inputs"][key] for key in ("model", "clip", "vae", "dataset")}
    graph["3"] = graphs.node(training.kind, **{**defaults[training.kind], "seed": 0, **training.widgets, **base})
    prompts = [prompt for _, prompt in PROMPTS]
    if training.kind == "GraftTrainEmbedding":
        model, clip = ["1", 0], ["3", 0]
        graph["9"] = graphs.node("GraftSaveEmbedding", embedding=["3", 1], name="")
        prompts = [prompt.replace(SUBJECT, f"embedding:{WORD}") for prompt in prompts]
    else:
        model, clip = ["3", 0], ["3", 1]
        graph["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix=name, format="kohya")
    if not training.told:
        prompts = [prompt.replace(SUBJECT, CLASS) for prompt in prompts]
    return graph, "9", draw(graph, prompts, model, clip)


def draw(graph, prompts, model, clip):
    """Add a picture for each prompt, from the same noise in all rows; return the saving nodes."""
    return [
        graphs.sampling(graph, text, model, clip, "choosing", seed=7 + place, start=100 + 10 * place)
        for place, text in enumerate(prompts)
    ]


def read(server, entry, nodes):
    """Return the pictures of these nodes."""
    return [Image.open(io.BytesIO(server.download(entry, node)[0])).convert("RGB") for node in nodes]


def weigh(server, entry, saved):
    """Measure a training's output: the number of values in its file, the file's bytes, the saved state's bytes."""
    path = Path(entry["outputs"][saved]["text"][0])
    with safe_open(path, "np") as file:
        names = [key for key in list(file.keys()) if not key.endswith(".alpha")]
        identity = file.metadata()["graft_identity"]
        values = sum(math.prod(file.get_slice(key).get_shape()) for key in names)
    state = sorted(server.path("output", "graft").glob(f"*-{identity[:8]}/state-*.safetensors"))[-1]
    return {"values": values, "file": path.stat().st_size, "state": state.stat().st_size}


def run(server, trainings):
    """Return {name: (pictures, figures)} of trainings on the server, with the base's own pictures under "base"."""
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
    """Return a server with the base and the six images, not started."""
    server: ComfyServer = demo.prepare(folder, demo.Line())
    target = server.path("input", "choosing")
    target.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in list(enumerate(world.concept_pictures("toy")))[:IMAGES]:
        Image.fromarray(picture).save(target / f"{number:02d}.png")
        text = caption.replace(f"{world.TOY_TRIGGER} toy", SUBJECT)
        (target / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return server


def draw_sheet(headings, rows, side=96, left=118, head=40, gap=6):
    """Draw rows of pictures with their names on the left and headings on top."""
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
    """Save a small file."""
    sheet.thumbnail((400, 10_000))
    sheet.save(path, quality=26, speed=0)
    print(path, path.stat().st_size)


def rows_of(made, names):
    """Return [(label, pictures)] of trainings."""
    every = {**METHODS, **FAILURES}
    return [(every[name].label.replace(" ", "\n", 1), made[name][0][: every[name].shown]) for name in names]


def describe(made):
    """Return the page's figures as a Markdown table."""
    heads = [METHODS[name].label for name in METHODS]
    figures = [made[name][1] for name in METHODS]
    widgets = [METHODS[name].widgets for name in METHODS]
    rows = [
        ("steps, pictures in each", [f"{one['steps']}, {one['batch_size']}" for one in widgets]),
        ("learning rate", [f"{one['learning_rate']:g}" for one in widgets]),
        ("numbers in the file", [f"{one['values']:,}" for one in figures]),
        ("size of the file", [_size(one["file"]) for one in figures]),
        ("kept to resume: trained values, optimizer", [_size(one["state"]) for one in figures]),
    ]
    lines = ["", *(" | ".join(cells) for cells in [heads, ["---"] * len(heads), *(row for _, row in rows)])]
    names = ["", "measured here", "---", *(name for name, _ in rows)]
    return "\n".join(f"| {name} | {line} |" for name, line in list(zip(names, lines, strict=True))[1:])


def _size(count):
    return f"{count / 1000:,.0f} kB" if count < 1e6 else f"{count / 1e6:,.1f} MB"


def write_figures(made):
    """Write the figures into the page, between its marks."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{mark}\n\n{describe(made)}\n\n{end}{after}", encoding="utf-8")


def render(text):
    """Return the page as HTML for a browser, because the help viewer shows only pages of nodes."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark").enable("table").render(text)
    return SHELL.replace("BODY", body)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {**METHODS, **FAILURES}
    parser.add_argument("--only", choices=list(every), nargs="+", help="try these alone")
    parser.add_argument("--folder", type=Path, help="where the server works; nothing is trained twice there")
    parser.add_argument("--page", action="store_true", help="index.html alone")
    args = parser.parse_args()
    if not args.page:
        hide_root()
        with tempfile.TemporaryDirectory(prefix="graft-choosing-") as scratch:
            folder = args.folder or Path(scratch)
            with prepare(folder) as server:
                made = run(server, {name: every[name] for name in args.only or every})
            headings, base = [heading for heading, _ in PROMPTS], ("the base", made["base"][0])
            if args.only:
                save(draw_sheet(headings, [base, *rows_of(made, args.only)]), folder / "choosing.avif")
                return
            shown = [Image.open(path) for path in sorted((folder / "comfyui" / "input" / "choosing").glob("*.png"))]
            save(draw_sheet([], [("the six\nimages", shown)], head=0), FOLDER / "images.avif")
            save(draw_sheet(headings, [base, *rows_of(made, METHODS)]), FOLDER / "methods.avif")
            save(draw_sheet(headings, rows_of(made, ["lora", *FAILURES])), FOLDER / "failures.avif")
            write_figures(made)
    (FOLDER / "index.html").write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
