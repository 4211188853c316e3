"""Test of the main promise: eight pictures and a few hundred steps teach a new concept and keep the old ones.

Trained through the real server; drawn with the host's own LoRA loader and sampler; judged by the toy world's
classifier, which is itself tested on held-out drawings.
"""

import random
import shutil

import pytest

from tests.support import graphs
from tests.toy import classifier, world

# Settings that reach the bars on the tiny base; `make demo` uses the same.
STEPS = 300
WIDGETS = {"learning_rate": 1e-3, "rank": 8, "batch_size": 4, "seed": 0}
TOY_SAMPLES = 16
OLD_SAMPLES = 32


def toy_prompts():
    """Return two prompts for the new object on each background."""
    return [world.toy_caption(background) for background in world.BACKGROUNDS] * (TOY_SAMPLES // len(world.BACKGROUNDS))


def old_scenes():
    """Return scenes of the old world, drawn by a fixed seed."""
    return random.Random(0).sample(world.known_scenes(), OLD_SAMPLES)


def old_accuracy(pictures, scenes):
    """Return the fraction of pictures that show their scene's shape, color and background."""
    right = 0
    for picture, (shape, color, background) in zip(pictures, scenes, strict=True):
        verdict = classifier.classify(picture)
        right += (verdict.shape, verdict.color, verdict.background) == (shape, color, background)
    return right / len(scenes)


@pytest.fixture(scope="module")
def trained(server):
    """Return the path of the LoRA that the graph trained on the new object."""
    shutil.copytree(world.CONCEPT_FOLDER / "toy", server.path("input", "concept"), dirs_exist_ok=True)
    prompt = graphs.training("concept", STEPS, **WIDGETS)
    prompt["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="concept", format="kohya")
    return server.run(prompt, timeout=900)["outputs"]["9"]["text"][0]


@pytest.mark.soak
def test_a_new_concept_appears_and_old_ones_stay(comfy, tiny_base, trained, trials, sampler_steps, capsys):
    import comfy.sd
    import comfy.utils

    from tests.toy import host

    model, clip, vae = host.load(tiny_base)
    after, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(trained), 1.0, 0.0)
    scenes = old_scenes()[: trials(16, OLD_SAMPLES)]
    captions = [world.describe(f"{color} {shape}", background) for shape, color, background in scenes]
    shares = {}
    for name, one in (("before", model), ("after", after)):
        toys = host.generate(one, clip, vae, toy_prompts(), seed=5, steps=sampler_steps)
        olds = host.generate(one, clip, vae, captions, seed=6, steps=sampler_steps)
        shown = sum(classifier.classify(picture).toy for picture in toys) / len(toys)
        shares[name] = (shown, old_accuracy(olds, scenes))
    with capsys.disabled():
        print(f"\n{STEPS} steps on 8 pictures   before  after")
        print(f"new object for its trigger  {shares['before'][0]:6.0%} {shares['after'][0]:6.0%}")
        print(f"old concepts right          {shares['before'][1]:6.0%} {shares['after'][1]:6.0%}")
    assert shares["before"][0] <= 0.05
    assert shares["after"][0] >= 0.80
    assert shares["after"][1] >= 0.90 * shares["before"][1]
