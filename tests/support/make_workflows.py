"""The example workflows, drawn by the real frontend, so that what is committed is what saving in the editor gives.

    python -m tests.support.make_workflows

The values are for a real user with an SD1.5 checkpoint; `TINY` holds those for the tiny base.
"""

import argparse
import json
import sys
import tempfile
import uuid
from pathlib import Path

from .browser import Browser
from .host import ROOT
from .server import ComfyServer

FOLDER = ROOT / "example_workflows"

BLUE, ORANGE, GREY, GREEN = "#3f789e", "#b06634", "#888888", "#88aa88"

PROMPT = "a photo of ohwx dog on the beach"

NOTE = """\
# Teach a model something new

Set three things, then press **Run**:

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
   Other models work too; see below.
2. **Photos** - put 8 to 30 into a folder below ComfyUI's input folder
   (beside each name.png a name.txt with its caption, if you like),
   press **R**, and choose the folder.
3. **Trigger and prompt** - the word that calls up what is learnt
   (*ohwx dog*), and a prompt that holds it.

*Before* and *After* draw the same prompt with the same seed, without and
with what was learnt. ComfyUI's queue is busy while it trains.
**Cancel loses nothing**: press Run again and it goes on where it was.

With an SDXL or Flux checkpoint leave the dataset's resolution at 0 and set
the width and height of *Size and number* to 1024.
"""

# The example as `make demo` and the tests run it, {node: {input: value}} by title or type.
TINY = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos": {"folder": "toy", "trigger": "", "resolution": 64},
    "Train": {"steps": 300, "learning_rate": 1e-3, "rank": 8, "batch_size": 4},
    "Prompt": {"value": "a large sks toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample before": {"cfg": 4.0},
    "Sample after": {"cfg": 4.0},
}

DREAMBOOTH_NOTE = """\
# Learn one subject, keep its class

Set three things, then press **Run**:

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Photos** - put 3 to 10 of one dog, cup or person into a folder below
   ComfyUI's input folder, press **R**, and choose the folder.
   They need no captions.
3. **Subject and class** - a rare word and what it is (*a photo of sks dog*),
   and the same without that word (*a photo of a dog*).

*Class images* first draws dogs with the checkpoint as it is. They are kept
in output/graft/class_images: another Run finds them there.

*The class before* and *The class after* draw the class prompt with the same
seed: they should stay alike. *The subject* is what was learnt.
**Cancel loses nothing**: press Run again and it goes on where it was.

With an SDXL or Flux checkpoint leave the resolution of *Photos* and
*Class images* at 0 and set *Size and number* to 1024.
"""

# The same for "DreamBooth a subject".
TINY_DREAMBOOTH = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos": {"folder": "toy", "resolution": 64},
    "Subject": {"value": "a large sks red circle"},
    "Class": {"value": "a large red circle"},
    "Negative prompt": {"value": ""},
    "Class images": {"count": 16, "resolution": 64},
    "Train": {"class_images": 16, "steps": 120, "learning_rate": 1e-3, "rank": 8, "batch_size": 4},
    "Size and number": {"width": 64, "height": 64},
    "Sample the class before": {"cfg": 4.0},
    "Sample the class after": {"cfg": 4.0},
    "Sample the subject": {"cfg": 4.0},
}


class Sketch:
    """A graph in the editor, built node by node."""

    def __init__(self, page):
        self.page = page
        page.load({"version": 0.4, "nodes": [], "links": [], "last_node_id": 0, "last_link_id": 0})

    def node(self, kind, title, place, size, links=None, **widgets):
        """A node with its upper left corner at place; links are {input: (node, output's place)}. Returns its id."""
        made = self.page.add_node(kind, *place)
        for name, value in widgets.items():
            self.page.set_widget(made, name, value)
        for name, (source, slot) in (links or {}).items():
            self.page.connect(source, slot, made, name)
        self.page.js(
            "const node = app.graph.getNodeById(args[0]); node.title = args[1]; node.setSize(args[2]);"
            "if (args[2][1] < node.computeSize()[1]) throw new Error(`${args[1]} needs ${node.computeSize()}`);",
            made, title, list(size),
        )  # fmt: skip
        return made

    def group(self, title, nodes, color):
        """A frame around nodes."""
        self.page.js("""
            const group = new LiteGraph.LGraphGroup(args[0]);
            app.graph.add(group);
            group.resizeTo(args[1].map(id => app.graph.getNodeById(id)), 12);
            group.color = args[2];""", title, nodes, color)  # fmt: skip

    def save(self, name):
        """The graph as saving it gives it, without what differs from one saving to the next."""
        workflow = self.page.serialize()
        workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"graft/{name}"))
        workflow["revision"] = 0
        workflow["extra"] = {"ds": {"scale": 0.6, "offset": [60, 120]}}
        return workflow


def draw_train_a_lora(sketch):
    """Checkpoint and photos -> train -> the same prompt before and after."""
    node = sketch.node
    data, train, wish, sample, show = 0, 480, 960, 1440, 1900

    node("MarkdownNote", "Start here", (data, 0), (420, 430), text=NOTE)
    checkpoint = node("CheckpointLoaderSimple", "Checkpoint", (data, 700), (420, 100),
                      ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")  # fmt: skip
    photos = node("GraftLoadDataset", "Photos", (data, 860), (420, 140),
                  folder="my_photos", trigger="ohwx dog", resolution=512)  # fmt: skip
    base = {"model": (checkpoint, 0), "clip": (checkpoint, 1), "vae": (checkpoint, 2)}

    trainer = node("GraftTrainLoRA", "Train", (train, 700), (420, 240), {**base, "dataset": (photos, 0)})
    saved = node("GraftSaveAdapter", "Save the LoRA", (train, 1000), (420, 100), {"adapter": (trainer, 2)},
                 filename_prefix="my_lora")  # fmt: skip
    inspect = node("GraftInspectDataset", "What training will see", (train, 0), (420, 330),
                   {"dataset": (photos, 0), **base})  # fmt: skip
    report = node("PreviewAny", "Report", (train, 390), (420, 180), {"source": (inspect, 1)})

    prompt = node("PrimitiveStringMultiline", "Prompt", (wish, 0), (420, 110), value=PROMPT)
    negative = node("PrimitiveStringMultiline", "Negative prompt", (wish, 170), (420, 110), value="blurry, low quality")
    size = node("EmptyLatentImage", "Size and number", (wish, 340), (420, 110), width=512, height=512, batch_size=2)

    framed = {}
    for name, top, model, clip in (("before", 0, checkpoint, checkpoint), ("after", 700, trainer, trainer)):
        positive = node("CLIPTextEncode", f"Prompt {name}", (sample, top), (400, 90),
                        {"clip": (clip, 1), "text": (prompt, 0)})  # fmt: skip
        other = node("CLIPTextEncode", f"Negative prompt {name}", (sample, top + 150), (400, 90),
                     {"clip": (clip, 1), "text": (negative, 0)})  # fmt: skip
        drawn = node(
            "KSampler",
            f"Sample {name}",
            (sample, top + 300),
            (400, 270),
            {"model": (model, 0), "positive": (positive, 0), "negative": (other, 0), "latent_image": (size, 0)},
            seed=1,
            control_after_generate="fixed",
            steps=25,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
        )
        decoded = node("VAEDecode", f"Decode {name}", (show, top), (500, 50),
                       {"samples": (drawn, 0), "vae": (checkpoint, 2)})  # fmt: skip
        shown = node("SaveImage", name.capitalize(), (show, top + 110), (500, 460), {"images": (decoded, 0)},
                     filename_prefix=f"graft_{name}")  # fmt: skip
        framed[name] = [positive, other, drawn, decoded, shown]

    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, photos], BLUE)
    sketch.group("Set 3: what to draw", [prompt, negative, size], BLUE)
    sketch.group("Train", [trainer, saved], ORANGE)
    sketch.group("Look at the photos", [inspect, report], GREY)
    sketch.group("Before: the checkpoint as it is", framed["before"], GREY)
    sketch.group("After: with the LoRA", framed["after"], GREEN)


def draw_dreambooth(sketch):
    """Photos and class images -> train -> the class before and after, and the subject."""
    node = sketch.node
    data, train, sample, show = 0, 480, 960, 1420

    node("MarkdownNote", "Start here", (data, 0), (420, 480), text=DREAMBOOTH_NOTE)
    checkpoint = node("CheckpointLoaderSimple", "Checkpoint", (data, 700), (420, 100),
                      ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")  # fmt: skip
    photos = node("GraftLoadDataset", "Photos", (data, 860), (420, 490), folder="my_photos", resolution=512)
    subject = node("PrimitiveStringMultiline", "Subject", (data, 1480), (420, 110), value="a photo of sks dog")
    kind = node("PrimitiveStringMultiline", "Class", (data, 1650), (420, 110), value="a photo of a dog")
    negative = node(
        "PrimitiveStringMultiline", "Negative prompt", (data, 1820), (420, 110), value="blurry, low quality"
    )
    size = node("EmptyLatentImage", "Size and number", (data, 1990), (420, 110), width=512, height=512, batch_size=2)
    base = {"model": (checkpoint, 0), "clip": (checkpoint, 1), "vae": (checkpoint, 2)}

    classes = node("GraftClassImages", "Class images", (train, 0), (420, 900), {**base, "class_prompt": (kind, 0)},
                   resolution=512)  # fmt: skip
    trainer = node("GraftTrainDreamBooth", "Train", (train, 1010), (420, 430),
                   {**base, "dataset": (photos, 0), "class_dataset": (classes, 0), "instance_prompt": (subject, 0),
                    "class_prompt": (kind, 0)})  # fmt: skip
    saved = node("GraftSaveAdapter", "Save the LoRA", (train, 1500), (420, 100), {"adapter": (trainer, 2)},
                 filename_prefix="my_subject")  # fmt: skip

    framed = {}
    rows = (
        ("the class before", checkpoint, kind, 0),
        ("the class after", trainer, kind, 700),
        ("the subject", trainer, subject, 1400),
    )
    for name, source, prompt, top in rows:
        positive = node("CLIPTextEncode", f"Prompt of {name}", (sample, top), (400, 90),
                        {"clip": (source, 1), "text": (prompt, 0)})  # fmt: skip
        other = node("CLIPTextEncode", f"Negative prompt of {name}", (sample, top + 150), (400, 90),
                     {"clip": (source, 1), "text": (negative, 0)})  # fmt: skip
        drawn = node(
            "KSampler",
            f"Sample {name}",
            (sample, top + 300),
            (400, 270),
            {"model": (source, 0), "positive": (positive, 0), "negative": (other, 0), "latent_image": (size, 0)},
            seed=1,
            control_after_generate="fixed",
            steps=25,
            cfg=7.0,
            sampler_name="euler",
            scheduler="normal",
        )
        decoded = node("VAEDecode", f"Decode {name}", (show, top), (500, 50),
                       {"samples": (drawn, 0), "vae": (checkpoint, 2)})  # fmt: skip
        shown = node("SaveImage", name.capitalize(), (show, top + 110), (500, 460), {"images": (decoded, 0)},
                     filename_prefix=f"graft_{name.replace(' ', '_')}")  # fmt: skip
        framed[name] = [positive, other, drawn, decoded, shown]

    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, photos], BLUE)
    sketch.group("Set 3: subject and class", [subject, kind, negative, size], BLUE)
    sketch.group("What the model knows of the class", [classes], GREY)
    sketch.group("Train", [trainer, saved], ORANGE)
    sketch.group("The class before: the checkpoint as it is", framed["the class before"], GREY)
    sketch.group("The class after: it should stay", framed["the class after"], GREEN)
    sketch.group("The subject: what was learnt", framed["the subject"], GREEN)


WORKFLOWS = {"Train a LoRA": draw_train_a_lora, "DreamBooth a subject": draw_dreambooth}


def write_workflow(path, workflow):
    path.write_text(json.dumps(workflow, indent=1) + "\n", encoding="utf-8")
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--only", choices=list(WORKFLOWS), help="draw this one alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graft-workflows-") as scratch:
        server = None if args.url else ComfyServer(Path(scratch) / "server").start()
        try:
            with Browser(Path(scratch) / "chromium") as browser:
                page = browser.open(args.url or server.url)
                for name, draw in WORKFLOWS.items():
                    if args.only not in (None, name):
                        continue
                    sketch = Sketch(page)
                    draw(sketch)
                    write_workflow(FOLDER / f"{name}.json", sketch.save(name))
        finally:
            if server:
                server.stop()


if __name__ == "__main__":
    sys.exit(main())
