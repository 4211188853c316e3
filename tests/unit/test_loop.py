"""Tests of the loop's arithmetic: what an optimizer step accumulates, clips, averages, measures and refuses."""

from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.errors import NumbersError
from graft_pack.trainers.memory import autograd
from graft_pack.trainers.memory.checkpointing import is_checkpointed, keeps_attention
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION, RECOMPUTED
from graft_pack.trainers.steps import step as forward

from tests.support import models
from tests.support.diffusers_host import (
    DiffusersDenoiser,
    LayeredEncoder,
    gradient_of,
    make_host,
    make_item,
    make_unet,
    run_session,
    same_tensors,
    state_of,
)
from tests.support.diffusers_host import planned as plan_of


def planned(count=6, **fields):
    """Return (plan, host) of some samples on random trainable parameters."""
    return plan_of([make_item(index) for index in range(count)], **fields)


def first_turns(*indices):
    """Return a batch of samples on their first visit."""
    return [(index, 0) for index in indices]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 9])
def test_micro_batches_change_neither_loss_nor_gradient(micro_batch):
    found = []
    for size in (0, micro_batch):
        with planned(micro_batch=size) as (plan, host):
            found.append(gradient_of(plan, host, [(0, first_turns(0, 1, 2, 3))]))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert models.distance(found[1][1], found[0][1]) <= 1e-5


def test_accumulated_batches_give_the_mean_over_their_pictures():
    """It is not the mean over batches: a smaller last batch counts for its own pictures only."""
    with planned() as (plan, host):
        first = gradient_of(plan, host, [(0, first_turns(0, 1, 2, 3))])
        whole = gradient_of(plan, host, [(0, first_turns(0, 1, 2, 3)), (0, first_turns(4, 5))])
        second = mean_over(plan, host, second_part(plan, host))
    assert whole[2] == [f"picture {index}" for index in range(6)]
    assert whole[0] == pytest.approx((4 * first[0] + 2 * second[0]) / 6, rel=1e-6)
    assert models.distance(whole[1], (4 * first[1] + 2 * second[1]) / 6) <= 1e-5


def second_part(plan, host):
    """Return the one micro-batch of the second batch of an accumulation window."""
    shown = [plan.train[4].show(0), plan.train[5].show(0)]
    return next(forward.micro_batches(shown, plan.recipe, host, forward.BatchRows(0, 1)))


def mean_over(plan, host, part):
    """Return (loss, gradient) of the mean over one micro-batch."""
    losses = forward.losses_of(host, part)
    gradient = torch.autograd.grad(losses.mean(), list(plan.trainables.values()))
    return float(losses.detach().mean()), models.joined(gradient)


@pytest.mark.parametrize("recompute", RECOMPUTED)
@pytest.mark.parametrize("checkpointing", ["auto", "on"])
def test_blocks_forget_what_the_recipe_says(checkpointing, recompute, tmp_path):
    """The small network checkpoints nothing by itself."""
    seen = set()
    host = make_host(text=LayeredEncoder())

    def report(event, payload):
        if event == "step":
            blocks = [block for part in (host.denoiser, host.text) for block in autograd.blocks_of(part.module)]
            assert len(blocks) > len(autograd.blocks_of(host.denoiser.module))
            seen.update((is_checkpointed(block), keeps_attention(block)) for block in blocks)

    fields = {"text_encoder": True, "text_encoder_rank": 2, "text_encoder_learning_rate": 1e-3, "steps": 1}
    host_told = replace(host, report=report)
    run_session(tmp_path, host=host_told, checkpointing=checkpointing, recompute=recompute, **fields)
    on = checkpointing == "on"
    assert seen == {(on, on and recompute == ALL_BUT_ATTENTION)}


def test_each_step_and_each_batch_of_it_draws_other_noise():
    with planned() as (plan, host):
        drawn = []
        shown = [item.show(0) for item in plan.train[:2]]
        for step, number in ((0, 0), (0, 1), (1, 0)):
            rows = forward.BatchRows(step, number)
            batch, again = (next(forward.micro_batches(shown, plan.recipe, host, rows)) for _ in range(2))
            assert torch.equal(batch.noise, again.noise)
            assert torch.equal(batch.sigma, again.sigma)
            drawn += [batch.noise[0], batch.noise[1]]
    for index, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:index])


def test_clipping_happens_once_for_an_optimizer_step(tmp_path, monkeypatch):
    """Clipping applies to the whole accumulated gradient, with the requested norm."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, limit, *args, **more):
        before = clip(parameters, limit, *args, **more)
        after = models.joined(p.grad for p in parameters).norm()
        norms.append((float(before), float(after)))
        return before

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    events = []
    run_session(
        tmp_path, lambda event, payload: events.append((event, payload)), steps=3, accumulation=3, max_grad_norm=0.01
    )
    assert len(norms) == 3
    for (before, after), payload in zip(norms, [p for e, p in events if e == "step"], strict=True):
        assert before > 0.01
        assert after == pytest.approx(0.01, rel=1e-3)
        assert payload["grad_norm"] == before


def test_without_a_limit_nothing_is_clipped(tmp_path):
    free = run_session(tmp_path / "free", steps=2, max_grad_norm=0.0)
    wide = run_session(tmp_path / "wide", steps=2, max_grad_norm=1e6)
    assert same_tensors(free.adapter, wide.adapter)


def test_the_average_is_the_one_of_diffusers_formula(tmp_path):
    """The returned adapter is the average."""
    result = run_session(tmp_path, steps=6, ema_decay=0.6, save_every=1, keep_last=100)
    states = {step: result.run.load(step) for step in result.run.states()}
    assert sorted(states) == [1, 2, 3, 4, 5, 6]
    average = states[1].trainables
    for step in range(2, 7):
        decay = min(0.6, step / (9 + step))
        average = {k: decay * average[k] + (1 - decay) * states[step].trainables[k] for k in average}
        for name, value in average.items():
            assert torch.allclose(states[step].ema[name], value, rtol=1e-4, atol=1e-7), (step, name)
    exported = {key for key in result.adapter if not key.endswith("alpha")}
    assert len(exported) == len(states[6].ema)
    values = models.joined(value for _, value in sorted(result.adapter.items()) if value.ndim)
    assert models.distance(values.sort()[0], models.joined(states[6].ema.values()).sort()[0]) == 0


def test_validation_is_repeatable_and_on_pictures_that_are_held_out(tmp_path):
    with planned() as (plan, host):
        items = plan.train[:2]
        first = forward.fixed_losses(items, plan.recipe, host)
        torch.randn(7)
        again = forward.fixed_losses(items, plan.recipe, host)
        other = forward.fixed_losses(items, replace(plan.recipe, seed=1), host)
    assert first.shape == (2, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad


def test_validation_does_not_change_the_training(tmp_path):
    """The same held-out pictures, measured often or once."""
    often = run_session(tmp_path / "often", validation_fraction=0.3, validate_every=1)
    once = run_session(tmp_path / "once", validation_fraction=0.3, validate_every=100)
    assert same_tensors(often.adapter, once.adapter)
    assert [step for step, _ in state_of(often).validation] == [1, 2, 3, 4]
    assert state_of(often).validation[-1:] == state_of(once).validation


class Recording(DiffusersDenoiser):
    """A denoiser that records the captions it saw; each picture has a caption of its own."""

    def __init__(self):
        super().__init__(make_unet())
        self.seen = []

    def predict(self, x_t, sigma, conditioning):
        captions = {one.tensors["cross_attn"].numpy().tobytes() for one in conditioning}
        self.seen.append((torch.is_grad_enabled(), captions))
        return super().predict(x_t, sigma, conditioning)


def test_what_is_held_out_is_not_trained_on(tmp_path):
    host = replace(make_host(), denoiser=Recording())
    run_session(tmp_path, host=host, steps=12, validation_fraction=0.3)
    trained = set().union(*(captions for with_grad, captions in host.denoiser.seen if with_grad))
    # The first call only finds the layers that share an input.
    measured = set().union(*(captions for with_grad, captions in host.denoiser.seen[1:] if not with_grad))
    assert len(trained) == 4
    assert len(measured) == 2
    assert not trained & measured


class Sick(DiffusersDenoiser):
    """A denoiser that returns a value that is not a number at its n-th call with gradients."""

    def __init__(self, number, in_gradient):
        super().__init__(make_unet())
        self.number = number
        self.in_gradient = in_gradient
        self.recorded = 0

    def predict(self, x_t, sigma, conditioning):
        output = super().predict(x_t, sigma, conditioning)
        self.recorded += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or self.recorded != self.number:
            return output
        # The square root's derivative at 0 is infinite: a finite loss with a NaN gradient.
        return output + (output.sum() * 0).sqrt() if self.in_gradient else output * float("nan")


@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
def test_numbers_that_are_none_stop_it_and_leave_the_last_good_state(in_gradient, tmp_path):
    fields = {"steps": 5, "batch_size": 2}
    host = replace(make_host(), denoiser=Sick(4, in_gradient))
    with pytest.raises(NumbersError) as caught:
        run_session(tmp_path / "sick", host=host, **fields)
    message = str(caught.value)
    assert "of step 4" in message
    assert ("gradient" if in_gradient else "loss") in message
    assert message.count("image ") == 2
    assert "learning_rate" in message
    sound = run_session(tmp_path / "sound", **{**fields, "steps": 3})
    kept = run_session(tmp_path / "sick", **{**fields, "steps": 3})
    assert kept.resumed_from == 3
    assert same_tensors(state_of(kept).trainables, state_of(sound).trainables)
    assert all(torch.isfinite(value).all() for value in kept.adapter.values())


def test_numbers_that_are_none_at_the_first_step_leave_nothing(tmp_path):
    host = replace(make_host(), denoiser=Sick(1, False))
    with pytest.raises(NumbersError, match="of step 1 "):
        run_session(tmp_path, host=host)
    assert not list((tmp_path / "loras").rglob("*"))


def test_the_loss_of_an_example_does_not_depend_on_its_batch():
    with planned() as (plan, host):
        shown = [item.show(0) for item in plan.train]
        whole = next(forward.micro_batches(shown, plan.recipe, host))
        losses = forward.losses_of(host, whole).detach()
        for row in range(len(shown)):
            values = (whole.samples, whole.x0, whole.noise, whole.sigma)
            part = forward.MicroBatch(*(value[row : row + 1] for value in values))
            assert models.distance(forward.losses_of(host, part).detach(), losses[row : row + 1]) <= 1e-5


def test_a_mask_weighs_positions():
    """Only white positions count, and a small mask does not shrink the loss."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :2, :3] = 1.0
    with planned() as (plan, host):
        batch = next(forward.micro_batches([plan.train[0].show(0), plan.train[1].show(0)], plan.recipe, host))
        masked = replace(batch, samples=[plan.train[0].show(0), make_item(1, mask).show(0)])
        plain = forward.losses_of(host, batch).detach()
        losses = forward.losses_of(host, masked).detach()
        with torch.no_grad():
            x_t = host.denoiser.add_noise(batch.x0, batch.noise, batch.sigma)
            output = host.denoiser.predict(x_t, batch.sigma, [sample.conditioning for sample in batch.samples])
    assert torch.allclose(losses[0], plain[0])
    assert torch.allclose(losses[1], ((output - batch.noise) ** 2)[1, :, :2, :3].mean())


def test_learning_falls(tmp_path):
    """On one picture at fixed noise the loss falls."""
    with planned(count=1, learning_rate=2e-2, batch_size=1) as (plan, host):
        before = float(forward.fixed_losses(plan.train, plan.recipe, host).mean())
        models.train(models.Training(host.denoiser, host, plan), tmp_path, steps=40)
        after = float(forward.fixed_losses(plan.train, plan.recipe, host).mean())
    assert after < 0.9 * before
