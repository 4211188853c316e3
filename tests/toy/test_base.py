"""Tests that the tiny base draws its prompts through the real host, including pairs it has never seen together."""

import pytest

from tests.toy import evaluate, host, world
from tests.toy.classifier import classify


@pytest.fixture(scope="module")
def loaded(comfy, tiny_base):
    return host.load(tiny_base, comfy.path)


@pytest.mark.soak
def test_held_out_combinations(loaded, trials, sampler_steps):
    combinations = evaluate.choose(world.held_out_scenes(), trials(32, 64), seed=0)
    _, shares = evaluate.evaluate(*loaded, combinations, seed=0, steps=sampler_steps)
    assert all(shares[name] >= bar for name, bar in evaluate.BAR.items()), shares
    assert shares["toy"] <= 0.01, shares
    assert shares["tint"] <= 0.02, shares


@pytest.mark.soak
def test_the_toy_is_unknown(loaded, trials, sampler_steps):
    prompts = [world.toy_caption(name) for name in world.BACKGROUNDS] * trials(1, 2)
    pictures = host.generate(*loaded, prompts, seed=1, steps=sampler_steps)
    assert sum(classify(picture).toy for picture in pictures) <= 0.05 * len(pictures)
