"""Make the small workflow pictures on the nodes' help pages: the nodes and wires of a graph, as SVG.

    python -m docs.build.make_help_pictures

All pictures are in one file, which compresses well; a page shows one by its name: workflows.svg#lora. Several nodes
share a picture: the workflow that contains them. A picture shows the inputs and outputs that are linked. Titles, names
and types come from ComfyUI's own list of nodes.
"""

import sys
import tempfile
from collections import defaultdict
from html import escape
from pathlib import Path

from tests.support.host import ROOT
from tests.support.pack import hide_root
from tests.support.server import ComfyServer

FILE = ROOT / "web" / "docs" / "pictures" / "workflows.svg"

# Pixels of a picture at its own size: title and slot rows, the gaps between nodes, the width of a letter.
TITLE, ROW, LETTER, EDGE = 24, 17, 6.4, 8
GAP = (44, 20)
# Units from one picture to the next below it: a browser that shows more than a picture's own area shows no other one.
STEP = 400
# The colors of the page's dark theme.
BODY, BAR, TEXT = "#353535", "#222", "#ddd"
TYPES = {
    "MODEL": "#B39DDB",
    "CLIP": "#FFD500",
    "VAE": "#FF6E6E",
    "CONDITIONING": "#FFA931",
    "IMAGE": "#64B5F6",
    "MASK": "#81C784",
}
USUAL_TYPE = "#9A9A9A"

BASE = {"model": ("base", 0), "clip": ("base", 1), "vae": ("base", 2)}
CHECKPOINT, PHOTOS = ("base", "CheckpointLoaderSimple"), ("photos", "GraftLoadDataset")


def trainer(kind, **links):
    return ("train", kind, {**BASE, "dataset": ("photos", 0), **links})


def prompt(clip=("train", 1)):
    return ("prompt", "CLIPTextEncode", {"clip": clip})


def sampler(model=("train", 0)):
    return ("sample", "KSampler", {"model": model, "positive": ("prompt", 0)})


# {picture: columns of (name, node type, {input: (name, output index)})}
PICTURES = {
    "lora": [
        [CHECKPOINT, PHOTOS],
        [trainer("GraftTrainLoRA")],
        [prompt(), ("save", "GraftSaveAdapter", {"adapter": ("train", 2)})],
        [sampler()],
    ],
    "embedding": [
        [CHECKPOINT, PHOTOS],
        [trainer("GraftTrainEmbedding")],
        [prompt(("train", 0)), ("save", "GraftSaveEmbedding", {"embedding": ("train", 1)})],
        [sampler(("base", 0))],
    ],
    "dreambooth": [
        [CHECKPOINT, PHOTOS],
        [("class", "GraftClassImages", BASE)],
        [trainer("GraftTrainDreamBooth", class_dataset=("class", 0))],
        [prompt()],
        [sampler()],
    ],
    "fine_tune": [
        [CHECKPOINT, PHOTOS],
        [trainer("GraftFineTune")],
        [prompt(), ("save", "CheckpointSave", {"model": ("train", 0), "clip": ("train", 1), "vae": ("base", 2)})],
        [sampler()],
    ],
    "preference": [
        [CHECKPOINT, PHOTOS],
        [trainer("GraftTrainPreference")],
        [prompt(), ("save", "GraftSaveAdapter", {"adapter": ("train", 2)})],
        [sampler()],
    ],
    "slider": [
        [CHECKPOINT],
        [("train", "GraftTrainSlider", BASE)],
        [
            ("save", "GraftSaveAdapter", {"adapter": ("train", 2)}),
            ("row", "GraftCompare", {**BASE, "adapter": ("train", 2)}),
        ],
    ],
    "prior": [
        [CHECKPOINT, PHOTOS],
        [("class", "GraftClassImages", BASE)],
        [("prior", "GraftPriorPreservation", {"dataset": ("photos", 0), "class_dataset": ("class", 0)})],
        [trainer("GraftTrainLoRA", dataset=("prior", 0))],
    ],
    "dataset": [
        [CHECKPOINT, ("images", "LoadImage"), PHOTOS],
        [("made", "GraftDatasetFromImages", {"images": ("images", 0)})],
        [("both", "GraftCombineDatasets", {"dataset_a": ("made", 0), "dataset_b": ("photos", 0)})],
        [("look", "GraftInspectDataset", {**BASE, "dataset": ("both", 0)})],
        [("report", "PreviewAny", {"source": ("look", 1)})],
    ],
    # A captioner of another pack goes between the pictures and Save Captions.
    "save": [
        [("images", "LoadImage")],
        [("save", "GraftSaveDataset", {"images": ("images", 0), "masks": ("images", 1)})],
        [("give", "GraftImagesFromDataset", {"dataset": ("save", 0)})],
        [("captions", "GraftSaveCaptions", {"dataset": ("give", 2), "captions": ("give", 1)})],
    ],
    "options": [
        [("run", "GraftRunOptions")],
        [("preview", "GraftPreviewOptions", {"options": ("run", 0)})],
        [("optimizer", "GraftOptimizerOptions", {"options": ("preview", 0)})],
        [("train", "GraftTrainLoRA", {"options": ("optimizer", 0)})],
    ],
    "apply": [
        [CHECKPOINT, ("load", "GraftLoadAdapter")],
        [("apply", "GraftApplyAdapter", {"model": ("base", 0), "clip": ("base", 1), "adapter": ("load", 0)})],
        [prompt(("apply", 1))],
        [sampler(("apply", 0))],
    ],
    "merge": [
        [("first", "GraftLoadAdapter"), ("second", "GraftLoadAdapter")],
        [("merge", "GraftMergeAdapters", {"adapter_a": ("first", 0), "adapter_b": ("second", 0)})],
        [("resize", "GraftResizeAdapter", {"adapter": ("merge", 0)})],
        [
            ("save", "GraftSaveAdapter", {"adapter": ("resize", 0)}),
            ("look", "GraftInspectAdapter", {"adapter": ("resize", 0)}),
        ],
    ],
    "extract": [
        [("tuned", "CheckpointLoaderSimple"), CHECKPOINT],
        [
            (
                "extract",
                "GraftExtractAdapter",
                {
                    "model_tuned": ("tuned", 0),
                    "model_base": ("base", 0),
                    "clip_tuned": ("tuned", 1),
                    "clip_base": ("base", 1),
                },
            )
        ],
        [("save", "GraftSaveAdapter", {"adapter": ("extract", 0)})],
    ],
    "compare": [
        [CHECKPOINT, ("load", "GraftLoadAdapter")],
        [("compare", "GraftCompare", {**BASE, "adapter": ("load", 0)})],
        [("shown", "PreviewImage", {"images": ("compare", 0)})],
    ],
    "word": [
        [CHECKPOINT, ("load", "GraftLoadEmbedding")],
        [("apply", "GraftApplyEmbedding", {"clip": ("base", 1), "embedding": ("load", 0)})],
        [prompt(("apply", 0))],
        [sampler(("base", 0))],
    ],
    "job": [
        [CHECKPOINT, PHOTOS],
        [("export", "GraftExportJob", {**BASE, "dataset": ("photos", 0)})],
    ],
    "loss": [
        [CHECKPOINT, PHOTOS],
        [trainer("GraftTrainLoRA")],
        [("plot", "GraftPlotLoss", {"loss": ("train", 3)})],
    ],
}  # fmt: skip


def lay_out(columns, schemas):
    """Return {name: box} of a picture's nodes in columns from left to right, and its links.

    A box is (left, top, width, title, names of linked inputs, names of linked outputs by index). A link is
    (source, output index, target, input name, type).
    """
    links = [
        (source, slot, name, input, schemas[kinds_of(columns)[source]]["output"][slot])
        for column in columns
        for name, _, *inputs in column
        for input, (source, slot) in (inputs[0] if inputs else {}).items()
    ]
    boxes, left = {}, 0
    for column in columns:
        top, widest = 0, 0
        for name, kind, *_ in column:
            schema = schemas[kind]
            title = schema["display_name"].partition(" (")[0]
            inputs = [input for _, _, target, input, _ in links if target == name]
            slots = sorted({slot for source, slot, *_ in links if source == name})
            outputs = {slot: schema["output_name"][slot] for slot in slots}
            letters = [len(title) + 2, *map(len, inputs), *map(len, outputs.values())]
            if inputs and outputs:
                letters.append(max(map(len, inputs)) + max(map(len, outputs.values())) + 3)
            width = round(max(letters) * LETTER) + 2 * EDGE
            boxes[name] = (left, top, width, title, inputs, outputs)
            top += height_of(boxes[name]) + GAP[1]
            widest = max(widest, width)
        left += widest + GAP[0]
    return boxes, links


def kinds_of(columns):
    """Return {name: node type} of a picture."""
    return {name: kind for column in columns for name, kind, *_ in column}


def height_of(box):
    *_, inputs, outputs = box
    return TITLE + max(len(inputs), len(outputs), 1) * ROW + 6


def draw(name, columns, top, schemas):
    """Return a picture as lines of SVG, `top` units below the first.

    One path holds all wires of a color, one their ends, one all title bars.
    """
    boxes, links = lay_out(columns, schemas)
    width = max(left + wide for left, _, wide, *_ in boxes.values())
    height = max(box[1] + height_of(box) for box in boxes.values())
    wires, dots = defaultdict(str), defaultdict(dict)
    for source, slot, target, input, type in links:
        start, stop = boxes[source], boxes[target]
        x1, y1 = start[0] + start[2], row_of(start, list(start[5]).index(slot))
        x2, y2 = stop[0], row_of(stop, stop[4].index(input))
        bend, x, y = (x2 - x1) // 2, x2 - x1, y2 - y1
        color = TYPES.get(type, USUAL_TYPE)
        wires[color] += f"M{x1} {y1}" + (f"c{bend} 0 {bend} {y} {x} {y}" if y else f"h{x}")
        # A path of no length with round ends is a dot. An output with several wires has one.
        dots[color] |= {f"M{x1} {y1}h0": None, f"M{x2} {y2}h0": None}
    bars = "".join(
        f"M{left} {top + TITLE}v-{TITLE - 6}q0-6 6-6h{width - 12}q6 0 6 6v{TITLE - 6}"
        for left, top, width, *_ in boxes.values()
    )
    return [
        f'<view id="{name}" viewBox="-6 {top - 6} {width + 12} {height + 12}"/><g transform="translate(0 {top})">',
        # As in the page, wires pass behind nodes.
        '<g fill="none" stroke-width="2.5">',
        *(f'<path stroke="{color}" d="{wire}"/>' for color, wire in wires.items()),
        f'</g><g fill="{BODY}">',
        *(
            f'<rect x="{box[0]}" y="{box[1]}" width="{box[2]}" height="{height_of(box)}" rx="6"/>'
            for box in boxes.values()
        ),
        f'</g><path fill="{BAR}" d="{bars}"/>',
        *(text for box in boxes.values() for text in draw_left(box)),
        '<g text-anchor="end">',
        *(text for box in boxes.values() for text in draw_right(box)),
        '</g><g stroke-linecap="round" stroke-width="8">',
        *(f'<path stroke="{color}" d="{"".join(ends)}"/>' for color, ends in dots.items()),
        "</g></g>",
    ]


def draw_all(schemas):
    """Return the file's text. Without a width, a picture has its view's shape and the width of the page's column."""
    pictures = [draw(name, columns, place * STEP, schemas) for place, (name, columns) in enumerate(PICTURES.items())]
    head = f'viewBox="-6 -6 640 160" font-family="sans-serif" font-size="12" fill="{TEXT}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {head}>', *sum(pictures, []), "</svg>\n"]
    return "\n".join(lines)


def row_of(box, index):
    """Return the vertical middle of a box's slot."""
    return box[1] + TITLE + index * ROW + 11


def draw_left(box):
    """Return the texts at the left of a box: title and inputs."""
    left, top, _, title, inputs, _ = box
    rows = [(top + 16, title), *((row_of(box, index) + 4, name) for index, name in enumerate(inputs))]
    return [f'<text x="{left + EDGE}" y="{y}">{escape(text)}</text>' for y, text in rows]


def draw_right(box):
    """Return the texts at the right of a box: outputs."""
    left, _, width, _, _, outputs = box
    rows = ((row_of(box, index) + 4, name) for index, name in enumerate(outputs.values()))
    return [f'<text x="{left + width - EDGE}" y="{y}">{escape(text)}</text>' for y, text in rows]


def main():
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-help-") as scratch, ComfyServer(Path(scratch) / "server") as server:
        FILE.write_text(draw_all(server.object_info()), encoding="ascii")
    print(FILE, FILE.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
