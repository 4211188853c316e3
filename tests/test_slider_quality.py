"""Tests of sliders on the tiny base: color and background without any picture, color from three pairs.

Drawn with the host's own sampler at strengths -2 to 2, judged by the toy world's classifier.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.comfy.test_fine_tune_quality import make_host
from tests.toy import classifier, world

pytestmark = pytest.mark.timeout(3600)

SHAPES = ("circle", "square", "triangle", "star")
STRENGTHS = (-2, -1, 0, 1, 2)
ANCHORS = (
    ("heart", "green", "white"),
    ("ring", "yellow", "pink"),
    ("cross", "black", "aqua"),
    ("diamond", "white", "brown"),
)
RATE = 3e-3
OTHERS = "`make soak` trains all; tests/comfy/test_slider.py checks them without drawing"


def caption(color, shape, background="gray"):
    return world.describe(f"{color} {shape}", background)


ANCHOR_CAPTIONS = tuple(caption(color, shape, background) for shape, color, background in ANCHORS)


@pytest.fixture(scope="module")
def base(comfy, tiny_base):
    from tests.toy import host

    return host.load(tiny_base, comfy.path)


@pytest.fixture(scope="module")
def count(trials):
    """Return the number of pictures that are drawn at each strength."""
    return trials(16, 32)


@pytest.fixture
def train(base, tmp_path, trials):
    """Return train(slider, dataset), which returns the adapter."""
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.engine.session import run_recipe
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.runs.folders import Folders

    folders = Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "embeddings")))

    def train(slider, dataset):
        inputs = RecipeInputs("LoRA", trials(60, 120), RATE, 8, 1, 0, 64, "", slider=slider)
        with torch.inference_mode(False):
            return run_recipe(resolve(Options(), family_of("SD1"), inputs), dataset, make_host(*base), folders).adapter

    return train


def draw(base, adapter, strength, prompts, count, steps):
    """Return so many pictures of the prompts with the slider at a strength."""
    from graft_pack.nodes.host.model.lora import apply_adapter

    from tests.toy import host

    model, clip, vae = base
    if adapter is not None:
        model, clip = apply_adapter(model, clip, adapter, float(strength), float(strength))
    return host.generate(model, clip, vae, (prompts * count)[:count], 5, steps)


def object_color(picture):
    """Return the mean RGB of the object in a picture, [3]."""
    pixels = np.asarray(picture, dtype=float)
    cover = classifier.find_object(pixels, classifier.find_background(pixels)[1]) > 0.6
    return pixels[cover].mean(axis=0)


def kept_share(base, adapter, strength, count, steps):
    """Return the share of the anchors' pictures that show their shape, color and background."""
    pictures = draw(base, adapter, strength, list(ANCHOR_CAPTIONS), count, steps)
    verdicts = [classifier.classify(picture) for picture in pictures]
    rows = [(one.shape, one.color, one.background) == ANCHORS[place % 4] for place, one in enumerate(verdicts)]
    return sum(rows) / len(rows)


def report(capsys, title, shares, kept):
    with capsys.disabled():
        print(
            f"\n{title}: right at -1 {shares[-1]:.0%}, at 1 {shares[1]:.0%}; anchors kept {kept[-1]:.0%}, {kept[1]:.0%}"
        )


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["prompts", "pairs"])
def test_a_color_slider_moves_red_to_blue(base, train, trials, count, sampler_steps, capsys, kind):
    if kind != trials("prompts", kind):
        pytest.skip(OTHERS)
    from graft_pack.nodes.host.actions.slider import from_pairs, from_prompts
    from graft_pack.trainers.data.arrays import from_arrays

    anchors = "\n".join(ANCHOR_CAPTIONS)
    prompts = [caption("purple", shape) for shape in SHAPES]
    if kind == "prompts":
        texts = ("\n".join(caption(color, shape) for shape in SHAPES) for color in ("purple", "red", "blue"))
        adapter, bar = train(*from_prompts(*texts, anchors, 1.0)), 0.9
    else:
        scenes = [world.Scene(shape, "red", "gray") for shape in SHAPES[:3]]
        sides = [
            from_arrays([world.draw(replace(scene, color=color)) for scene in scenes], prompts[:3], "", 64)
            for color in ("red", "blue")
        ]
        rows = zip(*(side.examples for side in sides), strict=True)
        pairs = replace(sides[0], examples=tuple(replace(one, control=other) for one, other in rows))
        adapter, bar = train(*from_pairs(pairs, "", "", "", anchors, 1.0)), 0.8
    drawn = {strength: draw(base, adapter, strength, prompts, count, sampler_steps) for strength in STRENGTHS}
    names = {strength: [classifier.classify(one).color for one in pictures] for strength, pictures in drawn.items()}
    shares = {-1: names[-1].count("blue") / count, 1: names[1].count("red") / count}
    kept = {strength: kept_share(base, adapter, strength, count, sampler_steps) for strength in (-1, 1)}
    report(capsys, f"color from {kind}", shares, kept)
    assert np.array_equal(drawn[0], draw(base, None, 0, prompts, count, sampler_steps))
    redness = [np.mean([np.dot(object_color(one), (1, 0, -1)) for one in drawn[strength]]) for strength in STRENGTHS]
    assert redness == sorted(redness)
    assert min(shares.values()) >= bar
    assert min(kept.values()) >= 0.95


@pytest.mark.soak
def test_a_background_slider_moves_white_to_black(base, train, trials, count, sampler_steps, capsys):
    if trials(True, False):
        pytest.skip(OTHERS)
    from graft_pack.nodes.host.actions.slider import from_prompts

    prompts = [caption("red", shape) for shape in SHAPES]
    texts = ("\n".join(caption("red", shape, color) for shape in SHAPES) for color in ("gray", "white", "black"))
    adapter = train(*from_prompts(*texts, "\n".join(caption("green", shape, "pink") for shape in SHAPES), 1.0))
    drawn = {strength: draw(base, adapter, strength, prompts, count, sampler_steps) for strength in STRENGTHS}
    verdicts = {strength: [classifier.classify(one) for one in pictures] for strength, pictures in drawn.items()}
    shares = {
        strength: sum(one.background == name for one in verdicts[strength]) / count
        for strength, name in ((-1, "black"), (1, "white"))
    }
    with capsys.disabled():
        print(f"\nbackground: right at -1 {shares[-1]:.0%}, at 1 {shares[1]:.0%}")
    lightness = [
        np.mean([classifier.find_background(np.asarray(one, float))[1].mean() for one in drawn[s]]) for s in STRENGTHS
    ]
    assert lightness == sorted(lightness)
    assert min(shares.values()) >= 0.9
