"""Tests of Diffusion-DPO: losses and gradients against the paper's equations in float64, in the loop and on disk."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve, summarize
from graft_pack.trainers.errors import DatasetError, SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.objective import losses as equations
from graft_pack.trainers.objective.options import NATIVE, Objective
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.protocols import HOLE, Conditioning
from graft_pack.trainers.runs.records import log_path
from graft_pack.trainers.steps import step
from graft_pack.trainers.steps.step import pair_losses

from tests.support import kinds, models
from tests.support.diffusers_host import (
    WordEncoder,
    gradient_of,
    make_dataset,
    make_host,
    planned,
    run_session,
    same_state,
    state_of,
)

BETA = 40.0
LEVELS = torch.tensor([0.05, 0.4, 0.9], dtype=torch.float64)


def make_pair(index, weight=None):
    """Return a dataset item of two random latents."""
    source = torch.Generator().manual_seed(index)
    better, worse = torch.randn(2, 1, 4, 8, 8, generator=source)
    conditioning = Conditioning(WordEncoder().encode(f"picture {index}"))
    return DatasetItem(f"pair {index}", (64, 64), 1, lambda visit: Sample(better, conditioning, weight, paired=worse))


def by_the_paper(kind, outputs, base_outputs, x0, noise, t):
    """Return the losses of pairs in float64: equation 14 on the noise that a model's outputs stand for.

    Written with alpha and sigma of the variance-preserving process, and for flow on the path (1 - t) x0 + t noise.

    Args:
        outputs, base_outputs, x0: of better and worse pictures, each a pair of [B, ...].
        t: sigma of each pair, [B].
    """
    squares = []
    for raw, base, clean in zip(outputs, base_outputs, x0, strict=True):
        errors = []
        for output in (raw, base):
            output, clean, n = output.double(), clean.double(), noise.double()
            if kind == "flow":
                errors.append((n - clean - output).square().flatten(1).mean(1))
                continue
            alpha = 1 / (1 + t**2).sqrt().view(-1, 1, 1, 1)
            sigma = t.view(-1, 1, 1, 1) * alpha
            x_t = alpha * clean + sigma * n
            predicted = output if kind == "eps" else alpha * output + sigma * x_t
            errors.append((n - predicted).square().flatten(1).mean(1))
        squares.append(errors[0] - errors[1])
    inside = -0.5 * BETA * (squares[0] - squares[1])
    return -torch.log(1 / (1 + torch.exp(-inside)))


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_losses_and_gradients_are_the_papers(kind):
    source = torch.Generator().manual_seed(3)
    shape = (2, 3, 4, 5, 5)
    x0, outputs, base = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(3))
    noise = torch.randn(shape[1:], generator=source, dtype=torch.float64)
    outputs.requires_grad_(True)
    wanted = by_the_paper(kind, outputs, base, x0, noise, LEVELS)
    target = {
        "eps": lambda clean: noise,
        "v": lambda clean: (noise - LEVELS.view(-1, 1, 1, 1) * clean) / (1 + LEVELS**2).sqrt().view(-1, 1, 1, 1),
        "flow": lambda clean: noise - clean,
    }[kind]
    targets = torch.stack([target(clean) for clean in x0])
    errors, base_errors = ((targets - raw).square().flatten(2).mean(2) for raw in (outputs, base))
    losses = equations.preference_losses(errors, base_errors, equations.noise_error_weights(kind, LEVELS), BETA)
    assert torch.allclose(losses, wanted, rtol=1e-6, atol=0)
    (slope,), (wanted_slope,) = (torch.autograd.grad(one.sum(), outputs) for one in (losses, wanted))
    assert models.distance(slope, wanted_slope) <= 1e-6


@contextmanager
def pairs_in_training(kind="eps", count=3, weights=(None, None, None), **fields):
    """Yield (plan, host, samples) of a preference on a network whose output counts as that parameterization."""
    items = [make_pair(index, weights[index]) for index in range(count)]
    with planned(items, preference_beta=BETA, **fields) as (plan, host):
        host.denoiser.parameterization = kind
        yield plan, host, [item.show(0) for item in items]


NOISY = Objective(noise_offset=0.1, input_perturbation=0.1)


@pytest.mark.parametrize(
    ("kind", "objective"), [("eps", NATIVE), ("v", NATIVE), ("flow", NATIVE), ("eps", NOISY), ("v", NOISY)]
)
def test_the_step_trains_the_papers_loss(kind, objective):
    """Better and worse picture get one noise at one level, and the base predicts without the adapter."""
    with pairs_in_training(kind, objective=objective) as (plan, host, samples):
        batch = next(step.micro_batches(samples, replace(plan.recipe, micro_batch=0), host))
        (losses,) = step.loss_terms(plan, host, batch)
        added = batch.noise if batch.custom is None else batch.custom.added
        said = [sample.conditioning for sample in samples]
        x0 = batch.x0, torch.cat([sample.paired for sample in samples])

        def predict(clean):
            return host.denoiser.predict(host.denoiser.add_noise(clean, added, batch.sigma), batch.sigma, said)

        outputs = [predict(clean) for clean in x0]
        with torch.no_grad(), plan.switched_off():
            base = [predict(clean) for clean in x0]
        wanted = by_the_paper(kind, outputs, base, x0, batch.noise, batch.sigma.double())
        assert torch.allclose(losses.double(), wanted, rtol=1e-4)
        trained = list(plan.trainables.values())
        slope, wanted_slope = (models.joined(torch.autograd.grad(one.sum(), trained)) for one in (losses, wanted))
        assert models.distance(slope, wanted_slope) <= 1e-3


def test_micro_batches_change_neither_loss_nor_gradient():
    found = []
    for size in (0, 1):
        with pairs_in_training(micro_batch=size) as (plan, host, _):
            found.append(gradient_of(plan, host, [(0, [(0, 0), (1, 0), (2, 0)])]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert models.distance(found[1][1], found[0][1]) <= 1e-4


def test_a_mask_limits_both_pictures():
    """Outside the mask, neither picture has a part in the loss; a gradient is left."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1.0
    with pairs_in_training(count=1, weights=(mask,)) as (plan, host, samples):
        batch = next(step.micro_batches(samples, plan.recipe, host))
        losses = pair_losses(plan, host, batch).detach()
        without = pair_losses(plan, host, replace(batch, samples=[replace(samples[0], weight=None)])).detach()
        said = [samples[0].conditioning]
        errors = []
        for clean in (samples[0].latent, samples[0].paired):
            x_t = host.denoiser.add_noise(clean, batch.noise, batch.sigma)
            with torch.no_grad():
                output = host.denoiser.predict(x_t, batch.sigma, said)
                with plan.switched_off():
                    base = host.denoiser.predict(x_t, batch.sigma, said)
            errors.append([(one - batch.noise)[..., :4].square().mean() for one in (output, base)])
        (better, better_base), (worse, worse_base) = errors
        z = -BETA / 2 * ((better - better_base) - (worse - worse_base))
    assert float(losses) == pytest.approx(float(-torch.nn.functional.logsigmoid(z)), rel=1e-3)
    assert abs(float(losses - without)) > 1e-3


def test_implicit_accuracy_counts_half_of_the_ties():
    z = torch.tensor([2.0, 1e-3, 0.0, -1e-3])
    losses = equations.preference_losses(torch.stack([-z, 0 * z]), torch.zeros(2, 4), torch.ones(4), 2.0)
    assert equations.implicit_accuracy(losses.tolist()) == 2.5 / 4


def events_of(result):
    with open(log_path(result.run), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


LOGGED = {"steps": 6, "validation_fraction": 0.2, "validate_every": 3, "preference_beta": 1e4}


@pytest.mark.parametrize("fields", [{}, kinds.ALL], ids=["LoRA", "all weights"])
def test_the_first_step_compares_the_base_with_itself(fields, tmp_path):
    """Neither picture is preferred, the loss is log 2; later the log has the share of pairs that are preferred."""
    told = []
    host = make_host(lambda event, payload: told.append((event, payload)))
    result = run_session(tmp_path, host=host, dataset=kinds.in_pairs(make_dataset()), **{**LOGGED, **fields})
    assert result.losses[0] == pytest.approx(math.log(2), rel=1e-6)
    steps = [event for event in events_of(result) if event["event"] == "step"]
    assert steps[0]["accuracy"] == 0.5
    assert max(abs(loss - math.log(2)) for loss in result.losses[1:]) > 1e-4
    assert all(0 <= event["accuracy"] <= 1 for event in steps)
    validated = [event for event in events_of(result) if event["event"] == "validation"]
    assert [0 <= event["accuracy"] <= 1 for event in validated] == [True, True]
    sent = [payload["accuracy"] for event, payload in told if event == "step"]
    assert sent == [event["accuracy"] for event in steps]


def test_other_trainings_log_no_accuracy(tmp_path):
    result = run_session(tmp_path, steps=2, validation_fraction=0.2, validate_every=1)
    assert all("accuracy" not in event for event in events_of(result))


@pytest.mark.parametrize("fields", [{}, kinds.ALL], ids=["LoRA", "all weights"])
def test_a_preference_resumes_to_the_bit(fields, tmp_path):
    class Stopped(BaseException):
        pass

    def stop(event, payload):
        if event == "step" and payload["step"] == 3:
            raise Stopped

    dataset, fields = kinds.in_pairs(make_dataset()), {**LOGGED, "batch_size": 2, **fields}
    straight = run_session(tmp_path / "straight", dataset=dataset, **fields)
    with pytest.raises(Stopped):
        run_session(tmp_path / "cut", stop, dataset=dataset, **fields)
    resumed = run_session(tmp_path / "cut", dataset=dataset, **fields)
    assert resumed.resumed_from == 3
    assert same_state(state_of(resumed), state_of(straight))


def recipe_with(options=None, method="LoRA", rank=4, beta=BETA):
    inputs = RecipeInputs(method, 10, 0.0, rank, 1, 0, 64, "", preference_beta=beta)
    return resolve(options or Options(), family_of("SD1"), inputs)


def test_beta_is_part_of_the_identity_and_its_absence_is_not():
    plain, first, second = recipe_with(beta=0.0), recipe_with(), recipe_with(beta=2 * BETA)
    assert "preference_beta" not in plain.deciding()
    assert len({recipe.identity("d", "b") for recipe in (plain, first, second)}) == 3
    assert "preference with beta 40" in summarize(first)
    assert "preference" not in summarize(plain)


def test_a_preference_takes_a_tenth_of_the_usual_rate():
    assert recipe_with().learning_rate == pytest.approx(1e-5)
    assert recipe_with(method="all weights", rank=0).learning_rate == pytest.approx(5e-7)
    assert recipe_with(beta=0.0).learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("node", "values", "message"),
    [
        ("objective", {"weighting": "min-SNR"}, "weighting is min-SNR, but a preference has a loss of its own"),
        ("objective", {"loss": "Huber"}, "loss is Huber, but a preference has a loss of its own"),
        ("pivotal", {"name": "my-word", "init_text": "dog"}, "does not know the embedding of Graft Pivotal Options"),
    ],
)
def test_options_that_a_preference_cannot_follow_are_refused(node, values, message):
    options = Options().adding(node, values)
    recipe_with(options, beta=0.0)
    with pytest.raises(SettingsError, match=message):
        recipe_with(options)


def test_pairs_and_preference_need_each_other(tmp_path):
    pairs = kinds.in_pairs(make_dataset())
    with pytest.raises(DatasetError, match="has worse pictures, but this training does not compare"):
        run_session(tmp_path, dataset=pairs)
    bare = replace(pairs, examples=(*pairs.examples[1:], replace(pairs.examples[0], paired=None)))
    with pytest.raises(DatasetError, match="1 of 6 pictures have no worse picture to compare with: image 1"):
        run_session(tmp_path, dataset=bare, preference_beta=BETA)
    host = make_host()
    host.denoiser.conditioning_kind = HOLE
    with pytest.raises(DatasetError, match="inpainting model .* sees the better picture"):
        run_session(tmp_path, dataset=pairs, host=host, preference_beta=BETA)
