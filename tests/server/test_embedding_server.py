"""Tests of embeddings in the real server: usable at once, as a file, with a LoRA; resumed, cancelled, reported."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.support import graphs
from tests.support.server import PromptError, PromptInterrupted
from tests.toy import world


@pytest.fixture
def dataset(server, request):
    """Copy two of the concept's pictures without captions into the test's own folder."""
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    folder = server.path("input", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in (0, 1):
        shutil.copy(world.CONCEPT_FOLDER / "toy" / f"{number:02}.png", folder)
    # The content decides a run's identity.
    Image.fromarray(np.random.RandomState(sum(map(ord, name))).randint(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "own.png"
    )
    return folder


def learning(folder, steps, name="my-word", init_text="toy", options=None, **widgets):
    """Return a graph of checkpoint, dataset and embedding trainer; node 3 is the trainer."""
    values = {"vectors": 1, "learning_rate": 1e-2, "batch_size": 1, "seed": 0, "templates": "object", **widgets}
    prompt = graphs.training(folder, 1)
    prompt["2"]["inputs"]["trigger"] = ""
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0]}
    prompt["3"] = graphs.node("GraftTrainEmbedding", **base, name=name, init_text=init_text, steps=steps, **values)
    if options:
        prompt.update(options)
        prompt["3"]["inputs"]["options"] = [list(options)[-1], 0]
    return prompt


def picture(server, entry, node):
    """Return the pixels that a SaveImage node wrote."""
    [output] = [one for one in server.list_outputs(entry) if one.node == node]
    return np.asarray(Image.open(server.path("output", output.subfolder, output.filename)).convert("RGB"))


def test_a_word_is_usable_at_once_and_as_a_file(server, tiny_base, dataset):
    """The returned clip, and later the file by its name, draw the same picture; other prompts are unaffected."""
    prompt = learning(dataset.name, 2, name="at-once")
    prompt["4"] = graphs.node("GraftSaveEmbedding", embedding=["3", 1], name="")
    text = "a large embedding:at-once on a blue background"
    inside = graphs.sampling(prompt, text, ["1", 0], ["3", 0], "inside", steps=3)
    outside = graphs.sampling(prompt, "a large on a blue background", ["1", 0], ["1", 1], "outside", steps=3, start=200)
    entry = server.run(prompt, timeout=300)
    path = entry["outputs"]["4"]["text"][0]
    assert path == str(server.path("output", "embeddings", "at-once.safetensors"))
    assert {name: value.shape for name, value in load_file(path).items()} == {"emb_params": (1, 768)}
    later = {"1": prompt["1"]}
    by_name = graphs.sampling(later, text, ["1", 0], ["1", 1], "by_name", steps=3, start=300)
    later["5"] = graphs.node("GraftLoadEmbedding", embedding_name="at-once.safetensors")
    later["6"] = graphs.node("GraftApplyEmbedding", clip=["1", 1], embedding=["5", 0])
    loaded = graphs.sampling(later, text, ["1", 0], ["6", 0], "loaded", steps=3, start=400)
    second = server.run(later, timeout=300)
    drawn = picture(server, entry, inside)
    assert np.array_equal(picture(server, second, by_name), drawn)
    assert np.array_equal(picture(server, second, loaded), drawn)
    assert not np.array_equal(picture(server, entry, outside), drawn)


def test_more_steps_extend_a_word_and_its_file(server, tiny_base, dataset):
    first = learning(dataset.name, 1, name="much-longer")
    first["4"] = graphs.node("GraftSaveEmbedding", embedding=["3", 1], name="")
    path = server.run(first, timeout=300)["outputs"]["4"]["text"][0]
    before = load_file(path)["emb_params"]
    more = learning(dataset.name, 2, name="much-longer")
    more["4"] = first["4"]
    assert server.run(more, timeout=300)["outputs"]["4"]["text"][0] == path
    assert not np.array_equal(load_file(path)["emb_params"], before)
    other = learning(dataset.name, 1, name="much-longer", seed=9)
    other["4"] = first["4"]
    with pytest.raises(PromptError, match="An embedding 'much-longer' exists already"):
        server.run(other, timeout=300)


def test_a_cancelled_word_is_kept_and_goes_on(server, tiny_base, dataset):
    prompt = learning(dataset.name, 500, name="word-c")
    with server.listen() as events:
        queued = server.queue(prompt, client_id=events.client_id)
        events.wait_for("graft.progress", timeout=300, event="step")
        server.interrupt()
        with pytest.raises(PromptInterrupted):
            server.wait(queued, timeout=120)
    [run] = server.path("output", "graft").glob("word-c-*")
    [file] = (run / "embeddings").iterdir()
    step = int(file.stem.split("-")[1])
    assert load_file(file)["emb_params"].shape == (1, 768)
    prompt["3"]["inputs"]["steps"] = step
    entry = server.run(prompt, timeout=300)
    assert "returned without training" in entry["outputs"]["3"]["text"][0]


def test_a_word_beside_a_lora(server, tiny_base, dataset):
    """Pivotal tuning: two files that work apart and together."""
    defaults = graphs.defaults_of(server.object_info("GraftPivotalOptions")["GraftPivotalOptions"])
    pivotal = {"50": graphs.options("GraftPivotalOptions", defaults, name="word-b", init_text="toy", vectors=1)}
    prompt = graphs.training(dataset.name, 2, option_nodes=pivotal, batch_size=1)
    prompt["2"]["inputs"]["trigger"] = ""
    prompt["4"] = graphs.node("GraftSaveEmbedding", embedding=["3", 4], name="")
    prompt["5"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="beside", format="kohya")
    text = "a large embedding:word-b on a blue background"
    together = graphs.sampling(prompt, text, ["3", 0], ["3", 1], "together", steps=3)
    word = graphs.sampling(prompt, text, ["1", 0], ["3", 1], "word", steps=3, start=200)
    lora = graphs.sampling(prompt, "a large toy", ["3", 0], ["1", 1], "lora", steps=3, start=300)
    entry = server.run(prompt, timeout=300)
    file = Path(entry["outputs"]["5"]["text"][0])
    later = {"1": prompt["1"]}
    later["2"] = graphs.node("LoraLoader", model=["1", 0], clip=["1", 1], lora_name=file.name,
                             strength_model=1.0, strength_clip=1.0)  # fmt: skip
    both = graphs.sampling(later, text, ["2", 0], ["2", 1], "both", steps=3)
    apart = graphs.sampling(later, text, ["1", 0], ["1", 1], "apart", steps=3, start=200)
    alone = graphs.sampling(later, "a large toy", ["2", 0], ["1", 1], "alone", steps=3, start=300)
    second = server.run(later, timeout=300)
    for first_node, second_node in ((together, both), (word, apart), (lora, alone)):
        one, other = picture(server, entry, first_node), picture(server, second, second_node)
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1
    assert not np.array_equal(picture(server, entry, together), picture(server, entry, word))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "dog"}, "input 'name'.*is already a word of the text encoder"),
        ({"name": "two words"}, "input 'name': A prompt cannot use the embedding name"),
        ({"name": "../up"}, "input 'name': A prompt cannot use the embedding name"),
        ({"init_text": ""}, "input 'init_text'.*gives no token"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_what_cannot_be_learnt_is_said(server, tiny_base, dataset, fields, message):
    with pytest.raises(PromptError, match=rf"Graft Textual Inversion(?: \(node 3\))?, {message}"):
        server.run(learning(dataset.name, 1, **fields))


def test_pivotal_options_are_named_where_they_arrive(server, tiny_base, dataset):
    defaults = graphs.defaults_of(server.object_info("GraftPivotalOptions")["GraftPivotalOptions"])
    pivotal = {"50": graphs.options("GraftPivotalOptions", defaults, name="dog", init_text="toy")}
    with pytest.raises(PromptError, match=r"Graft Train LoRA \(node 3\), input 'options': 'dog' is already a word"):
        server.run(graphs.training(dataset.name, 2, option_nodes=pivotal))


def test_captions_without_the_word_are_named(server, tiny_base, dataset):
    (dataset / "00.txt").write_text("a photo of nothing in particular")
    with pytest.raises(PromptError, match="input 'dataset'.*do not contain the embedding 'my-word': 00.png"):
        server.run(learning(dataset.name, 1))


def test_no_vectors_are_refused_before_anything_runs(server, tiny_base, dataset):
    with pytest.raises(PromptError, match="vectors"):
        server.run(learning(dataset.name, 1, vectors=0))
