"""Test of textual inversion: from pictures alone an embedding learns their content, and no base weight changes.

The concept is within the base's span, but the initial word does not call it up: the base knows it by other words. The
toy world's classifier judges the pictures.
"""

import numpy as np
import pytest

from tests.support import graphs
from tests.toy import classifier, world

SHAPE, COLOR = "heart", "purple"
PICTURES = 16
SAMPLES = 16
WIDGETS = {"vectors": 2, "learning_rate": 2e-2, "batch_size": 8, "seed": 0, "templates": "object"}
WORD, START = "my-thing", "toy"


def backgrounds(count):
    """Return backgrounds in turn, except the object's own color."""
    usable = [name for name in world.BACKGROUNDS if name != COLOR]
    return [usable[number % len(usable)] for number in range(count)]


@pytest.fixture(scope="module")
def learnt(server, trials):
    """Return the path of the embedding, trained on pictures with one caption that names nothing but the embedding."""
    from PIL import Image

    folder = server.path("input", "word")
    folder.mkdir(exist_ok=True)
    rng = np.random.RandomState(0)
    for number, background in enumerate(backgrounds(PICTURES)):
        Image.fromarray(world.draw(world.place(rng, SHAPE, COLOR, background))).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"a large {WORD}")
    prompt = graphs.training("word", 1)
    base = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0]}
    word = {"name": WORD, "init_text": START, "steps": trials(30, 50)}
    prompt["3"] = graphs.node("GraftTrainEmbedding", **base, **word, **WIDGETS)
    prompt["4"] = graphs.node("GraftSaveEmbedding", embedding=["3", 1], name="")
    return server.run(prompt, timeout=900)["outputs"]["4"]["text"][0]


@pytest.mark.slow
@pytest.mark.soak
def test_pictures_alone_bring_a_word_for_what_they_show(comfy, tiny_base, learnt, sampler_steps, capsys):
    from graft_pack.nodes.host.model.embeddings import apply_embedding
    from graft_pack.trainers.formats.embedding import load_embedding

    from tests.toy import host

    model, clip, vae = host.load(tiny_base)
    knowing = apply_embedding(clip, load_embedding(learnt, WORD))
    shares = {}
    for name, encoder, word in (("start word", clip, START), ("new word", knowing, f"embedding:{WORD}")):
        prompts = [world.describe(word, background) for background in backgrounds(SAMPLES)]
        pictures = host.generate(model, encoder, vae, prompts, seed=5, steps=sampler_steps)
        verdicts = [classifier.classify(picture) for picture in pictures]
        shares[name] = sum((one.shape, one.color) == (SHAPE, COLOR) for one in verdicts) / SAMPLES
    with capsys.disabled():
        print(f"\ntrained on {PICTURES} pictures: {COLOR} {SHAPE} drawn for")
        for name, share in shares.items():
            print(f"  the {name:12} {share:4.0%}")
    assert shares["start word"] <= 0.20
    assert shares["new word"] >= 0.80
