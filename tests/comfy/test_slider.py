"""Tests of a slider's losses and gradients on the host's own classes, against the paper's equations in float64."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.memory.autograd import OutOfPlace
from graft_pack.trainers.methods import ADAPTERS
from graft_pack.trainers.preprocessing.items import DatasetItem, Poles, Sample
from graft_pack.trainers.steps.slider import DRAW_STEPS, GUIDANCE

from tests.support import models
from tests.support.diffusers_host import gradient_of
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

FAMILIES = ["SD1", "SDXL", "Flux"]
COSMOS = "CosmosT2IPredict2"
STRENGTH = 1.5


def slider_item(name, dtype, has_pictures):
    """Return an item: target 0, positive 1, negative 2, anchor 3, empty prompt 4; or a pair of pictures and anchor."""

    def sample(seed, **more):
        return Sample(latent(8), models.conditioning(name, seed), **more)

    def latent(seed):
        shape = (1, *models.SIZES[name].latent)
        if not has_pictures:
            return torch.zeros(shape, dtype=dtype)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)

    def show(visit):
        if has_pictures:
            return sample(0, prior_target=sample(3), paired=latent(9))
        anchor = sample(3, poles=Poles(None, None, sample(4)))
        return sample(0, prior_target=anchor, poles=Poles(sample(1), sample(2), sample(4)))

    return DatasetItem("slider", (64, 64), 1, show, has_prior_target=True)


@contextmanager
def training(name, dtype=torch.float64, has_pictures=False, checkpointing=False, **fields):
    """Yield a Training of a slider on one item, with random trainables."""
    with torch.inference_mode():
        model = models.patcher(name, dtype)
    fields = {"batch_size": 1, "slider_strength": STRENGTH, **fields}
    with models.in_training(model, name, checkpointing, spread=0.1, **fields) as made:
        item = slider_item(name, dtype, has_pictures)
        yield replace(made, plan=replace(made.plan, train=[item]))


@contextmanager
def at_strength(made, strength):
    """Multiply every B by a strength: W + B A is linear in B. The scale of the adapter stays 1."""
    ups = [vars(layer)["low_rank"].up for layer in made.denoiser.module.modules() if "low_rank" in vars(layer)]
    weights = [up._parameters["weight"] for up in ups]
    for up, weight in zip(ups, weights, strict=True):
        up._parameters["weight"] = strength * weight
    try:
        yield
    finally:
        for up, weight in zip(ups, weights, strict=True):
            up._parameters["weight"] = weight


def draws(made, seed=0):
    """Return (noise, sigma) of the run's first batch, drawn as the step draws them."""
    from graft_pack.trainers.steps.step import micro_batches

    batch = next(micro_batches(made.plan.samples([(0, 0)]), made.plan.recipe, made.host))
    return batch.noise.double(), batch.sigma


def predicted(made, x, sigma, seed):
    # Flux adds in place what autograd has saved.
    with OutOfPlace():
        name = COSMOS if is_cosmos(made) else made.denoiser.family
        return made.denoiser.predict(x, sigma, [models.conditioning(name, seed)])


def is_cosmos(made):
    return made.denoiser.family == "Cosmos-Predict2"


def drawn(made, noise, sigma, seed):
    """Draw with the base from noise to sigma by Euler's method; raw outputs of eps and flow are dx / dsigma.

    Cosmos predicts the flow n - x0 at x = x0 + sigma n, so dx / dsigma = n is (x + output) / (1 + sigma).
    """
    levels = made.denoiser.sigmas()
    last = len(levels) - 1
    path = [float(levels[round(last - step * last / DRAW_STEPS)]) for step in range(DRAW_STEPS + 1)]
    path = [level for level in path if level > float(sigma)] + [float(sigma)]
    x = noise * path[0]
    for level, following in zip(path, path[1:], strict=False):
        at = torch.tensor([level])
        slope = predicted(made, x, at, seed)
        if made.denoiser.family != "Flux":
            plain = predicted(made, x, at, 4)
            slope = plain + GUIDANCE * (slope - plain)
        if is_cosmos(made):
            slope = (x + slope) / (1 + level)
        x = x + slope * (following - level)
    return x


def by_equations(made, has_pictures):
    """Return the loss from the paper's equations: the mean of both directions, and of what the anchors lose there."""
    noise, sigma = draws(made)
    if has_pictures:
        sample = made.plan.train[0].show(0)
        is_flow = made.denoiser.parameterization == "flow"
        rows = []
        for x0 in (sample.latent, sample.paired):
            x = (1 - sigma) * x0 + sigma * noise if is_flow and not is_cosmos(made) else x0 + sigma * noise
            rows.append((x, noise - x0 if is_flow else noise))
        kept = rows[0][0]
    with torch.no_grad(), at_strength(made, 0.0):
        if not has_pictures:
            x = drawn(made, noise, sigma, 0)
            kept = drawn(made, noise, sigma, 3)
            target, up, down = (predicted(made, x, sigma, seed) for seed in (0, 1, 2))
            rows = [(x, target + STRENGTH * (up - down)), (x, target - STRENGTH * (up - down))]
        anchored = predicted(made, kept, sigma, 3)
    total = 0.0
    for strength, (x, target) in zip((STRENGTH, -STRENGTH), rows, strict=True):
        with at_strength(made, strength):
            total = total + 0.5 * ((predicted(made, x, sigma, 0) - target) ** 2).mean()
            total = total + 0.5 * ((predicted(made, kept, sigma, 3) - anchored) ** 2).mean()
    return total


@pytest.mark.parametrize("has_pictures", [False, True], ids=["prompts", "pictures"])
@pytest.mark.parametrize("name", [*FAMILIES, COSMOS])
def test_loss_and_gradient_are_those_of_the_equations(name, has_pictures):
    with training(name, has_pictures=has_pictures) as made, models.float64_throughout(made):
        wanted = by_equations(made, has_pictures)
        slope = models.joined(torch.autograd.grad(wanted, list(made.plan.trainables.values())))
        loss, gradient, _ = gradient_of(made.plan, made.host, [(0, [(0, 0)])])
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert models.distance(gradient, slope) <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_slider_gradients_are_those_of_finite_differences(name):
    with training(name) as made, models.float64_throughout(made):
        for part in "AB":
            parameters = [value for key, value in made.plan.trainables.items() if f"lora_{part}" in key]
            assert directional_error(made.losses, parameters, step=0.005)[0] <= 1e-5


def test_checkpointed_blocks_are_recomputed_at_their_own_strength():
    """Also after the other losses of the step: each backward runs before the next forward."""
    gradients = []
    for checkpointing in (False, True):
        with training("SD1", torch.float32, checkpointing=checkpointing) as made:
            gradients.append(gradient_of(made.plan, made.host, [(0, [(0, 0)])])[1])
    assert models.distance(*gradients) <= 1e-6


@pytest.mark.parametrize(
    "fields",
    [{"offload": "on"}, pytest.param({"compile": "on"}, marks=pytest.mark.slow)],
    ids=["offloaded", "compiled"],
)
def test_memory_options_change_no_slider(fields, tmp_path, monkeypatch):
    from graft_pack.trainers.memory import compilation

    # Without a C++ compiler: trace, and derive the backward.
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    trained = []
    for number, more in enumerate(({}, fields)):
        with training("SD1", torch.float32, steps=2, learning_rate=1e-2, **more) as made:
            state = models.train(made, tmp_path / str(number))
            trained.append(models.joined(state.trainables[name] for name in sorted(state.trainables)))
    assert models.distance(*trained) <= 1e-5


def test_an_error_within_a_step_leaves_the_adapter_at_its_strength():
    def fail(losses, is_last):
        raise RuntimeError("stop")

    with training("SD1", torch.float32) as made:
        from graft_pack.trainers.engine import loop
        from graft_pack.trainers.steps.plan import Window
        from graft_pack.trainers.steps.step import fetch_batch

        noise, sigma = draws(made)
        before = predicted(made, noise.float(), sigma, 0)
        updater = type("Failing", (), {"backward": staticmethod(fail)})
        with pytest.raises(RuntimeError, match="stop") as caught:
            window = Window.of(0, [(0, [(0, 0)])], made.host.group)
            loop.accumulate_gradients(made.plan, made.host, window, updater, partial(fetch_batch, made.plan, made.host))
        # The traceback keeps the frames of the step.
        assert caught.tb is not None
        assert torch.equal(predicted(made, noise.float(), sigma, 0), before)


@pytest.mark.parametrize("kind", [name for name, method in ADAPTERS.items() if method.is_linear])
def test_a_scaled_adapter_is_what_the_host_applies_at_that_strength(kind):
    from graft_pack.nodes.host.model.lora import apply_adapter
    from graft_pack.trainers.formats.adapter import Adapter

    with torch.inference_mode():
        model = models.patcher("SD1")
    point = torch.randn(1, *models.SIZES["SD1"].latent), 2.0, models.conditioning("SD1", 9)
    fields = {"method": kind, "targets": ADAPTERS[kind].default_targets, "alpha": 2.0}
    outputs = {}
    with models.in_training(model, "SD1", spread=0.1, **fields) as made:
        for strength in (-2.0, -0.5, 1.5):
            with made.plan.scaled(strength):
                outputs[strength] = models.trained_denoised(made, *point)
        adapter = Adapter(made.plan.export({k: v.detach() for k, v in made.plan.trainables.items()}, 0).adapter)
        base = models.denoised(model, *point)
        for strength, output in outputs.items():
            applied = models.denoised(apply_adapter(model, None, adapter, strength, strength)[0], *point)
            assert (applied - output).norm() <= 1e-3 * (output - base).norm()


@pytest.mark.parametrize("kind", [name for name, method in ADAPTERS.items() if not method.is_linear])
def test_types_that_do_not_scale_are_refused_by_name(kind):
    from graft_pack.trainers.engine.validation import check_recipe

    recipe = models.recipe("SD1", method=kind, targets="attention", alpha=4.0)
    check_recipe(recipe)
    with pytest.raises(SettingsError, match=kind):
        check_recipe(replace(recipe, slider_strength=1.0))


# ---- the node's texts and pairs ---------------------------------------------------------------


def test_one_line_belongs_to_all_lines_of_the_others():
    from graft_pack.nodes.host.actions.slider import from_prompts

    spec, dataset = from_prompts("a man\na woman", "old", " young ", "a house\n\na tree", 2.0)
    assert spec.prompts == (("a man", "old", "young"), ("a woman", "old", "young"))
    assert (spec.anchors, spec.strength) == (("a house", "a tree"), 2.0)
    assert (dataset.examples, dataset.name) == ((), "slider old")
    assert from_prompts("", "old", "", "", 1.0)[0].prompts == (("", "old", ""),)


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (("a\nb", "c\nd\ne", "f"), "target"),
        (("a", "c", "c"), "positive"),
        (("a", "", ""), "positive"),
        (("",) * 3, "positive"),
    ],
)
def test_wrong_texts_are_refused_at_their_input(texts, named):
    from graft_pack.nodes.host.actions.slider import from_prompts

    with pytest.raises(SettingsError) as caught:
        from_prompts(*texts, "", 1.0)
    assert caught.value.input == named


def pairs(count=2):
    rng = torch.Generator().manual_seed(0)
    arrays = [torch.randint(0, 255, (64, 64, 3), generator=rng, dtype=torch.uint8).numpy() for _ in range(2 * count)]
    dataset = from_arrays(arrays[:count], [""] * count, "", 64)
    others = from_arrays(arrays[count:], [""] * count, "", 64).examples
    rows = zip(dataset.examples, others, strict=True)
    return replace(dataset, examples=tuple(replace(one, control=other) for one, other in rows))


def test_pairs_take_their_captions_from_target_and_repeat_for_each_anchor():
    from graft_pack.nodes.host.actions.slider import from_pairs

    spec, dataset = from_pairs(pairs(), "a shape", "", "", "a house\na tree", 1.0)
    assert spec.prompts == ()
    assert [one.captions for one in dataset.examples] == [("a shape",)] * 4
    assert [one.anchor.prompt for one in dataset.examples] == ["a house"] * 2 + ["a tree"] * 2
    assert all(one.control is None and one.paired is not None for one in dataset.examples)


def test_pictures_without_a_pair_and_texts_beside_them_are_refused():
    from graft_pack.nodes.host.actions.slider import from_pairs

    with pytest.raises(SettingsError, match="positive is set"):
        from_pairs(pairs(), "a shape", "red", "", "", 1.0)
    alone = replace(pairs(), examples=tuple(replace(one, control=None) for one in pairs().examples))
    with pytest.raises(DatasetError, match="control_folder"):
        from_pairs(alone, "a shape", "", "", "", 1.0)
    worse = replace(pairs(), examples=tuple(replace(pair, paired=pair.control) for pair in pairs().examples))
    with pytest.raises(DatasetError, match="worse_folder"):
        from_pairs(worse, "a shape", "", "", "", 1.0)
    wide = [replace(pair, control=replace(pair.control, size=(128, 64))) for pair in pairs().examples]
    with pytest.raises(DatasetError, match="the same shape"):
        from_pairs(replace(pairs(), examples=tuple(wide)), "a shape", "", "", "", 1.0)
