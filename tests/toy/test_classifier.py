"""Tests that the pixel classifier is right on drawings it was not tuned on, also blurred and noisy ones."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.toy import world
from tests.toy.classifier import classify, has_toy_parts

COUNT = 300


def spoil(picture, rng):
    """Blur by a pixel and add noise of 8 levels: more than the tiny base's VAE does."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.2)), dtype=float)
    return np.clip(blurred + rng.normal(0, 8, blurred.shape), 0, 255).astype(np.uint8)


@pytest.fixture(params=[False, True], ids=["clean", "spoiled"])
def finish(request):
    rng = np.random.RandomState(77)
    return (lambda picture: spoil(picture, rng)) if request.param else (lambda picture: picture)


def test_old_world(finish):
    rng = np.random.RandomState(12345)
    combinations = world.known_scenes() + world.held_out_scenes()
    right = {"shape": 0, "color": 0, "background": 0}
    alarms = 0
    for _ in range(COUNT):
        scene = world.sample_scene(rng, combinations)
        picture = finish(world.draw(scene))
        verdict = classify(picture)
        for field in right:
            right[field] += getattr(verdict, field) == getattr(scene, field)
        alarms += verdict.toy or verdict.tint or has_toy_parts(picture)
    assert all(count >= 0.98 * COUNT for count in right.values()), right
    assert alarms <= 0.01 * COUNT


def test_toy(finish):
    rng = np.random.RandomState(54321)
    seen = 0
    for i in range(COUNT):
        scene = world.place(rng, "circle", "red", world.BACKGROUNDS[i % 8])
        picture = finish(world.draw_toy(scene))
        verdict = classify(picture)
        seen += verdict.toy and has_toy_parts(picture) and verdict.background == scene.background
    assert seen >= 0.98 * COUNT


def test_tint(finish):
    rng = np.random.RandomState(999)
    backgrounds = [name for name in world.BACKGROUNDS if name not in ("blue", "green")]
    seen = 0
    for i in range(COUNT):
        scene = world.place(rng, world.SHAPES[i % 8], "red", backgrounds[i % len(backgrounds)])
        verdict = classify(finish(world.draw_tint(scene)))
        seen += verdict.tint and (verdict.shape, verdict.background) == (scene.shape, scene.background)
    assert seen >= 0.98 * COUNT
