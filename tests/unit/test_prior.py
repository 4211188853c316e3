"""Tests of prior preservation in the loop: mixed batches by hand, and the frozen base's prediction as a target."""

import itertools
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.data import prior
from graft_pack.trainers.data.arrays import from_arrays
from graft_pack.trainers.engine import gradient_check
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.methods import Method
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.preprocessing.prepare import prepare
from graft_pack.trainers.protocols import Conditioning
from graft_pack.trainers.runs.folders import Folders
from graft_pack.trainers.steps import step

from tests.support import models
from tests.support.diffusers_host import (
    WordEncoder,
    make_dataset,
    make_host,
    picture,
    planned,
    run_session,
    same_state,
    same_tensors,
    state_of,
)
from tests.support.diffusers_host import gradient_of as window_gradient

WEIGHT = 0.37


def make_item(index, factor=1.0, anchor=None):
    """Return a sample with its own latent and caption."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(index))

    def show(turn):
        held = None
        if anchor is not None:
            held = Sample(latent, Conditioning(WordEncoder().encode("a picture")), factor=anchor)
        conditioning = Conditioning(WordEncoder().encode(f"picture {index}"))
        return Sample(latent, conditioning, factor=factor, prior_target=held)

    return DatasetItem(f"picture {index}", (64, 64), 1, show, factor != 1.0)


def gradient_of(plan, host, batch):
    """Return (loss, gradient) of one batch of samples on their first visit."""
    return window_gradient(plan, host, [(0, [(index, 0) for index in batch])])[:2]


def by_hand(plan, host, batch, weights):
    """Return (loss, gradient) of (1/B) sum w_i l_i, with each sample predicted alone."""
    shown = [plan.train[index].show(0) for index in batch]
    whole = next(step.micro_batches(shown, replace(plan.recipe, micro_batch=0), host))
    x0, noise, sigma = whole.x0, whole.noise, whole.sigma
    total = torch.zeros(())
    for row, (one, weight) in enumerate(zip(shown, weights, strict=True)):
        part = slice(row, row + 1)
        x_t = x0[part] + sigma[row] * noise[part]
        output = host.denoiser.predict(x_t, sigma[part], [one.conditioning])
        total = total + weight * ((output - noise[part]) ** 2).mean() / len(batch)
    gradient = torch.autograd.grad(total, list(plan.trainables.values()))
    return float(total.detach()), models.joined(gradient)


COMPOSITIONS = [marks for size in (1, 2, 3) for marks in itertools.product([False, True], repeat=size)]


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_the_loss_of_any_mixed_batch_is_the_formula(micro_batch):
    """Every composition of one to three samples: class images with their weight, the others with 1."""
    items = [make_item(0), make_item(1), make_item(2), make_item(3)]
    items += [make_item(10 + index, WEIGHT) for index in range(4)]
    with planned(items, micro_batch=micro_batch) as (plan, host):
        for marks in COMPOSITIONS:
            batch = [4 + place if mark else place for place, mark in enumerate(marks)]
            weights = [WEIGHT if mark else 1.0 for mark in marks]
            loss, gradient = gradient_of(plan, host, batch)
            wanted, slope = by_hand(plan, host, batch, weights)
            assert loss == pytest.approx(wanted, rel=1e-5), marks
            assert models.distance(gradient, slope) <= 1e-4, marks


def test_batches_of_an_epoch_sum_up_to_diffusers_sum_of_means():
    """With as many class images as others, (1/B) sum w_i l_i is half of mean(l) + weight * mean(l_class)."""
    items = [make_item(0), make_item(1), make_item(10, WEIGHT), make_item(11, WEIGHT)]
    with planned(items) as (plan, host):
        shown = [item.show(0) for item in items]
        batch = next(step.micro_batches(shown, plan.recipe, host))
        without_factors = replace(batch, samples=[replace(sample, factor=1.0) for sample in shown])
        plain = step.losses_of(host, without_factors).detach()
        loss = step.losses_of(host, batch).detach().mean()
    assert float(loss) == pytest.approx(float(plain[:2].mean() + WEIGHT * plain[2:].mean()) / 2, rel=1e-6)


# ---- the frozen base's own prediction as a target ---------------------------------------------


def predictions(host, seed=3):
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=source)
    said = [Conditioning(WordEncoder().encode(text)) for text in ("a toy", "a picture of a cup")]
    with torch.no_grad():
        return host.denoiser.predict(x, torch.tensor([0.7, 3.0]), said)


def test_switched_off_the_tree_is_the_frozen_base_to_the_bit():
    host = make_host()
    with host.denoiser.training("auto"):
        base = predictions(host)
    with planned([make_item(0)]) as (plan, host):
        trained = predictions(host)
        with plan.switched_off():
            assert torch.equal(predictions(host), base)
        assert torch.equal(predictions(host), trained)
        assert models.distance(trained, base) > 1e-2
        assert all(parameter.requires_grad for parameter in plan.trainables.values())


def test_a_method_with_nothing_to_switch_off_is_refused():
    """Its target would be its own prediction, the loss would be 0, and nothing would be preserved."""
    method = Method()
    method.name = "bare"
    with (
        pytest.raises(SettingsError, match="bare cannot give the prediction of the frozen base"),
        method.switched_off(torch.nn.Linear(2, 2)),
    ):
        pass


@pytest.mark.parametrize("micro_batch", [0, 1])
def test_anchored_examples_add_the_weighted_distance_from_the_base(micro_batch):
    items = [make_item(0, anchor=WEIGHT), make_item(1), make_item(2, anchor=2 * WEIGHT)]
    fresh = make_host()
    with planned(items, 0.5, micro_batch=micro_batch) as (plan, host):
        loss, gradient = gradient_of(plan, host, [0, 1, 2])
        own, slope = by_hand(plan, host, [0, 1, 2], [1.0, 1.0, 1.0])
        shown = [item.show(0) for item in items]
        whole = next(step.micro_batches(shown, replace(plan.recipe, micro_batch=0), host))
        x0, noise, sigma = whole.x0, whole.noise, whole.sigma
        said = [Conditioning(WordEncoder().encode("a picture"))]
        total = torch.zeros(())
        for row, weight in ((0, WEIGHT), (2, 2 * WEIGHT)):
            x_t = x0[row : row + 1] + sigma[row] * noise[row : row + 1]
            with fresh.denoiser.training("auto"), torch.no_grad():
                base = fresh.denoiser.predict(x_t, sigma[row : row + 1], said)
            output = host.denoiser.predict(x_t, sigma[row : row + 1], said)
            total = total + weight * ((output - base) ** 2).mean() / 3
        held = models.joined(torch.autograd.grad(total, list(plan.trainables.values())))
    drift = float(total.detach())
    assert drift > 0.001 * own
    assert loss - own == pytest.approx(drift, rel=1e-4)
    assert models.distance(gradient, slope + held) <= 1e-4


def test_at_the_start_nothing_has_drifted():
    with planned([make_item(0, anchor=1.0)], spread=0.0) as (plan, host):
        batch = next(step.micro_batches([plan.train[0].show(0)], plan.recipe, host))
        own, drift = list(step.loss_terms(plan, host, batch))
    assert float(drift.detach()) == 0.0
    assert float(own.detach()) > 0.0


def test_the_gradient_of_an_anchored_batch_is_exact():
    with planned([make_item(0, anchor=1.0), make_item(1, WEIGHT)], batch_size=2) as (plan, host):
        gradient_check.check_gradient(lambda: step.batch_loss(plan, host), plan.trainables, gradient_check.TOLERANCE)


# ---- from a dataset to a run ------------------------------------------------------------------


def with_classes(weight=WEIGHT, count=6, others=9):
    rng = torch.Generator().manual_seed(4)
    arrays = [(torch.rand(64, 64, 3, generator=rng) * 255).byte().numpy() for _ in range(others)]
    return prior.add_class_images(make_dataset(count), from_arrays(arrays, ["a picture"], "", 0), weight)


def test_class_images_reach_the_loop_with_weight_and_without_trigger(tmp_path):
    host = make_host()
    dataset = prior.add_prior_target(with_classes(), "a picture of it", 0.25)
    prepared = prepare(dataset, models.recipe("SD1", resolution=64), host, Folders("", str(tmp_path), "", ""))
    assert [item.prior for item in prepared.training] == [False] * 6 + [True] * 9
    encoder = WordEncoder()
    for place, item in enumerate(prepared.training):
        shown = item.show(0)
        text = "a picture" if item.prior else "sks, " + dataset.examples[place].captions[0]
        assert torch.equal(shown.conditioning.tensors["cross_attn"], encoder.encode(text)["cross_attn"])
        assert shown.factor == (WEIGHT if item.prior else 1.0)
        assert (shown.prior_target is None) == item.prior
        if shown.prior_target is not None:
            held = shown.prior_target
            assert torch.equal(held.conditioning.tensors["cross_attn"], encoder.encode("a picture of it")["cross_attn"])
            assert torch.equal(held.latent, shown.latent)
            assert held.factor == 0.25
        assert item.show(None).prior_target is None, "validation measures the subject alone"


@pytest.mark.parametrize("kind", [prior.SEVERAL, prior.BY_CAPTION])
def test_each_visit_gets_a_class_prompt(tmp_path, kind):
    """Several are drawn alike often and the same again; that of a caption follows the visit's own caption."""
    words = {prior.SEVERAL: "a picture|a drawing|", prior.BY_CAPTION: "a thing"}[kind]
    dataset = replace(make_dataset(2), trigger="sks")
    dataset = prior.add_prior_target(dataset, words, 0.25, kind)
    recipe = models.recipe("SD1", resolution=64, steps=60)
    prepared = prepare(dataset, recipe, make_host(), Folders("", str(tmp_path), "", ""))
    encoder = WordEncoder()
    drawn = []
    for visit in range(60):
        shown = prepared.training[0].show(visit)
        own = "a thing, " + dataset.examples[0].captions[0]
        prompts = words.split("|") if kind == prior.SEVERAL else [own]
        held = shown.prior_target.conditioning.tensors["cross_attn"]
        same = [torch.equal(held, encoder.encode(prompt)["cross_attn"]) for prompt in prompts]
        assert sum(same) == 1
        drawn.append(same.index(True))
        again = prepared.training[0].show(visit).prior_target.conditioning.tensors["cross_attn"]
        assert torch.equal(again, held)
    counts = [drawn.count(place) for place in range(len(prompts))]
    assert min(counts) >= 60 / len(prompts) / 2


def test_validation_holds_no_class_image_out(tmp_path):
    recipe = models.recipe("SD1", resolution=64, validation_fraction=0.5)
    prepared = prepare(with_classes(), recipe, make_host(), Folders("", str(tmp_path), "", ""))
    assert len(prepared.validation) == 3
    assert not any(item.prior for item in prepared.validation)
    assert sum(item.prior for item in prepared.training) == 9


@pytest.mark.parametrize("small, words", [(False, "images of the subject"), (True, "class images")])
def test_a_side_of_which_nothing_is_left_is_named(tmp_path, small, words):
    tiny = [picture(torch.rand(4, 4, 3)) for _ in range(2)]
    arrays = [torch.tensor(list(one.tobytes()), dtype=torch.uint8).view(4, 4, 3).numpy() for one in tiny]
    few = from_arrays(arrays, ["a picture"], "", 64)
    pair = (make_dataset(), few) if small else (few, make_dataset())
    dataset = prior.add_class_images(replace(pair[0], trigger=""), pair[1], 1.0)
    with pytest.raises(DatasetError, match=words):
        prepare(dataset, models.recipe("SD1", resolution=64), make_host(), Folders("", str(tmp_path), "", ""))


@pytest.mark.parametrize("kind", ["class images", "anchor"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, kind):
    class Stop(Exception):
        pass

    def report(event, payload):
        if event == "step" and payload["step"] == 5:
            raise Stop

    dataset = with_classes() if kind == "class images" else prior.add_prior_target(make_dataset(), "a picture", WEIGHT)
    fields = {"steps": 9, "batch_size": 3, "dataset": dataset}
    straight = run_session(tmp_path / "straight", **fields)
    with pytest.raises(Stop):
        run_session(tmp_path / "stopped", report, **fields)
    resumed = run_session(tmp_path / "stopped", **fields)
    assert resumed.resumed_from == 5
    assert same_state(state_of(resumed), state_of(straight))
    plain = run_session(tmp_path / "plain", steps=9, batch_size=3)
    assert not same_tensors(plain.adapter, straight.adapter)
    assert plain.run.name != straight.run.name
