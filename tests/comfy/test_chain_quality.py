"""Two trainings of 40 steps, one from the other, do as well as one of 80 on the tiny base."""

from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch

from tests.comfy.test_fine_tune_quality import Pictures, loss_on, make_host
from tests.toy import world

STEPS, HELD_OUT = 40, 16


def toys(count):
    """Return other pictures of the new object than those of its dataset."""
    rng = np.random.RandomState(7)
    backgrounds = [world.BACKGROUNDS[place % len(world.BACKGROUNDS)] for place in range(count)]
    drawn = [world.draw_toy(world.place(rng, "circle", "red", background)) for background in backgrounds]
    return Pictures(drawn, [world.toy_caption(background) for background in backgrounds])


@pytest.fixture(scope="module")
def base(comfy, tiny_base):
    from tests.toy import host

    return host.load(tiny_base, comfy.path)


@pytest.fixture
def train(base, tmp_path):
    """Return train(steps, start), which trains the new object with a constant rate and returns the result."""
    from graft_pack.trainers.data.scan import scan_folder
    from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
    from graft_pack.trainers.engine.session import run_recipe
    from graft_pack.trainers.families import family_of
    from graft_pack.trainers.runs.folders import Folders

    folders = Folders(*(str(tmp_path / name) for name in ("runs", "cache", "loras", "embeddings")))
    dataset = scan_folder(str(world.CONCEPT_FOLDER / "toy"), "", 64, 1)

    def train(steps, start=None):
        recipe = resolve(Options(), family_of("SD1"), RecipeInputs("LoRA", steps, 2e-3, 8, 4, 0, 64, ""))
        with torch.inference_mode(False):
            return run_recipe(recipe, dataset, replace(make_host(*base), start=start), folders)

    return train


@pytest.mark.slow
def test_two_short_trainings_do_as_well_as_a_long_one(base, train, tmp_path, capsys):
    from graft_pack.nodes.host.model.lora import apply_adapter

    long, first = train(2 * STEPS), train(STEPS)
    second = train(STEPS, first.adapter)
    assert second.adapter.keys() == long.adapter.keys()
    model, clip, vae = base
    held_out = toys(HELD_OUT)
    losses = {"before": loss_on(base, held_out, tmp_path / "cache")}
    for name, result in (("one of 80", long), ("first of 40", first), ("second of 40", second)):
        after = (*apply_adapter(model, clip, result.adapter, 1.0, 1.0), vae)
        losses[name] = loss_on(after, held_out, tmp_path / "cache")
    last = {"one": mean(long.losses[-STEPS // 2 :]), "two": mean(second.losses[-STEPS // 2 :])}
    with capsys.disabled():
        print()
        for name, value in losses.items():
            print(f"loss on other pictures, {name:12} {value:.4f}")
        print(f"loss of the last steps, one training {last['one']:.4f}, two {last['two']:.4f}")
    gap = losses["before"] - losses["one of 80"]
    assert abs(losses["second of 40"] - losses["one of 80"]) <= 0.1 * gap
    assert losses["second of 40"] < losses["first of 40"]
    assert abs(last["two"] - last["one"]) <= 0.1 * (mean(long.losses[:4]) - last["one"])
