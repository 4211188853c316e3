"""Test of preference training: pairs of two shapes for one ambiguous caption decide it, and other captions stay.

Trained through the real server; drawn with ComfyUI's own LoRA loader and sampler; judged by the toy world's classifier.
"""

import json

import pytest

from tests.support import graphs, pairs
from tests.test_concept import old_accuracy, old_scenes
from tests.toy import classifier, world

PAIRS = 24
WIDGETS = {"beta": 5000.0, "learning_rate": 2e-4, "rank": 8, "batch_size": 4, "seed": 0}


@pytest.fixture(scope="module")
def steps(trials):
    """Return the steps of the training; 60 prefer the shape as surely."""
    return trials(60, 80)


@pytest.fixture(scope="module")
def trained(server, steps):
    """Return the path of the LoRA that the graph trained on the pairs."""
    pairs.write_pairs(server.path("input", "preferred"), PAIRS)
    graph = graphs.training("preferred", 1)
    graph["2"]["inputs"]["worse_folder"] = "worse"
    base = {name: graph["3"]["inputs"][name] for name in ("model", "clip", "vae", "dataset")}
    graph["3"] = graphs.node("GraftTrainPreference", **base, steps=steps, **WIDGETS)
    graph["9"] = graphs.node("GraftSaveAdapter", adapter=["3", 2], filename_prefix="taste", format="kohya")
    return server.run(graph, timeout=900)["outputs"]["9"]["text"][0]


@pytest.mark.soak
def test_the_preferred_shape_is_drawn_and_other_captions_stay(
    comfy, tiny_base, trained, server, steps, trials, sampler_steps, capsys
):
    import comfy.sd
    import comfy.utils

    from tests.toy import host

    model, clip, vae = host.load(tiny_base)
    after, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(trained), 1.0, 0.0)
    count = trials(16, 32)
    unseen = pairs.list_colors()[PAIRS:][:count]
    scenes = old_scenes()[:count]
    captions = [world.describe(f"{color} {shape}", background) for shape, color, background in scenes]
    shares = {}
    for name, one in (("before", model), ("after", after)):
        drawn = host.generate(one, clip, vae, [pairs.describe(*colors) for colors in unseen], 5, sampler_steps)
        better = sum(classifier.classify(picture).shape == pairs.BETTER for picture in drawn) / count
        olds = host.generate(one, clip, vae, captions, 6, sampler_steps)
        shares[name] = better, old_accuracy(olds, scenes)
    (log,) = server.path("output", "graft").glob("preferred*/metrics.jsonl")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    accuracies = [event["accuracy"] for event in events if event["event"] == "step"]
    late = sum(accuracies[-10:]) / 10
    with capsys.disabled():
        print(f"\n{steps} steps on {PAIRS} pairs   before  after")
        print(f"preferred shape            {shares['before'][0]:6.0%} {shares['after'][0]:6.0%}")
        print(f"other captions right       {shares['before'][1]:6.0%} {shares['after'][1]:6.0%}")
        print(f"implicit accuracy          {accuracies[0]:6.0%} {late:6.0%}")
    assert 0.3 <= shares["before"][0] <= 0.7
    assert shares["after"][0] >= 0.85
    assert shares["after"][1] >= 0.95
    assert accuracies[0] == 0.5
    assert late >= 0.9
