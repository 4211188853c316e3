"""Make the example workflows with the real frontend, so that committed files equal a save in the editor.

    python -m docs.build.make_workflows

The values fit a real user with an SD1.5 checkpoint; `TINY` holds those for the tiny base.
"""

import argparse
import json
import sys
import tempfile
import uuid
from pathlib import Path

from tests.support.browser import EMPTY, Browser
from tests.support.host import ROOT
from tests.support.server import ComfyServer

FOLDER = ROOT / "example_workflows"

BLUE, ORANGE, GRAY, GREEN = "#3f789e", "#b06634", "#888888", "#88aa88"

PROMPT = "a photo of ohwx dog on the beach"

NOTE = """\
# Teach a model something new

Set three things, then press **Run**:

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
   Other models work too; see below.
2. **Photos** - put 8 to 30 into a folder below ComfyUI's input folder
   (beside each name.png a name.txt with its caption, if you like),
   press **R**, and choose the folder.
3. **Trigger and prompt** - in *Photos* the word that calls up the learned
   subject (*ohwx dog*); in *Prompt* and *Previews* a prompt that contains it.

*What training will see* comes first: **Cancel** if pictures or captions
are not right. *Before* and *After* draw the same prompt with the same seed, without and
with the LoRA. ComfyUI's queue is busy while it trains.
**Cancel loses nothing**: press Run again, and the run continues.

With an SDXL or Flux checkpoint set the resolution of *Photos* to 0 (the
model's own) and the width and height of *Size and number* to 1024.
"""

# Values of the example in `make demo` and the tests, {node: {input: value}} by title or type.
TINY = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos": {"folder": "toy", "trigger": "", "resolution": 64},
    "Previews": {"prompts": "a large sks toy on a green background", "steps": 4, "cfg": 4.0},
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

*Class images* first draws dogs with the unchanged checkpoint and keeps them
in output/graft/class_images. Another Run uses them again.

*The class before* and *The class after* draw the class prompt with the same
seed: they should look alike. *The subject* shows the learned subject.
**Cancel loses nothing**: press Run again, and the run continues.

With an SDXL or Flux checkpoint set the resolution of *Photos* and
*Class images* to 0 (the model's own) and *Size and number* to 1024.
"""

# Values of "DreamBooth a subject".
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


SLIDER_NOTE = """\
# A slider, without pictures

Set two things, then press **Run**:

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **The property** - in *Train*: the same sentence three times, with
   nothing (*target*), much (*positive*) and little (*negative*) of it.
   Each line is one more kind of picture. *anchors* must not change.

*The row* draws its prompts at strengths -2 to 2; 0 is the checkpoint as
it is. **Cancel loses nothing**: press Run again, and the run continues.

With an SDXL or Flux checkpoint set *resolution* in *Train* and *The row*
to 0 (the model's own).
"""

# Values of "Concept slider".
TINY_SLIDER = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Train": {
        "target": "a large purple circle on a gray background\na large purple square on a gray background",
        "positive": "a large red circle on a gray background\na large red square on a gray background",
        "negative": "a large blue circle on a gray background\na large blue square on a gray background",
        "anchors": "a large green heart on a white background\na large yellow ring on a pink background",
        "steps": 120,
        "learning_rate": 2e-3,
        "rank": 8,
        "resolution": 64,
    },
    "The row": {
        "prompts": "a large purple circle on a gray background\na large purple square on a gray background",
        "cfg": 4.0,
        "resolution": 64,
    },
}


EMBEDDING_NOTE = """\
# Teach the model a new word

The model itself does not change. Training learns a few numbers, an
embedding, which prompts call up as **embedding:my-dog**.

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Photos** - 4 to 20 of one thing, in a folder below ComfyUI's input
   folder; press **R** and choose it. They need no captions.
3. **The word** - in *Train*: its name, what it shows (*dog*), and
   *templates* (*style* for a style). In *Prompt* write it with
   a **space before and after** it.

*Before* draws the prompt without the word, *After* the prompt with it,
from the same seed. The embedding is saved to output/embeddings, where
every prompt finds it. **Cancel loses nothing**: press Run again.

An embedding calls up what the model can draw already. For something that
it has never seen, train a LoRA, or both: see *Pivotal tuning*.
"""

PIVOTAL_NOTE = """\
# An embedding and a LoRA, trained together

The embedding (*embedding:my-dog*) learns what the thing is, the LoRA
learns what the model could not draw. After half of the steps the
embedding is frozen.

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Photos** - 8 to 30 of one thing, in a folder below ComfyUI's input
   folder; press **R** and choose it. The *trigger* stands for the
   embedding in captions.
3. **The word** - the embedding's name, what it shows, and a prompt that
   contains it with a **space before and after**.

The result is two files, one in output/loras and one in
output/embeddings. They work apart and together.
**Cancel loses nothing**: press Run again, and the run continues.
"""

# Values of the two embedding examples.
TINY_EMBEDDING = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos": {"folder": "toy", "trigger": "sks toy", "resolution": 64},
    "Train": {"name": "my-toy", "init_text": "toy", "steps": 50, "learning_rate": 2e-2, "batch_size": 4},
    "Prompt": {"value": "a large embedding:my-toy on a green background"},
    "Prompt without the word": {"value": "a large toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample before": {"cfg": 4.0},
    "Sample after": {"cfg": 4.0},
}
TINY_PIVOTAL = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos": {"folder": "toy", "trigger": "sks toy", "resolution": 64},
    "The word": {"name": "my-toy", "init_text": "toy", "vectors": 1, "learning_rate": 1e-2},
    "Train": {"steps": 100, "learning_rate": 1e-3, "rank": 8, "batch_size": 4},
    "Prompt": {"value": "a large embedding:my-toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample the word alone": {"cfg": 4.0},
    "Sample word and LoRA": {"cfg": 4.0},
}


FINE_TUNE_NOTE = """\
# Fine-tune a checkpoint

This trains every weight of the model. The result is a **checkpoint of
its own**.

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Pictures** - 40 and more in one style, each name.png with its
   caption in name.txt, in a folder below ComfyUI's input folder; press
   **R** and choose it.
3. **Trigger and prompt** - in *Pictures* words for the style (*ohwx
   style*); in *Prompt* and *Previews* a prompt that contains them.

*The new checkpoint* is ComfyUI's own node: it writes model, text
encoder and VAE to output/checkpoints, where every checkpoint loader
finds them. *Save what changed* writes only the difference, which LoRA
loaders apply at any strength. Bypass the node that you do not need.

It takes much more memory and disk than a LoRA: see the help page of
*Train*. The checkpoint in the graph stays unchanged.
**Cancel loses nothing**: press Run again, and the run continues.
"""

# Values of "Fine-tune a checkpoint".
TINY_FINE_TUNE = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Pictures": {"folder": "toy", "trigger": "", "resolution": 64},
    "Previews": {"prompts": "a large sks toy on a green background", "steps": 4, "cfg": 4.0},
    "Train": {"steps": 40, "learning_rate": 1e-4, "batch_size": 4},
    "Prompt": {"value": "a large sks toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample before": {"cfg": 4.0},
    "Sample after": {"cfg": 4.0},
}


MERGE_NOTE = """\
# Two LoRAs as one, and smaller

1. **Checkpoint** - one that both LoRAs were made for.
2. **LoRAs** - choose two files in *First LoRA* and *Second LoRA*.
3. **Prompt** - with the words that call up both.

*Merge* combines them into one LoRA, here by their plain sum. If the two
disturb each other, try the method **TIES**, or lower a weight.
*Resize* removes the parts with little effect: less *energy*, a smaller
file.
*What it is* shows where in the model the result is strong, and
whether it fits the checkpoint.

*Both* draws with the two LoRAs, *Merged* with the merged file that
*Save the LoRA* writes to output/loras. With the plain sum and *energy* 1
the two pictures are the same.

With an SDXL or Flux checkpoint set the width and height of *Size and
number* to 1024.
"""

# Values of "Merge and resize adapters"; the files are the test's own.
TINY_MERGE = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Prompt": {"value": "a large sks toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample both": {"cfg": 4.0},
    "Sample merged": {"cfg": 4.0},
}


EDIT_NOTE = """\
# Teach a model an edit

Set three things, then press **Run**:

1. **Model** - Qwen-Image-Edit with its text encoder and VAE.
   For Flux Kontext, set *prompt_node* of *How prompts are encoded*
   to *auto*.
2. **Pairs** - a folder below ComfyUI's input folder with 15 to 50
   results. Beside each name.png a name.txt with the instruction; in
   its folder *control* the picture before, under the same name.
   For a second and third source picture there are
   *control_folder_2* and *control_folder_3*.
3. **A new picture** - one that is not among the pairs, and the
   instruction.

*How prompts are encoded* names the node that encodes your prompts.
Training encodes captions and pictures exactly as that node does.
*Before* and *After* edit the new picture with the same seed.
**Cancel loses nothing**: press Run again, and the run continues.
"""

WAN_NOTE = """\
# Train both experts of Wan 2.2

Wan 2.2 14B is two models. One draws the noisy steps, the other
the rest. Each gets a LoRA of its own.

1. **High noise**, **Low noise**, **Text encoder**, **VAE** - Wan 2.2's
   files for text to video.
2. **Dataset** - a folder below ComfyUI's input folder, with captions.
3. **Prompt** - what to draw.

*From 875* and *To 875* split the timesteps where Wan's makers did.
Image to video splits at 900. Train one after the other, on a card
that holds one model: the other waits in the computer's memory.
**Cancel loses nothing**: press Run again, and the runs continue.
"""

PREFERENCE_NOTE = """\
# Teach a model your taste

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Pairs** - two pictures for a caption, 100 pairs and more, such as
   pictures that the checkpoint drew. The better one, name.png, with
   its caption in name.txt in a folder below ComfyUI's input folder;
   the worse one in its folder *worse*, under the same name.
   Press **R** and choose the folder.
3. **Prompt** - like your captions.

*Accuracy* in the panel of *Train* begins at 50 % and rises.
If both pictures become worse, raise *beta* or take fewer steps.
**Cancel loses nothing**: press Run again, and the run continues.
"""

# Values of "Preference from pairs".
TINY_PREFERENCE = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Pairs": {"folder": "pairs", "resolution": 64},
    "Previews": {"prompts": "a large red object on a white background", "steps": 4, "cfg": 4.0},
    "Train": {"beta": 5000.0, "steps": 40, "learning_rate": 2e-4, "rank": 8, "batch_size": 4},
    "Prompt": {"value": "a large red object on a white background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample before": {"cfg": 4.0},
    "Sample after": {"cfg": 4.0},
}

CURRICULUM_NOTE = """\
# Small pictures first, then large ones

Three trainers on a wire. Each goes on from the one before, and the
result is one LoRA.

1. **Checkpoint** - the SD1.5 file in your models/checkpoints.
2. **Photos** - put 8 to 30 into a folder below ComfyUI's input folder,
   press **R**, and choose it in **both** nodes. Set the same trigger.
3. **Prompt** - with the trigger.

*256 pixels* learns the subject in quick steps, *512 pixels* its details,
*Lower rate* smooths the result. Another dataset or other options fit
into each box. Its *rank* is 0: that of the LoRA before it.

Every trainer gets the **checkpoint's** model, not the model of the one
before. Each is a run of its own: **Cancel loses nothing**, and Run
trains again only what changed, and what comes after it.
"""

# Values of "Curriculum".
TINY_CURRICULUM = {
    "Checkpoint": {"ckpt_name": "graft_tiny.safetensors"},
    "Photos at 256": {"folder": "toy", "trigger": "", "resolution": 48},
    "Photos at 512": {"folder": "toy", "trigger": "", "resolution": 64},
    "256 pixels": {"steps": 100, "learning_rate": 1e-3, "rank": 8, "batch_size": 4},
    "512 pixels": {"steps": 100, "learning_rate": 1e-3, "batch_size": 4},
    "Lower rate": {"steps": 50, "learning_rate": 2e-4, "batch_size": 4},
    "Prompt": {"value": "a large sks toy on a green background"},
    "Negative prompt": {"value": ""},
    "Size and number": {"width": 64, "height": 64},
    "Sample after the first": {"cfg": 4.0},
    "Sample after the last": {"cfg": 4.0},
}


class Sketch:
    """A graph in the editor, built node by node."""

    def __init__(self, page):
        self.page = page
        page.load(EMPTY)

    def node(self, kind, title, place, size, links=None, **widgets):
        """Add a node with its upper left corner at place; links are {input: (node, output index)}. Return its id."""
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

    def route(self, target, name, points):
        """Lead the wire of an input through points, starting at its source."""
        self.page.js("""
            const node = app.graph.getNodeById(args[0]);
            const link = app.graph.getLink(node.inputs.find(input => input.name === args[1]).link);
            for (const point of args[2]) app.graph.createReroute(point, link);""", target, name, points)  # fmt: skip

    def group(self, title, nodes, color):
        """Draw a frame around nodes."""
        self.page.js("""
            const group = new LiteGraph.LGraphGroup(args[0]);
            app.graph.add(group);
            group.resizeTo(args[1].map(id => app.graph.getNodeById(id)), 12);
            group.color = args[2];""", title, nodes, color)  # fmt: skip

    def save(self, name):
        """Return the saved graph without values that change from one save to the next."""
        workflow = self.page.serialize()
        workflow["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"graft/{name}"))
        workflow["revision"] = 0
        routes = {key: workflow["extra"][key] for key in ("reroutes", "linkExtensions") if key in workflow["extra"]}
        # The page's sidebar and its tab bar cover the graph's left and upper edge.
        workflow["extra"] = {"ds": {"scale": 0.6, "offset": [200, 240]}, **routes}
        return omit_open_slots(omit_restored(workflow))


def omit_open_slots(workflow):
    """Omit the inputs without a link, and the last outputs without one; return the workflow.

    The frontend makes a node with its slots from the schema, takes a saved input by its name and a saved output by its
    place, and numbers the links' inputs anew.
    """
    links = {link[0]: link for link in workflow["links"]}
    for node in workflow["nodes"]:
        node["inputs"] = [slot for slot in node["inputs"] if slot["link"] is not None]
        while node["outputs"] and not node["outputs"][-1]["links"]:
            node["outputs"].pop()
        for slot in (*node["inputs"], *node["outputs"]):
            slot.pop("shape", None)
        for place, slot in enumerate(node["inputs"]):
            links[slot["link"]][4] = place
        for kind in ("inputs", "outputs"):
            if not node[kind]:
                del node[kind]
    return workflow


def omit_restored(graph):
    """Omit what the frontend sets itself when it opens a graph; return the graph.

    It takes a node's "Node name for S&R" from the type when it makes the node, and a slot's localized_name from the
    schema when it configures it. Without one it shows the slot's name.
    """
    for inner in graph.get("definitions", {}).get("subgraphs", []):
        omit_restored(inner)
    for part in [graph, *graph["nodes"]]:
        for slot in [*part.get("inputs", []), *part.get("outputs", [])]:
            if slot.get("localized_name") == slot["name"]:
                del slot["localized_name"]
        if part.get("properties", {}).get("Node name for S&R") == part.get("type", ""):
            del part["properties"]["Node name for S&R"]
    return graph


def draw_base(sketch, place, note, height, top=700):
    """Draw an example's note and, lower down, its checkpoint; return (checkpoint, a trainer's links to it)."""
    sketch.node("MarkdownNote", "Start here", place, (420, height), text=note)
    checkpoint = sketch.node("CheckpointLoaderSimple", "Checkpoint", (place[0], top), (420, 100),
                             ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")  # fmt: skip
    return checkpoint, {"model": (checkpoint, 0), "clip": (checkpoint, 1), "vae": (checkpoint, 2)}


def draw_pictures(sketch, place, name, model, clip, prompt, negative, size, vae, of=""):
    """Draw the nodes that sample a prompt and save the pictures, in a row of two columns; return their ids.

    Args:
        model, clip, vae, prompt, negative, size: (node, output index).
        of: prefix of the name in titles of prompts.
    """
    node = sketch.node
    left, top = place
    right = left + 460
    positive = node("CLIPTextEncode", f"Prompt {of}{name}", (left, top), (400, 90), {"clip": clip, "text": prompt})
    other = node("CLIPTextEncode", f"Negative prompt {of}{name}", (left, top + 150), (400, 90),
                 {"clip": clip, "text": negative})  # fmt: skip
    drawn = node(
        "KSampler",
        f"Sample {name}",
        (left, top + 300),
        (400, 270),
        {"model": model, "positive": (positive, 0), "negative": (other, 0), "latent_image": size},
        seed=1,
        control_after_generate="fixed",
        steps=25,
        cfg=7.0,
        sampler_name="euler",
        scheduler="normal",
    )
    decoded = node("VAEDecode", f"Decode {name}", (right, top), (500, 50), {"samples": (drawn, 0), "vae": vae})
    shown = node("SaveImage", name[:1].upper() + name[1:], (right, top + 110), (500, 460), {"images": (decoded, 0)},
                 filename_prefix=f"graft_{name.replace(' ', '_')}")  # fmt: skip
    return [positive, other, drawn, decoded, shown]


# Columns of an example that inspects its pictures before training, and the top of its second row. Wires that skip a
# column run through a lane above that row.
DATA, LOOK, TRAIN, WISH, SAMPLE = 0, 480, 960, 1440, 2000
ROW = 780
LANE = (620, 645, 670)


def draw_training(sketch, base, pictures, trainer, saved, options=None):
    """Draw the inspection and the training of an example; return the ids of inspection, options and trainer.

    Args:
        base: the checkpoint as (checkpoint, a trainer's links to it).
        pictures: id of the dataset's node.
        trainer: (type of the node, values of its widgets).
        saved: function that draws the saving nodes, called with the trainer's id and the place below it; returns ids.
        options: values of the previews, None for none.
    """
    node = sketch.node
    _, given = base
    inspect = node("GraftInspectDataset", "What training will see", (LOOK, ROW), (420, 640),
                   {"dataset": (pictures, 0), **given})  # fmt: skip
    previews = node("GraftPreviewOptions", "Previews", (LOOK, ROW + 740), (420, 330), **options)
    kind, values = trainer
    links = {**given, "dataset": (inspect, 2), "options": (previews, 0)}
    trained = node(kind, "Train", (TRAIN, ROW), (420, 680), links, **values)
    for name, height in zip(given, LANE, strict=True):
        sketch.route(trained, name, [(LOOK - 30, height), (TRAIN - 40, height)])
    sketch.group("Look at the pictures first", [inspect], GRAY)
    sketch.group("Previews while it trains", [previews], GRAY)
    sketch.group("Train", [trained, *saved(trained, (TRAIN, ROW + 740))], ORANGE)
    return trained


def draw_both(sketch, checkpoint, trained, wishes):
    """Draw the same prompt before and after a training; return the ids of both rows."""
    prompt, negative, size = wishes
    rows = []
    for name, top, source in (("before", 0, checkpoint), ("after", ROW, trained)):
        texts = (prompt, 0), (negative, 0)
        row = draw_pictures(sketch, (SAMPLE, top), name, (source, 0), (source, 1), *texts, (size, 0), (checkpoint, 2))
        positive, other, drawn, decoded, _ = row
        ends = [(decoded, "vae", 2)]
        if source == checkpoint:
            ends += [(positive, "clip", 1), (other, "clip", 1), (drawn, "model", 0)]
        for end, name, lane in ends:
            sketch.route(end, name, [(LOOK - 30, LANE[lane]), (SAMPLE - 70, LANE[lane])])
        rows.append(row)
    return rows


def draw_train_a_lora(sketch):
    """Draw checkpoint and photos -> inspection -> training -> the same prompt before and after."""
    node = sketch.node
    base = draw_base(sketch, (DATA, 0), NOTE, 470, ROW - 200)
    photos = node("GraftLoadDataset", "Photos", (DATA, ROW), (420, 710),
                  folder="my_photos", trigger="ohwx dog", resolution=512)  # fmt: skip

    def save(trainer, place):
        return [node("GraftSaveAdapter", "Save the LoRA", place, (420, 122), {"adapter": (trainer, 2)},
                     filename_prefix="my_lora")]  # fmt: skip

    trainer = draw_training(sketch, base, photos, ("GraftTrainLoRA", {}), save, {"prompts": PROMPT})
    wishes = draw_wishes(sketch, (WISH, 0), PROMPT)
    before, after = draw_both(sketch, base[0], trainer, wishes)

    sketch.group("Set 1 and 2: checkpoint and photos", [base[0], photos], BLUE)
    sketch.group("Set 3: what to draw", wishes, BLUE)
    sketch.group("Before: the checkpoint as it is", before, GRAY)
    sketch.group("After: with the LoRA", after, GREEN)


def draw_wishes(sketch, place, prompt):
    """Draw prompt, negative prompt and size of the pictures; return their ids."""
    node = sketch.node
    left, top = place
    return (
        node("PrimitiveStringMultiline", "Prompt", (left, top), (420, 110), value=prompt),
        node("PrimitiveStringMultiline", "Negative prompt", (left, top + 170), (420, 110), value="blurry, low quality"),
        node("EmptyLatentImage", "Size and number", (left, top + 340), (420, 110), width=512, height=512, batch_size=2),
    )


def draw_dreambooth(sketch):
    """Draw photos and class images -> training -> the class before and after, and the subject."""
    node = sketch.node
    data, train, sample = 0, 480, 960

    checkpoint, base = draw_base(sketch, (data, 0), DREAMBOOTH_NOTE, 480)
    photos = node("GraftLoadDataset", "Photos", (data, 860), (420, 710), folder="my_photos", resolution=512)
    subject = node("PrimitiveStringMultiline", "Subject", (data, 1700), (420, 110), value="a photo of sks dog")
    kind = node("PrimitiveStringMultiline", "Class", (data, 1870), (420, 110), value="a photo of a dog")
    negative = node(
        "PrimitiveStringMultiline", "Negative prompt", (data, 2040), (420, 110), value="blurry, low quality"
    )
    size = node("EmptyLatentImage", "Size and number", (data, 2210), (420, 110), width=512, height=512, batch_size=2)

    classes = node("GraftClassImages", "Class images", (train, 0), (420, 900), {**base, "class_prompt": (kind, 0)},
                   resolution=512)  # fmt: skip
    trainer = node("GraftTrainDreamBooth", "Train", (train, 1010), (420, 820),
                   {**base, "dataset": (photos, 0), "class_dataset": (classes, 0), "instance_prompt": (subject, 0),
                    "class_prompt": (kind, 0)})  # fmt: skip
    saved = node("GraftSaveAdapter", "Save the LoRA", (train, 1890), (420, 122), {"adapter": (trainer, 2)},
                 filename_prefix="my_subject")  # fmt: skip

    rows = (
        ("the class before", checkpoint, kind, 0),
        ("the class after", trainer, kind, 700),
        ("the subject", trainer, subject, 1400),
    )
    before, after, learnt = (
        draw_pictures(sketch, (sample, top), name, (source, 0), (source, 1), (prompt, 0), (negative, 0), (size, 0),
                      (checkpoint, 2), "of ")
        for name, source, prompt, top in rows
    )  # fmt: skip

    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, photos], BLUE)
    sketch.group("Set 3: subject and class", [subject, kind, negative, size], BLUE)
    sketch.group("What the model knows of the class", [classes], GRAY)
    sketch.group("Train", [trainer, saved], ORANGE)
    sketch.group("The class before: the checkpoint as it is", before, GRAY)
    sketch.group("The class after: it should stay", after, GREEN)
    sketch.group("The subject: what was learnt", learnt, GREEN)


def draw_embedding(sketch):
    """Draw photos -> embedding -> the prompt with the initial word and with the new embedding."""
    node = sketch.node
    data, train, wish, sample = 0, 480, 960, 1440

    checkpoint, base = draw_base(sketch, (data, 0), EMBEDDING_NOTE, 520)
    photos = node("GraftLoadDataset", "Photos", (data, 860), (420, 710), folder="my_photos", resolution=512)
    trainer = node("GraftTrainEmbedding", "Train", (train, 700), (420, 720), {**base, "dataset": (photos, 0)},
                   name="my-dog", init_text="dog", vectors=2, steps=2000, batch_size=4)  # fmt: skip
    saved = node("GraftSaveEmbedding", "Save the word", (train, 1480), (420, 80), {"embedding": (trainer, 1)})

    prompt, negative, size = draw_wishes(sketch, (wish, 0), "a photo of embedding:my-dog on the beach")
    plain = node("PrimitiveStringMultiline", "Prompt without the word", (wish, 510), (420, 110),
                 value="a photo of a dog on the beach")  # fmt: skip
    rows = (("before", 0, checkpoint, plain), ("after", 700, trainer, prompt))
    before, after = (
        draw_pictures(sketch, (sample, top), name, (checkpoint, 0), (source, 1 if source == checkpoint else 0),
                      (text, 0), (negative, 0), (size, 0), (checkpoint, 2))
        for name, top, source, text in rows
    )  # fmt: skip

    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, photos], BLUE)
    sketch.group("Set 3: the word, and what to draw", [prompt, negative, size, plain], BLUE)
    sketch.group("Train", [trainer, saved], ORANGE)
    sketch.group("Before: by the words the model knows", before, GRAY)
    sketch.group("After: by the new word", after, GREEN)


def draw_pivotal(sketch):
    """Draw photos -> an embedding and a LoRA together -> the effect of each alone and of both."""
    node = sketch.node
    data, train, wish, sample = 0, 480, 960, 1440

    checkpoint, base = draw_base(sketch, (data, 0), PIVOTAL_NOTE, 520)
    photos = node("GraftLoadDataset", "Photos", (data, 860), (420, 710),
                  folder="my_photos", trigger="my-dog", resolution=512)  # fmt: skip
    word = node("GraftPivotalOptions", "The word", (train, 380), (420, 160), name="my-dog", init_text="dog")
    trainer = node("GraftTrainLoRA", "Train", (train, 700), (420, 630),
                   {**base, "dataset": (photos, 0), "options": (word, 0)})  # fmt: skip
    lora = node("GraftSaveAdapter", "Save the LoRA", (train, 1390), (420, 122), {"adapter": (trainer, 2)},
                filename_prefix="my_dog")  # fmt: skip
    saved = node("GraftSaveEmbedding", "Save the word", (train, 1550), (420, 80), {"embedding": (trainer, 4)})

    prompt, negative, size = draw_wishes(sketch, (wish, 0), "a photo of embedding:my-dog on the beach")
    rows = (("the word alone", 0, checkpoint), ("word and LoRA", 700, trainer))
    alone, together = (
        draw_pictures(sketch, (sample, top), name, (source, 0), (trainer, 1), (prompt, 0), (negative, 0), (size, 0),
                      (checkpoint, 2), "of ")
        for name, top, source in rows
    )  # fmt: skip

    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, photos], BLUE)
    sketch.group("Set 3: the word", [word], BLUE)
    sketch.group("Set 3 too: what to draw", [prompt, negative, size], BLUE)
    sketch.group("Train", [trainer, lora, saved], ORANGE)
    sketch.group("The word alone, on the checkpoint as it is", alone, GRAY)
    sketch.group("Word and LoRA together", together, GREEN)


def draw_fine_tune(sketch):
    """Draw pictures -> inspection -> training -> a new checkpoint, and the same prompt before and after."""
    node = sketch.node
    prompt = "a house by the sea, ohwx style"
    base = draw_base(sketch, (DATA, 0), FINE_TUNE_NOTE, 560, ROW - 160)
    pictures = node("GraftLoadDataset", "Pictures", (DATA, ROW), (420, 710),
                    folder="my_pictures", trigger="ohwx style", resolution=512)  # fmt: skip

    def save(trainer, place):
        left, top = place
        merged = node("CheckpointSave", "The new checkpoint", place, (420, 110),
                      {"model": (trainer, 0), "clip": (trainer, 1), "vae": (base[0], 2)},
                      filename_prefix="checkpoints/my_model")  # fmt: skip
        sketch.route(merged, "vae", [(LOOK - 30, LANE[2]), (TRAIN - 40, LANE[2])])
        return [merged, node("GraftSaveAdapter", "Save what changed", (left, top + 170), (420, 122),
                             {"adapter": (trainer, 2)}, filename_prefix="my_model")]  # fmt: skip

    values = {"steps": 2000, "batch_size": 2}
    trainer = draw_training(sketch, base, pictures, ("GraftFineTune", values), save, {"prompts": prompt})
    wishes = draw_wishes(sketch, (WISH, 0), prompt)
    before, after = draw_both(sketch, base[0], trainer, wishes)

    sketch.group("Set 1 and 2: checkpoint and pictures", [base[0], pictures], BLUE)
    sketch.group("Set 3: what to draw", wishes, BLUE)
    sketch.group("Before: the checkpoint as it is", before, GRAY)
    sketch.group("After: as it was fine-tuned", after, GREEN)


def draw_merge(sketch):
    """Draw two LoRAs -> merged -> resized -> the same prompt with the two and with the merged one."""
    node = sketch.node
    data, merge, wish, sample = 0, 480, 960, 1440

    checkpoint, base = draw_base(sketch, (data, 0), MERGE_NOTE, 560)
    loras = [
        node("GraftLoadAdapter", f"{which} LoRA", (data, top), (420, 80), adapter_name=name)
        for which, top, name in (("First", 860, "my_dog.safetensors"), ("Second", 980, "my_style.safetensors"))
    ]
    merged = node("GraftMergeAdapters", "Merge", (merge, 700), (420, 275),
                  {"adapter_a": (loras[0], 0), "adapter_b": (loras[1], 0)}, weight_a=0.8, weight_b=0.8)  # fmt: skip
    resized = node("GraftResizeAdapter", "Resize", (merge, 1010), (420, 130), {"adapter": (merged, 0)},
                   rank=32, energy=0.99)  # fmt: skip
    saved = node("GraftSaveAdapter", "Save the LoRA", (merge, 1200), (420, 122), {"adapter": (resized, 0)},
                 filename_prefix="my_dog_in_my_style")  # fmt: skip
    inspect = node("GraftInspectAdapter", "What it is", (merge, 0), (420, 330),
                   {"adapter": (resized, 0), "model": base["model"], "clip": base["clip"]})  # fmt: skip
    report = node("PreviewAny", "Report", (merge, 390), (420, 180), {"source": (inspect, 1)})

    prompt, negative, size = draw_wishes(sketch, (wish, 0), "a photo of ohwx dog in ohwx style")
    strengths = {"strength_model": 0.8, "strength_clip": 0.8}
    first = draw_apply(sketch, "Put the first on", (wish, 700), (checkpoint, 0), (checkpoint, 1), loras[0], strengths)
    both = draw_apply(sketch, "Put the second on", (wish, 1010), (first, 0), (first, 1), loras[1], strengths)
    one = draw_apply(sketch, "Put the merged one on", (wish, 1320), (checkpoint, 0), (checkpoint, 1), resized, {})
    rows = [
        draw_pictures(sketch, (sample, top), name, (source, 0), (source, 1), (prompt, 0), (negative, 0), (size, 0),
                      (checkpoint, 2))
        for name, top, source in (("both", 0, both), ("merged", 700, one))
    ]  # fmt: skip

    sketch.group("Set 1 and 2: checkpoint and LoRAs", [checkpoint, *loras], BLUE)
    sketch.group("Set 3: what to draw", [prompt, negative, size], BLUE)
    sketch.group("Merge and resize", [merged, resized, saved], ORANGE)
    sketch.group("Look at it", [inspect, report], GRAY)
    sketch.group("Put them on the model", [first, both, one], ORANGE)
    sketch.group("Both, one after the other", rows[0], GRAY)
    sketch.group("The merged one", rows[1], GREEN)


def draw_apply(sketch, title, place, model, clip, adapter, strengths):
    """Draw a node that applies an adapter to model and clip; return its id."""
    given = {"model": model, "clip": clip, "adapter": (adapter, 0)}
    return sketch.node("GraftApplyAdapter", title, place, (420, 240), given, **strengths)


def draw_edit(sketch):
    """Draw loaders and pairs -> inspection -> training -> the same edit of another picture before and after."""
    node = sketch.node
    prompt = "turn this photo into a pencil sketch"
    node("MarkdownNote", "Start here", (DATA, 0), (420, 640), text=EDIT_NOTE)
    loaders = [
        node("UNETLoader", "Model", (DATA, ROW), (420, 90), unet_name="qwen_image_edit_2509_fp8_e4m3fn.safetensors"),
        node("CLIPLoader", "Text encoder", (DATA, ROW + 150), (420, 110),
             clip_name="qwen_2.5_vl_7b_fp8_scaled.safetensors", type="qwen_image"),
        node("VAELoader", "VAE", (DATA, ROW + 320), (420, 60), vae_name="qwen_image_vae.safetensors"),
    ]  # fmt: skip
    base = {name: (loader, 0) for name, loader in zip(("model", "clip", "vae"), loaders, strict=True)}
    pairs = node("GraftLoadDataset", "Pairs", (DATA, ROW + 480), (420, 710), folder="my_pairs",
                 control_folder="control")  # fmt: skip
    inspect = node("GraftInspectDataset", "What training will see", (LOOK, ROW), (420, 640),
                   {"dataset": (pairs, 0), **base})  # fmt: skip
    run = node("GraftRunOptions", "How prompts are encoded", (LOOK, -140), (420, 420),
               prompt_node="TextEncodeQwenImageEditPlus")  # fmt: skip
    previews = node("GraftPreviewOptions", "Previews", (LOOK, 335), (420, 340), {"options": (run, 0)}, prompts=prompt)
    trained = node("GraftTrainLoRA", "Train", (TRAIN, ROW), (420, 640),
                   {**base, "dataset": (inspect, 2), "options": (previews, 0)})  # fmt: skip
    saved = node("GraftSaveAdapter", "Save the LoRA", (TRAIN, ROW + 700), (420, 122), {"adapter": (trained, 2)},
                 filename_prefix="my_edit")  # fmt: skip
    picture = node("LoadImage", "A new picture", (WISH, 0), (420, 330), image="example.png")
    wish = node("PrimitiveStringMultiline", "Instruction", (WISH, 390), (420, 110), value=prompt)
    size = node("VAEEncode", "Its size", (WISH, 560), (420, 60), {"pixels": (picture, 0), "vae": base["vae"]})
    rows = [
        draw_edited(sketch, (SAMPLE, top), name, (source, 0), base, {"image1": (picture, 0)}, (wish, 0), (size, 0))
        for name, top, source in (("before", 0, loaders[0]), ("after", ROW, trained))
    ]
    sketch.group("Set 1: the model", loaders, BLUE)
    sketch.group("Set 2: pairs", [pairs], BLUE)
    sketch.group("Look at the pairs first", [inspect], GRAY)
    sketch.group("Settings", [run, previews], GRAY)
    sketch.group("Train", [trained, saved], ORANGE)
    sketch.group("Set 3: what to edit", [picture, wish, size], BLUE)
    sketch.group("Before: the model as it is", rows[0], GRAY)
    sketch.group("After: with the LoRA", rows[1], GREEN)


def draw_edited(sketch, place, name, model, base, images, instruction, size):
    """Draw the nodes that edit a picture and save the result, in a row of three columns; return their ids."""
    node = sketch.node
    left, top = place
    middle, right = left + 460, left + 920
    given = {"clip": base["clip"], "vae": base["vae"], **images}
    kind = "TextEncodeQwenImageEditPlus"
    positive = node(kind, f"Instruction {name}", (left, top), (400, 240), {**given, "prompt": instruction})
    negative = node(kind, f"Negative prompt {name}", (left, top + 300), (400, 240), given)
    drawn = node(
        "KSampler",
        f"Sample {name}",
        (middle, top),
        (400, 270),
        {"model": model, "positive": (positive, 0), "negative": (negative, 0), "latent_image": size},
        seed=1,
        control_after_generate="fixed",
        steps=20,
        cfg=2.5,
        sampler_name="euler",
        scheduler="simple",
    )
    decoded = node("VAEDecode", f"Decode {name}", (middle, top + 330), (400, 50),
                   {"samples": (drawn, 0), "vae": base["vae"]})  # fmt: skip
    shown = node("SaveImage", name[:1].upper() + name[1:], (right, top), (500, 540), {"images": (decoded, 0)},
                 filename_prefix=f"graft_{name}")  # fmt: skip
    return [positive, negative, drawn, decoded, shown]


def draw_curriculum(sketch):
    """Draw photos at two sizes -> three trainers on a wire -> the prompt after the first and the last."""
    node = sketch.node
    checkpoint, base = draw_base(sketch, (DATA, 0), CURRICULUM_NOTE, 470, ROW - 200)
    tops = {256: ROW, 512: ROW + 790}
    photos = {
        side: node("GraftLoadDataset", f"Photos at {side}", (DATA, top), (420, 710),
                   folder="my_photos", trigger="ohwx dog", resolution=side)
        for side, top in tops.items()
    }  # fmt: skip
    steps = (
        ("256 pixels", 256, {"steps": 600, "batch_size": 4}),
        ("512 pixels", 512, {"steps": 400, "rank": 0}),
        ("Lower rate", 512, {"steps": 400, "rank": 0, "learning_rate": 2e-5}),
    )
    trainers = []
    for column, (title, side, values) in zip((LOOK, TRAIN, WISH), steps, strict=True):
        links = {**base, "dataset": (photos[side], 0)}
        if trainers:
            links["adapter"] = (trainers[-1], 2)
        trainers.append(node("GraftTrainLoRA", title, (column, ROW), (420, 640), links, **values))
        for name, height in zip(base, LANE, strict=True):
            sketch.route(trainers[-1], name, [(LOOK - 30, height), (column - 40, height)])
        if side == 512:
            sketch.route(trainers[-1], "dataset", [(LOOK - 30, ROW + 750), (column - 40, ROW + 750)])
    first, _, last = trainers
    saved = node("GraftSaveAdapter", "Save the LoRA", (WISH, ROW + 720), (420, 122), {"adapter": (last, 2)},
                 filename_prefix="my_lora")  # fmt: skip
    prompt, negative, size = draw_wishes(sketch, (LOOK, 0), PROMPT)
    texts = (prompt, 0), (negative, 0), (size, 0), (checkpoint, 2)
    rows = [
        draw_pictures(sketch, (SAMPLE, top), name, (source, 0), (source, 1), *texts)
        for name, top, source in (("after the first", 0, first), ("after the last", ROW, last))
    ]
    sketch.group("Set 1 and 2: checkpoint and photos", [checkpoint, *photos.values()], BLUE)
    sketch.group("Set 3: what to draw", [prompt, negative, size], BLUE)
    sketch.group("Train, one after the other", [*trainers, saved], ORANGE)
    sketch.group("After the first trainer", rows[0], GRAY)
    sketch.group("After the last trainer", rows[1], GREEN)


def draw_preference(sketch):
    """Draw pairs -> inspection -> training -> the same prompt before and after."""
    node = sketch.node
    prompt = "a portrait of a woman by a window"
    base = draw_base(sketch, (DATA, 0), PREFERENCE_NOTE, 470, ROW - 200)
    pairs = node("GraftLoadDataset", "Pairs", (DATA, ROW), (420, 710), folder="my_pairs", resolution=512,
                 worse_folder="worse")  # fmt: skip

    def save(trainer, place):
        return [node("GraftSaveAdapter", "Save the LoRA", place, (420, 122), {"adapter": (trainer, 2)},
                     filename_prefix="my_taste")]  # fmt: skip

    values = {"beta": 2000.0, "batch_size": 4}
    trainer = draw_training(sketch, base, pairs, ("GraftTrainPreference", values), save, {"prompts": prompt})
    wishes = draw_wishes(sketch, (WISH, 0), prompt)
    before, after = draw_both(sketch, base[0], trainer, wishes)

    sketch.group("Set 1 and 2: checkpoint and pairs", [base[0], pairs], BLUE)
    sketch.group("Set 3: what to draw", wishes, BLUE)
    sketch.group("Before: the checkpoint as it is", before, GRAY)
    sketch.group("After: more like the better pictures", after, GREEN)


def draw_slider(sketch):
    """Draw prompts -> slider -> a row of pictures from strength -2 to 2."""
    node = sketch.node
    checkpoint, base = draw_base(sketch, (0, 0), SLIDER_NOTE, 440, 580)
    trainer = node("GraftTrainSlider", "Train", (480, 0), (420, 1000), base,
                   target="a photo of a man\na photo of a woman",
                   positive="a photo of a very old man\na photo of a very old woman",
                   negative="a photo of a very young man\na photo of a very young woman",
                   anchors="a photo of a house\na photo of a dog", resolution=512)  # fmt: skip
    saved = node("GraftSaveAdapter", "Save the slider", (480, 1080), (420, 122), {"adapter": (trainer, 2)},
                 filename_prefix="my_slider")  # fmt: skip
    compare = node("GraftCompare", "The row", (960, 0), (620, 900), {**base, "adapter": (trainer, 2)},
                   prompts="a photo of a man in a garden\na photo of a woman at a table", strengths="-2, -1, 0, 1, 2",
                   resolution=512)  # fmt: skip
    shown = node("SaveImage", "Pictures", (960, 980), (620, 400), {"images": (compare, 1)},
                 filename_prefix="graft_slider")  # fmt: skip
    sketch.group("Set 1: checkpoint", [checkpoint], BLUE)
    sketch.group("Set 2: the property. Train", [trainer, saved], ORANGE)
    sketch.group("The same pictures at five strengths", [compare, shown], GREEN)


def draw_wan(sketch):
    """Draw two models -> a LoRA for each -> a clip that both draw, one after the other."""
    node = sketch.node
    node("MarkdownNote", "Start here", (DATA, 0), (420, 560), text=WAN_NOTE)
    experts = [
        node("UNETLoader", f"{name} noise", (DATA, ROW + place * 150), (420, 90),
             unet_name=f"wan2.2_t2v_{name.lower()}_noise_14B_fp8_scaled.safetensors")
        for place, name in enumerate(("High", "Low"))
    ]  # fmt: skip
    clip = node("CLIPLoader", "Text encoder", (DATA, ROW + 300), (420, 110),
                clip_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors", type="wan")  # fmt: skip
    vae = node("VAELoader", "VAE", (DATA, ROW + 470), (420, 60), vae_name="wan_2.1_vae.safetensors")
    dataset = node("GraftLoadDataset", "Dataset", (DATA, ROW + 630), (420, 710), folder="my_clips", resolution=640)
    ranges = [
        node("GraftObjectiveOptions", "From 875", (LOOK, 0), (420, 700), min_timestep=875),
        node("GraftObjectiveOptions", "To 875", (LOOK, ROW + 100), (420, 700), max_timestep=875),
    ]
    trained, saved = [], []
    for place, (name, expert, options) in enumerate(zip(("high", "low"), experts, ranges, strict=True)):
        top = place * (ROW + 100)
        links = {"model": (expert, 0), "clip": (clip, 0), "vae": (vae, 0), "dataset": (dataset, 0)}
        trained.append(node("GraftTrainLoRA", f"Train {name} noise", (TRAIN, top), (420, 640),
                            {**links, "options": (options, 0)}))  # fmt: skip
        saved.append(node("GraftSaveAdapter", f"Save {name} noise", (TRAIN, top + 690), (420, 122),
                          {"adapter": (trained[-1], 2)}, filename_prefix=f"my_wan_{name}_noise"))  # fmt: skip
    texts = [
        node("CLIPTextEncode", title, (WISH, top), (420, 110), {"clip": (clip, 0)}, text=text)
        for title, top, text in (("Prompt", 0, "ohwx, a dog runs over a beach"), ("Negative prompt", 170, ""))
    ]
    size = node("EmptyHunyuanLatentVideo", "Size and length", (WISH, 340), (420, 150), width=832, height=480, length=33)
    steps = {"steps": 20, "cfg": 3.5, "sampler_name": "euler", "scheduler": "simple", "noise_seed": 1}
    prompts = {"positive": (texts[0], 0), "negative": (texts[1], 0)}
    high = node("KSamplerAdvanced", "Draw the noisy steps", (SAMPLE - 60, 0), (400, 340),
                {"model": (trained[0], 0), **prompts, "latent_image": (size, 0)}, **steps,
                control_after_generate="fixed", end_at_step=10, return_with_leftover_noise="enable")  # fmt: skip
    low = node("KSamplerAdvanced", "Draw the rest", (SAMPLE - 60, 400), (400, 340),
               {"model": (trained[1], 0), **prompts, "latent_image": (high, 0)}, **steps,
               control_after_generate="fixed", add_noise="disable", start_at_step=10)  # fmt: skip
    decoded = node("VAEDecode", "Decode", (SAMPLE + 400, 0), (500, 50), {"samples": (low, 0), "vae": (vae, 0)})
    shown = node("SaveAnimatedWEBP", "The clip", (SAMPLE + 400, 110), (500, 560), {"images": (decoded, 0)},
                 filename_prefix="graft_wan", fps=16.0)  # fmt: skip
    sketch.group("Set 1: the models", [*experts, clip, vae], BLUE)
    sketch.group("Set 2: dataset", [dataset], BLUE)
    sketch.group("Timesteps", ranges, GRAY)
    sketch.group("Train", [*trained, *saved], ORANGE)
    sketch.group("Set 3: what to draw", [*texts, size], BLUE)
    sketch.group("Draw with both LoRAs", [high, low, decoded, shown], GREEN)


WORKFLOWS = {
    "Train a LoRA": draw_train_a_lora,
    "DreamBooth a subject": draw_dreambooth,
    "Train a textual-inversion embedding": draw_embedding,
    "Pivotal tuning": draw_pivotal,
    "Fine-tune a checkpoint": draw_fine_tune,
    "Merge and resize adapters": draw_merge,
    "Train an edit model from pairs": draw_edit,
    "Train both experts of Wan 2.2": draw_wan,
    "Curriculum": draw_curriculum,
    "Preference from pairs": draw_preference,
    "Concept slider": draw_slider,
}


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
                    path = FOLDER / f"{name}.json"
                    path.write_text(json.dumps(sketch.save(name), separators=(",", ":")) + "\n", encoding="utf-8")
                    print(path)
        finally:
            if server:
                server.stop()


if __name__ == "__main__":
    sys.exit(main())
