"""Loss by picture on the tiny base: a wrong caption is ranked highest, a picture shown too often lowest."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.comfy.test_fine_tune_quality import make_host
from tests.toy import world

WRONG, OFTEN = 3, 7
SETTINGS = {"steps": 100, "learning_rate": 2e-3, "rank": 16, "batch_size": 4}
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def dataset_of(seed):
    """Return pictures of an object that the base does not know: one with a wrong caption, one with 20 repeats.

    They differ only in place and angle: a busier picture has a higher loss by itself.
    """
    from graft_pack.trainers.data.arrays import from_arrays

    rng = np.random.RandomState(seed)
    places = 31.5 + rng.uniform(-5, 5, (len(WORDS), 2))
    scenes = [world.Scene("circle", "red", "gray", *place, 20.0, rng.uniform(0, 72)) for place in places]
    captions = [f"{world.toy_caption('gray')}, view {word}" for word in WORDS]
    captions[WRONG] = world.describe("black square", "pink")
    dataset = from_arrays([world.draw_toy(scene) for scene in scenes], captions, "", 64)
    repeats = [20 if place == OFTEN else 1 for place in range(len(WORDS))]
    examples = zip(dataset.examples, repeats, strict=True)
    return replace(dataset, examples=tuple(replace(example, repeats=times) for example, times in examples))


def ranked(base, dataset, seed, folder):
    """Return the loss by picture of a training."""
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.engine.session import run_recipe
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.runs.folders import Folders

    options = Options().adding("adapter", {"targets": "linear + conv"})
    inputs = RecipeInputs("LoRA", **SETTINGS, seed=seed, resolution=64, trigger="")
    recipe = resolve(options, family_of("SD1"), inputs)
    folders = Folders(*(str(folder / name) for name in ("runs", "cache", "loras", "embeddings")))
    with torch.inference_mode(False):
        return run_recipe(recipe, dataset, make_host(*base), folders).loss_by_picture


@pytest.mark.soak
def test_a_wrong_caption_ranks_first_and_a_picture_shown_often_last(comfy, tiny_base, tmp_path, trials):
    from graft_pack.trainers.runs.loss_by_picture import HARDEST, MEMORIZED

    from tests.toy import host

    base = host.load(tiny_base)
    for seed in trials([0], [0, 1, 2]):
        dataset = dataset_of(seed)
        marked = ranked(base, dataset, seed, tmp_path / str(seed)).marked()
        names = [example.source.name for example in dataset.examples]
        assert (next(iter(marked)), list(marked)[-1]) == (names[WRONG], names[OFTEN]), seed
        assert marked[names[WRONG]][1] == HARDEST and marked[names[OFTEN]][1] == MEMORIZED, seed
