"""Tests of the example workflows: legible, complete, and run by the real server as a user's Run does."""

import copy
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from docs.build import make_blueprint
from docs.build.make_workflows import (
    TINY,
    TINY_CURRICULUM,
    TINY_DREAMBOOTH,
    TINY_EMBEDDING,
    TINY_FINE_TUNE,
    TINY_MERGE,
    TINY_PIVOTAL,
    TINY_PREFERENCE,
    TINY_SLIDER,
)
from tests.support.host import ROOT
from tests.support.pairs import write_pairs
from tests.support.workflow import NOTES, find_nodes, read_workflow, to_prompt
from tests.toy import world

EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
LORA = ROOT / "example_workflows" / "Train a LoRA.json"
DREAMBOOTH = ROOT / "example_workflows" / "DreamBooth a subject.json"

# Height of a node's title, which the editor draws above its position.
TITLE = 30

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def box_of(node):
    """Return (left, top, right, bottom) as drawn, title included."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def list_pairs(items):
    return [(a, b) for place, a in enumerate(items) for b in items[place + 1 :]]


@each_example
def test_nodes_and_groups_do_not_overlap(path):
    workflow = read_workflow(path)
    for a, b in list_pairs(workflow["nodes"]):
        assert not overlap(box_of(a), box_of(b)), (a["title"], b["title"])
    frames = [(group["title"], group["bounding"]) for group in workflow["groups"]]
    for (a, (x, y, w, h)), (b, (u, v, s, t)) in list_pairs(frames):
        assert not overlap((x, y, x + w, y + h), (u, v, u + s, v + t)), (a, b)


def test_the_blueprint_lists_its_widgets_once():
    """The inputs list them. ComfyUI 0.33 quarantines `proxyWidgets` of linked widgets, and edits would be lost."""
    blueprint = json.loads((make_blueprint.FOLDER / f"{make_blueprint.NAME}.json").read_text(encoding="utf-8"))
    (node,) = blueprint["nodes"]
    assert "proxyWidgets" not in node["properties"]
    assert len(node["widgets_values"]) == len([slot for slot in node["inputs"] if "widget" in slot])


LOOKING = [LORA, ROOT / "example_workflows" / "Fine-tune a checkpoint.json"]


@pytest.mark.parametrize("path", LOOKING, ids=lambda path: path.stem)
def test_the_look_comes_before_the_training(path):
    """The trainer gets its dataset through the inspection node, so no host can run it first; previews are drawn."""
    workflow = read_workflow(path)
    (look,), (trainer,) = find_nodes(workflow, "What training will see"), find_nodes(workflow, "Train")
    sources = {link[0]: link[1] for link in workflow["links"]}
    given = {socket["name"]: sources.get(socket["link"]) for socket in trainer["inputs"]}
    assert given["dataset"] == look["id"]
    (previews,) = find_nodes(workflow, "Previews")
    assert given["options"] == previews["id"]
    (prompt,) = find_nodes(workflow, "Prompt")
    assert previews["widgets_values"][0] == prompt["widgets_values"][0]


@pytest.mark.parametrize("path", LOOKING, ids=lambda path: path.stem)
def test_wires_do_not_cross_groups_that_are_not_theirs(path):
    """Each wire, from point to point, stays out of every group that contains neither of its ends."""
    workflow = read_workflow(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    points = {row["id"]: row for row in workflow["extra"].get("reroutes", [])}
    ends = {row["id"]: row["parentId"] for row in workflow["extra"].get("linkExtensions", [])}
    for link, source, _, target, *_ in workflow["links"]:
        (x, y), (width, _) = nodes[source]["pos"], nodes[source]["size"]
        places, row = [tuple(nodes[target]["pos"])], ends.get(link)
        while row is not None:
            places.insert(0, tuple(points[row]["pos"]))
            row = points[row].get("parentId")
        places.insert(0, (x + width, y))
        own = {source, target}
        for group in workflow["groups"]:
            if own & holds(group, nodes):
                continue
            for start, stop in zip(places, places[1:], strict=False):
                assert not crosses(start, stop, group["bounding"]), (link, group["title"])


def holds(group, nodes):
    left, top, width, height = group["bounding"]
    inside = [node for node in nodes.values() if left <= node["pos"][0] < left + width]
    return {node["id"] for node in inside if top <= node["pos"][1] < top + height}


def crosses(start, stop, box):
    """Report whether a straight line crosses a box, ignoring its edge of 20 for titles."""
    left, top, width, height = box
    for share in np.linspace(0, 1, 200):
        x, y = (a + share * (b - a) for a, b in zip(start, stop, strict=True))
        if left + 20 < x < left + width - 20 and top + 20 < y < top + height - 20:
            return True
    return False


@each_example
def test_the_note_opens_beside_the_sidebar(path):
    """At the scale that the file opens with, right of the sidebar and below the tab bar."""
    view = read_workflow(path)["extra"]["ds"]
    (left, top), scale = view["offset"], view["scale"]
    assert left * scale >= 100 and (top - TITLE) * scale >= 100


@each_example
def test_nodes_have_titles_of_their_own_and_a_note_says_what_to_set(path):
    nodes = read_workflow(path)["nodes"]
    titles = [node.get("title") for node in nodes]
    assert all(titles) and len(set(titles)) == len(titles)
    assert any(node["type"] in NOTES for node in nodes)


@each_example
@pytest.mark.server
def test_every_node_is_known_and_every_required_input_given(path, server):
    """Links and widgets of the file fill each node's schema, with no widget too many."""
    schemas = server.object_info()
    prompt = to_prompt(read_workflow(path), schemas)
    for entry in prompt.values():
        given = schemas[entry["class_type"]]["input"]
        assert set(given.get("required", {})) <= set(entry["inputs"]), entry
        assert set(entry["inputs"]) <= {*given.get("required", {}), *given.get("optional", {})}, entry


def test_values_are_for_a_real_user():
    """The widgets match README: SD1.5 at 512 pixels, the family's learning rate, a fixed seed."""
    workflow = read_workflow(LORA)
    values = {node["title"]: node.get("widgets_values") for node in workflow["nodes"]}
    assert values["Photos"][:4] == ["my_photos", "ohwx dog", 512, 1]
    assert values["Train"] == [1000, 0, 16, 1, 0]
    assert values["Size and number"][:2] == [512, 512]
    assert values["Sample before"] == values["Sample after"]
    assert values["Sample before"][1] == "fixed"
    assert "ohwx dog" in values["Prompt"][0]


@pytest.mark.server
def test_before_and_after_differ_in_nothing_but_the_training(server):
    prompt = to_prompt(read_workflow(LORA), server.object_info())
    by_title = {entry["_meta"]["title"]: (node, entry) for node, entry in prompt.items()}
    checkpoint, trainer = by_title["Checkpoint"][0], by_title["Train"][0]

    def trace(title):
        """Return a node's inputs, replacing the trainer's model and clip by the checkpoint's."""
        node, entry = by_title[title]
        rows = {}
        for name, value in entry["inputs"].items():
            if isinstance(value, list):
                origin, slot = value
                source = prompt[origin]
                made = checkpoint if origin in (checkpoint, trainer) else trace(source["_meta"]["title"])
                value = [made, slot]
            rows[name] = value
        return entry["class_type"], rows

    before, after = trace("Before"), trace("After")
    assert before[1].pop("filename_prefix") != after[1].pop("filename_prefix")
    assert before == after


@pytest.mark.server
def test_it_trains_draws_and_saves(server):
    """The example on the tiny base with two steps: all outputs exist, and the LoRA changed the picture."""
    folder = server.path("input", "example_workflow")
    shutil.copytree(world.CONCEPT_FOLDER / TINY["Photos"]["folder"], folder, dirs_exist_ok=True)
    values = copy.deepcopy(TINY)
    values["Photos"]["folder"] = folder.name
    values["Train"]["steps"] = 2
    for title in ("Sample before", "Sample after"):
        values[title]["steps"] = 2
    workflow = read_workflow(LORA)
    prompt = to_prompt(workflow, server.object_info(), values)
    entry = server.run(prompt)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    before, after = (server.download(entry, node(title)) for title in ("Before", "After"))
    assert len(before) == len(after) == 2
    assert before != after
    path = entry["outputs"][node("Save the LoRA")]["text"][0]
    assert path.endswith(".safetensors")
    assert server.path("output", "loras") in Path(path).parents
    look = entry["outputs"][node("What training will see")]
    assert "8 pictures" in look["text"][0]
    assert look["images"]
    finished = [message for message in entry["status"]["messages"] if message[0] == "execution_success"]
    assert finished


@pytest.mark.server
def test_dreambooth_values_are_for_a_real_user(server):
    """SD1.5 at 512 pixels, prompts that differ in the rare word alone, and the trainer's number of class images."""
    prompt = to_prompt(read_workflow(DREAMBOOTH), server.object_info())
    given = {entry["_meta"]["title"]: entry["inputs"] for entry in prompt.values()}
    assert (given["Subject"]["value"], given["Class"]["value"]) == ("a photo of sks dog", "a photo of a dog")
    assert given["Photos"]["folder"] == "my_photos"
    assert given["Train"]["class_images"] == given["Class images"]["count"] == 200
    assert given["Photos"]["resolution"] == given["Class images"]["resolution"] == given["Size and number"]["width"]
    usual = {"train": "LoRA", "prior_weight": 1.0, "learning_rate": 0, "seed": 0, "prior": "class images"}
    assert usual.items() <= given["Train"].items()
    before, after, subject = (
        {name: value for name, value in given[f"Sample the {what}"].items() if not isinstance(value, list)}
        for what in ("class before", "class after", "subject")
    )
    assert before == after == subject


@pytest.mark.server
def test_dreambooth_draws_class_images_trains_and_saves(server):
    """The example on the tiny base, with two steps and two class images."""
    folder = server.path("input", "example_dreambooth")
    shutil.copytree(world.CONCEPT_FOLDER / TINY_DREAMBOOTH["Photos"]["folder"], folder, dirs_exist_ok=True)
    for caption in folder.glob("*.txt"):
        caption.unlink()
    values = copy.deepcopy(TINY_DREAMBOOTH)
    values["Photos"]["folder"] = folder.name
    values["Class images"].update(count=2, steps=2)
    values["Train"].update(class_images=2, steps=2)
    for what in ("the class before", "the class after", "the subject"):
        values[f"Sample {what}"]["steps"] = 2
    workflow = read_workflow(DREAMBOOTH)
    entry = server.run(to_prompt(workflow, server.object_info(), values))

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    assert len(entry["outputs"][node("Class images")]["images"]) == 2
    text = entry["outputs"][node("Train")]["text"][0]
    assert "2 steps trained" in text
    assert "Class images: 2 from class_dataset" in text
    before, after, subject = (
        server.download(entry, node(title)) for title in ("The class before", "The class after", "The subject")
    )
    assert len(before) == len(after) == len(subject) == 2
    assert len({*before, *after, *subject}) == 6
    assert server.path("output", "loras") in Path(entry["outputs"][node("Save the LoRA")]["text"][0]).parents


@pytest.mark.server
@pytest.mark.parametrize(
    "name, tiny, shown, saved",
    [
        ("Train a textual-inversion embedding", TINY_EMBEDDING, ("before", "after"), ["Save the word"]),
        ("Pivotal tuning", TINY_PIVOTAL, ("the word alone", "word and LoRA"), ["Save the word", "Save the LoRA"]),
    ],
)
def test_a_word_is_trained_drawn_and_saved(server, name, tiny, shown, saved):
    """The embedding examples on the tiny base, with two steps."""
    folder = server.path("input", f"example {name}")
    shutil.copytree(world.CONCEPT_FOLDER / tiny["Photos"]["folder"], folder, dirs_exist_ok=True)
    if name.startswith("Train"):
        for caption in folder.glob("*.txt"):
            caption.unlink()
    values = copy.deepcopy(tiny)
    values["Photos"]["folder"] = folder.name
    values["Train"].update(steps=2, batch_size=1)
    word = f"{name.split()[0].lower()}-toy"
    (values["The word"] if "The word" in values else values["Train"])["name"] = word
    values["Prompt"]["value"] = f"a large embedding:{word} on a green background"
    for what in shown:
        values[f"Sample {what}"]["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / f"{name}.json")
    entry = server.run(to_prompt(workflow, server.object_info(), values), timeout=600)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    pictures = [server.download(entry, node(what[:1].upper() + what[1:])) for what in shown]
    assert all(len(drawn) == 2 for drawn in pictures)
    assert pictures[0] != pictures[1]
    assert "2 steps trained" in entry["outputs"][node("Train")]["text"][0]
    for title in saved:
        assert Path(entry["outputs"][node(title)]["text"][0]).is_file()
    assert server.path("output", "embeddings", f"{word}.safetensors").is_file()


@pytest.mark.server
def test_a_preference_is_trained_from_pairs(server):
    """The example on the tiny base with two steps; the panel's events have the implicit accuracy."""
    write_pairs(server.path("input", "pairs"), 4)
    values = copy.deepcopy(TINY_PREFERENCE)
    values["Train"].update(steps=2, batch_size=2)
    for what in ("before", "after"):
        values[f"Sample {what}"]["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / "Preference from pairs.json")
    schemas = server.object_info()
    given = {entry["_meta"]["title"]: entry["inputs"] for entry in to_prompt(workflow, schemas).values()}
    usual = {"steps": 1000, "beta": 2000.0, "learning_rate": 0, "train": "LoRA", "seed": 0}
    assert usual.items() <= given["Train"].items()
    assert given["Pairs"]["worse_folder"] == "worse"
    entry = server.run(to_prompt(workflow, schemas, values), timeout=600)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    before, after = (server.download(entry, node(title)) for title in ("Before", "After"))
    assert len(before) == len(after) == 2
    assert before != after
    assert "4 of 4 with a worse picture" in entry["outputs"][node("What training will see")]["text"][0]
    assert "2 steps trained" in entry["outputs"][node("Train")]["text"][0]
    assert Path(entry["outputs"][node("Save the LoRA")]["text"][0]).is_file()


@pytest.mark.server
def test_a_checkpoint_is_fine_tuned_merged_and_drawn_with(server):
    """The example on the tiny base with two steps; its file draws the same as the graph drew."""
    folder = server.path("input", "example_fine_tune")
    shutil.copytree(world.CONCEPT_FOLDER / TINY_FINE_TUNE["Pictures"]["folder"], folder, dirs_exist_ok=True)
    values = copy.deepcopy(TINY_FINE_TUNE)
    values["Pictures"]["folder"] = folder.name
    values["Train"].update(steps=2, batch_size=1)
    for what in ("before", "after"):
        values[f"Sample {what}"]["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / "Fine-tune a checkpoint.json")
    schemas = server.object_info()
    given = {entry["_meta"]["title"]: entry["inputs"] for entry in to_prompt(workflow, schemas).values()}
    usual = {"steps": 2000, "learning_rate": 0, "batch_size": 2, "seed": 0}
    assert usual.items() <= given["Train"].items()
    entry = server.run(to_prompt(workflow, schemas, values), timeout=600)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    before, after = (server.download(entry, node(title)) for title in ("Before", "After"))
    assert len(before) == len(after) == 2
    assert before != after
    assert "2 steps trained" in entry["outputs"][node("Train")]["text"][0]
    assert Path(entry["outputs"][node("Save what changed")]["text"][0]).is_file()
    (merged,) = server.path("output", "checkpoints").glob("my_model*.safetensors")
    values["Checkpoint"]["ckpt_name"] = merged.name
    again = to_prompt(workflow, schemas, values)
    kept = {}
    wanted = [node("Before")]
    while wanted:
        number = wanted.pop()
        kept[number] = again[number]
        wanted += [value[0] for value in again[number]["inputs"].values() if isinstance(value, list)]
    drawn = server.download(server.run(kept, timeout=300), node("Before"))
    assert [_pixels(data) for data in drawn] == [_pixels(data) for data in after]


@pytest.mark.server
def test_a_curriculum_is_trained_drawn_and_not_trained_again(server):
    """The example on the tiny base with two steps for each trainer, queued twice."""
    folder = server.path("input", "example_curriculum")
    shutil.copytree(world.CONCEPT_FOLDER / "toy", folder, dirs_exist_ok=True)
    values = copy.deepcopy(TINY_CURRICULUM)
    trainers = ("256 pixels", "512 pixels", "Lower rate")
    for title, given in values.items():
        if "folder" in given:
            given["folder"] = folder.name
        if "steps" in given:
            given["steps"] = 2
        if title.startswith("Sample"):
            given["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / "Curriculum.json")
    schemas = server.object_info()
    usual = {entry["_meta"]["title"]: entry["inputs"] for entry in to_prompt(workflow, schemas).values()}
    assert [usual[title]["rank"] for title in trainers] == [16, 0, 0]
    assert [usual[f"Photos at {side}"]["resolution"] for side in (256, 512)] == [256, 512]
    prompt = to_prompt(workflow, schemas, values)
    entry = server.run(prompt, timeout=600)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    def texts(entry):
        return [entry["outputs"][node(title)]["text"][0] for title in trainers]

    assert all("2 steps trained" in text for text in texts(entry))
    first, last = (server.download(entry, node(title)) for title in ("After the first", "After the last"))
    assert len(first) == len(last) == 2 and first != last
    assert Path(entry["outputs"][node("Save the LoRA")]["text"][0]).is_file()
    # Without the host's cache, so that the runs themselves answer.
    server.free()
    assert all("2 steps returned without training" in text for text in texts(server.run(prompt, timeout=600)))


@pytest.mark.server
def test_a_slider_draws_its_row_without_any_picture(server):
    values = copy.deepcopy(TINY_SLIDER)
    values["Train"]["steps"] = 2
    values["The row"]["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / "Concept slider.json")
    schemas = server.object_info()
    prompt = to_prompt(workflow, schemas, values)
    entry = server.run(prompt, timeout=600)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    assert "2 steps trained" in entry["outputs"][node("Train")]["text"][0]
    pictures = server.download(entry, node("Pictures"))
    assert len(pictures) == 2 * 5 and len(set(pictures)) == 10
    server.free()
    assert "2 steps returned without training" in server.run(prompt)["outputs"][node("Train")]["text"][0]


def _write_lora(path, base, seed):
    """Write a LoRA of rank 4 with random values on the first attention, in kohya's names."""
    place = "input_blocks.1.1.transformer_blocks.0.attn1"
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1"
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    with safe_open(base, "pt") as file:
        for layer in ("to_q", "to_v", "to_out.0"):
            key = f"{name}_{layer.replace('.', '_')}"
            high, wide = file.get_slice(f"model.diffusion_model.{place}.{layer}.weight").get_shape()
            tensors[f"{key}.lora_up.weight"] = torch.randn(high, 4, generator=source) * 0.1
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, wide, generator=source) * 0.1
            tensors[f"{key}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)


@pytest.mark.server
def test_two_loras_are_merged_to_one_that_draws_as_both(server, tiny_base):
    """The example with all of the energy: one file in place of two, and the same pictures."""
    names = ["example_first.safetensors", "example_second.safetensors"]
    for seed, name in enumerate(names):
        _write_lora(server.path("models", "loras", name), tiny_base, seed)
    values = copy.deepcopy(TINY_MERGE)
    values["First LoRA"], values["Second LoRA"] = ({"adapter_name": name} for name in names)
    values["Resize"] = {"rank": 64, "energy": 1.0}
    for what in ("both", "merged"):
        values[f"Sample {what}"]["steps"] = 2
    workflow = read_workflow(ROOT / "example_workflows" / "Merge and resize adapters.json")
    schemas = server.object_info()
    entry = server.run(to_prompt(workflow, schemas, values), timeout=300)

    def node(title):
        return str(find_nodes(workflow, title)[0]["id"])

    both, merged = (_stacked(server.download(entry, node(title))) for title in ("Both", "Merged"))
    assert np.abs(both - merged).max() <= 2
    with safe_open(entry["outputs"][node("Save the LoRA")]["text"][0], "pt") as file:
        kept = {key.rpartition("_attn1_")[2] for key in list(file.keys()) if key.endswith(".alpha")}
    assert kept == {"to_q.alpha", "to_v.alpha", "to_out_0.alpha"}
    # The pictures show the compared effect: without the first LoRA they differ.
    values["Put the first on"] = {"strength_model": 0.0}
    entry = server.run(to_prompt(workflow, schemas, values), timeout=300)
    assert np.abs(both - _stacked(server.download(entry, node("Both")))).max() >= 10


def _stacked(files):
    return np.stack([_picture(data).astype(float) for data in files])


def _pixels(data):
    return _picture(data).tobytes()


def _picture(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
