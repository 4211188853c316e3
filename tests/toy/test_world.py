"""Tests that the toy world is reproducible from a seed, and that the shipped concept sets equal the script's."""

import numpy as np
from PIL import Image

from tests.toy import text, world


def test_a_seed_gives_the_same_pictures():
    pictures = [world.draw(world.sample_scene(np.random.RandomState(3), world.known_scenes())) for _ in range(2)]
    assert np.array_equal(*pictures)


def test_held_out_pairs_are_never_trained_on():
    trained = {(shape, color) for shape, color, _ in world.known_scenes()}
    assert not trained & set(world.HELD_OUT)
    assert {shape for shape, _ in trained} == set(world.SHAPES)
    assert {color for _, color in trained} == set(world.COLORS)


def test_shipped_concepts_are_what_the_script_draws():
    for name in world.CONCEPTS:
        folder = world.CONCEPT_FOLDER / name
        drawn = list(world.concept_pictures(name))
        assert len(list(folder.glob("*.png"))) == len(drawn) == 8
        for i, (picture, caption) in enumerate(drawn):
            with Image.open(folder / f"{i:02d}.png") as shipped:
                assert np.array_equal(np.asarray(shipped.convert("RGB")), picture)
            assert (folder / f"{i:02d}.txt").read_text(encoding="utf-8").strip() == caption


def test_every_caption_has_known_tokens():
    scenes = [world.Scene(*combination) for combination in world.known_scenes() + world.held_out_scenes()]
    concepts = [caption for name in world.CONCEPTS for _, caption in world.concept_pictures(name)]
    for caption in [world.caption(s) for s in scenes] + concepts:
        assert len(text.tokenize(caption)) == text.POSITIONS
