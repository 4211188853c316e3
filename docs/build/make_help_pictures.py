"""Make the small workflow pictures on the nodes' help pages with the real frontend.

    python -m docs.build.make_help_pictures           all into web/docs/pictures
    python -m docs.build.make_help_pictures --only loss

Several nodes share a picture: the workflow that contains them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.support.browser import EMPTY, Browser
from tests.support.host import ROOT
from tests.support.pack import hide_root
from tests.support.server import ComfyServer

from .make_pictures import take_graph

FOLDER = ROOT / "web" / "docs" / "pictures"
WINDOW = (2400, 1500)
WIDTH = 800
GAP = (70, 60)
# Values that combos show, instead of this machine's files.
VALUES = {
    "ckpt_name": "v1-5-pruned-emaonly.safetensors",
    "folder": "my_photos",
    "adapter_name": "my_dog.safetensors",
    "embedding_name": "my-dog.safetensors",
    "image": "photo.png",
}

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
        [
            ("look", "GraftInspectDataset", {**BASE, "dataset": ("both", 0)}),
            ("report", "PreviewAny", {"source": ("look", 1)}),
        ],
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


def lay_out(page, columns):
    """Put the nodes in columns from left to right and link them."""
    page.load(EMPTY)
    made, left = {}, 0
    for column in columns:
        top, wide = 0, 0
        for name, kind, *_ in column:
            made[name] = page.add_node(kind, left, top)
            page.js("""
                for (const widget of app.graph.getNodeById(args[0]).widgets ?? []) {
                    if (args[1][widget.name]) widget.value = args[1][widget.name];
                }""", made[name], VALUES)  # fmt: skip
            width, height = page.js("return [...app.graph.getNodeById(args[0]).size];", made[name])
            top, wide = top + height + GAP[1], max(wide, width)
        left += wide + GAP[0]
    for column in columns:
        for name, _, *links in column:
            for given, (source, slot) in (links[0] if links else {}).items():
                page.connect(made[source], slot, made[name], given)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PICTURES), nargs="+", default=list(PICTURES))
    args = parser.parse_args()
    hide_root()
    with tempfile.TemporaryDirectory(prefix="graft-help-") as scratch:
        server = ComfyServer(Path(scratch) / "server")
        with server, Browser(Path(scratch) / "chromium", *WINDOW) as browser:
            page = browser.open(server.url)
            for name in args.only:
                lay_out(page, PICTURES[name])
                take_graph(page, FOLDER / f"{name}.webp", WIDTH, quality=75, method=6)


if __name__ == "__main__":
    sys.exit(main())
