"""Tests of full fine-tuning: updates within the backward, bit-identical save and resume, stochastic rounding."""

import json
import os

import pytest
import torch
from graft_pack.trainers.engine import accumulation, updater
from graft_pack.trainers.errors import NumbersError, OutOfMemory
from graft_pack.trainers.optimizers import OPTIMIZERS, per_parameter
from graft_pack.trainers.optimizers.per_parameter import round_stochastically

from tests.support import models
from tests.support.diffusers_host import make_dataset, make_host, make_unet, run_session, same_state, same_tensors
from tests.support.diffusers_host import state_of as kept_state

ALL = {
    "method": "all weights",
    "rank": 0,
    "alpha": 0.0,
    "targets": "all weights",
    "max_grad_norm": 0.0,
    "learning_rate": 1e-3,
}
# Every option that has state and works with updates within the backward.
KEPT = {
    **ALL,
    "steps": 6,
    "batch_size": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "ema_decay": 0.9,
    "validation_fraction": 0.2,
    "validate_every": 2,
    "save_every": 2,
    "preview_prompts": ("a red picture",),
    "preview_every": 3,
    "preview_steps": 2,
}
APART = [name for name, kind in OPTIMIZERS.items() if kind.per_parameter]


class Cancelled(BaseException):
    """A cancellation as newer hosts raise it: not an Exception."""


class Stopper:
    """A report that raises at the n-th of all events, and records them."""

    def __init__(self, number=-1):
        self.number = number
        self.events = []

    def __call__(self, event, payload):
        self.events.append((event, payload))
        if len(self.events) - 1 == self.number:
            raise Cancelled


@pytest.fixture
def updaters(monkeypatch):
    """Return the list of a test's parameter updaters."""
    made = []
    real = updater.ParameterUpdater.__init__

    def noting(self, *args):
        real(self, *args)
        made.append(self)

    monkeypatch.setattr(updater.ParameterUpdater, "__init__", noting)
    return made


def afterwards(folder, monkeypatch, **fields):
    """Run with one ordinary optimizer for all parameters."""
    with monkeypatch.context() as patch:
        patch.setattr(updater, "_is_one_backward", lambda *given: False)
        return run_session(folder, **fields)


def distance(a, b):
    """Return the largest difference between two dicts of tensors over the largest absolute value."""
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def names_of():
    return [name for name, _ in make_unet().named_parameters()]


def dict_of(result):
    return kept_state(result).trainables


def norms(result):
    with open(os.path.join(result.run.folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line["grad_norm"] for line in lines if line["event"] == "step"]


@pytest.mark.parametrize("name", APART)
def test_within_the_backward_comes_to_the_same(name, updaters, tmp_path, monkeypatch):
    kind = OPTIMIZERS[name]
    fields = {**ALL, "optimizer": name, "beta1": kind.beta1, "beta2": kind.beta2, "steps": 4, "batch_size": 2}
    fields |= {"schedule": "cosine", "warmup_steps": 1, "block_learning_rates": (("up_blocks", 1e-4),)}
    within = run_session(tmp_path / "within", **fields)
    after = afterwards(tmp_path / "after", monkeypatch, **fields)
    assert [updater.in_backward for updater in updaters] == [True, False]
    assert isinstance(updaters[0].optimizer, per_parameter.PerParameterOptimizer) and not isinstance(
        updaters[1].optimizer, per_parameter.PerParameterOptimizer
    )
    first, second = kept_state(within), kept_state(after)
    assert distance(first.trainables, second.trainables) <= 1e-6
    assert norms(within) == pytest.approx(norms(after), rel=1e-5)
    assert within.losses == pytest.approx(after.losses, rel=1e-5)
    # Both ways save the same state, so a run can resume either way.
    assert first.optimizer.keys() == second.optimizer.keys()
    assert [slots.keys() for slots in first.optimizer.values()] == [slots.keys() for slots in second.optimizer.values()]
    assert first.groups == second.groups


def test_gradients_never_lie_beside_one_another(tmp_path, monkeypatch):
    seen = []
    real = per_parameter.PerParameterOptimizer.move

    def counting(self, parameter):
        seen.append(sum(one.grad is not None for one in self._own))
        real(self, parameter)
        assert parameter.grad is None

    monkeypatch.setattr(per_parameter.PerParameterOptimizer, "move", counting)
    run_session(tmp_path, **ALL, steps=2, batch_size=2)
    assert len(seen) == 2 * len(list(make_unet().parameters()))
    # A weight and its bias may arrive together, because one product creates both.
    assert max(seen) <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"max_grad_norm": 1.0},
        {"accumulation": 2},
        {"micro_batch": 1},
        {"optimizer": "Prodigy", "learning_rate": 1.0},
        {"optimizer": "AdamWScheduleFree"},
        {"method": "LoRA", "targets": "attention", "rank": 4, "alpha": 4.0},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_where_it_would_not_be_the_same_all_move_together(fields, updaters, tmp_path):
    run_session(tmp_path, **{**ALL, "batch_size": 2, "steps": 1, **fields})
    assert not updaters[0].in_backward


def test_beside_anchors_and_under_loss_scaling_all_move_together(updaters, tmp_path):
    from graft_pack.trainers.data import prior

    anchored = prior.add_prior_target(make_dataset(), "a picture", 1.0)
    run_session(tmp_path, dataset=anchored, **ALL, batch_size=2, steps=1)
    host = make_host()
    host.denoiser.compute_dtype = torch.float16
    run_session(tmp_path / "half", host=host, **ALL, batch_size=2, steps=1)
    assert [updater.in_backward for updater in updaters] == [False, False]


def test_differential_preservation_asks_the_frozen_base(tmp_path, monkeypatch):
    """Before the first step the drift is exactly zero; later it is not, and the prior loss limits it."""
    from graft_pack.trainers.data import prior
    from graft_pack.trainers.steps import step as forward

    drifts = []
    real = forward.prior_losses

    def noting(*args):
        found = real(*args)
        drifts.append(float(found.detach().sum()))
        return found

    monkeypatch.setattr(forward, "prior_losses", noting)
    result = run_session(
        tmp_path, dataset=prior.add_prior_target(make_dataset(), "a picture", 1.0), **ALL, batch_size=2, steps=3
    )
    assert drifts[0] == 0.0 and min(drifts[1:]) > 0
    assert result.losses[1] > drifts[1] / 2


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def straight(request, tmp_path_factory):
    """Return (fields, events, result) of an uninterrupted run."""
    fields = {**KEPT, "weight_dtype": request.param}
    watcher = Stopper()
    result = run_session(tmp_path_factory.mktemp("straight"), watcher, **fields)
    return fields, [event for event, _ in watcher.events], result


def test_stopped_at_any_event(straight, tmp_path, trials):
    fields, events, expected = straight
    places = {0, len(events) - 1, *range(1, len(events), max(1, len(events) // trials(4, len(events))))}
    for number in sorted(places):
        folder = tmp_path / str(number)
        with pytest.raises(Cancelled):
            run_session(folder, Stopper(number), **fields)
        resumed = run_session(folder, **fields)
        assert same_state(kept_state(resumed), kept_state(expected)), f"stopped at event {number}, {events[number]}"
        assert same_tensors(resumed.adapter, expected.adapter)
        assert resumed.losses == expected.losses


def test_cancelled_keeps_the_step_that_was_reached(straight, tmp_path):
    fields, events, _ = straight
    number = [place for place, event in enumerate(events) if event == "step"][4]
    with pytest.raises(Cancelled):
        run_session(tmp_path, Stopper(number), **fields)
    assert run_session(tmp_path, **fields).resumed_from == 5


@pytest.mark.parametrize("where", [1, 40])
def test_a_step_that_fails_within_the_backward_is_not_kept(where, straight, tmp_path, monkeypatch):
    fields, _, expected = straight
    real = per_parameter.PerParameterOptimizer.move
    per_step = len(list(make_unet().parameters()))
    calls = []

    def failing(self, parameter):
        real(self, parameter)
        calls.append(1)
        if len(calls) == 3 * per_step + where:
            raise torch.OutOfMemoryError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(per_parameter.PerParameterOptimizer, "move", failing)
        with pytest.raises(OutOfMemory, match="had already updated some weights"):
            run_session(tmp_path, **fields)
    resumed = run_session(tmp_path, **fields)
    assert resumed.resumed_from == 2
    assert same_state(kept_state(resumed), kept_state(expected))


@pytest.mark.parametrize("what, kept", [("loss", 3), ("gradient", 2)])
def test_numbers_that_are_none_move_nothing_that_is_kept(what, kept, straight, tmp_path, monkeypatch):
    """The loss is checked before any update, a gradient after some updates; in that case the last save stands."""
    fields, _, expected = straight
    steps = []
    real = updater.ParameterUpdater.begin

    def spoiling(self, step, highest):
        real(self, step, highest)
        steps.append(step)
        if step == 3 and what == "gradient":
            middle = self._parameters[len(self._parameters) // 2]
            middle.register_hook(lambda gradient: gradient * float("nan"))

    def terms(*args, **kwargs):
        for losses in loop_terms(*args, **kwargs):
            yield losses * float("nan") if what == "loss" and steps[-1] == 3 else losses

    loop_terms = accumulation.loss_terms
    with monkeypatch.context() as patch:
        patch.setattr(updater.ParameterUpdater, "begin", spoiling)
        patch.setattr(accumulation, "loss_terms", terms)
        with pytest.raises(NumbersError, match=f"{what} of step 4 is not finite .pictures: .*image"):
            run_session(tmp_path, **fields)
    resumed = run_session(tmp_path, **fields)
    assert resumed.resumed_from == kept
    assert same_state(kept_state(resumed), kept_state(expected))


@pytest.mark.parametrize("first, then", [(0, 1), (1, 0)], ids=["within, then after", "after, then within"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Adafactor", "AdamW8bit"])
def test_a_run_goes_on_the_other_way(optimizer, first, then, updaters, tmp_path):
    """For example after out-of-memory set micro_batch: the optimizer state is stored per parameter."""
    kind = OPTIMIZERS[optimizer]
    fields = {**ALL, "optimizer": optimizer, "beta1": kind.beta1, "beta2": kind.beta2, "batch_size": 2}
    run_session(tmp_path, **fields, steps=3, micro_batch=first)
    resumed = run_session(tmp_path, **fields, steps=5, micro_batch=then)
    whole = run_session(tmp_path / "whole", **fields, steps=5)
    assert resumed.resumed_from == 3
    assert [updater.in_backward for updater in updaters] == [not first, not then, True]
    # AdamW makes long steps from gradients that are pure rounding error.
    base = models.joined(make_unet().parameters())
    moves = [models.joined(map(dict_of(result).get, names_of())) - base for result in (resumed, whole)]
    assert models.distance(*moves) <= 5e-3


def test_the_average_is_what_is_handed_on(tmp_path):
    result = run_session(tmp_path, **{**ALL, "ema_decay": 0.99, "steps": 3, "batch_size": 2})
    base = dict(make_unet().named_parameters())
    state = kept_state(result)
    assert not same_tensors(state.ema, state.trainables)
    assert len(result.adapter) == len(base)
    for name, value in state.ema.items():
        path, _, leaf = name.rpartition(".")
        key = f"model.{path}.{'diff_b' if leaf == 'bias' else 'diff'}"
        assert torch.equal(result.adapter[key], value - base[name].detach())


def test_a_finished_run_is_returned_without_work(tmp_path):
    first = run_session(tmp_path, **KEPT)
    kept = {name: tensor.clone() for name, tensor in first.adapter.items()}
    host = make_host()
    again = run_session(tmp_path, host=host, **KEPT)
    assert host.denoiser.calls == 0
    assert same_tensors(again.adapter, kept)


def test_the_adapters_file_is_the_run_result(tmp_path):
    from graft_pack.trainers.formats.adapter import Adapter, load_adapter

    result = run_session(tmp_path, **{**ALL, "steps": 2, "save_every": 1})
    files = sorted(os.listdir(result.run.adapters))
    assert files == ["step-00000001.safetensors", "step-00000002.safetensors"]
    read = load_adapter(os.path.join(result.run.adapters, files[-1]))
    assert same_tensors(read, result.adapter)
    # The graph passes on an adapter like any other: complete, with its own description.
    assert type(result.adapter) is Adapter
    assert result.adapter.metadata.items() <= read.metadata.items()
    assert read.made_by() == "all weights"
    assert read.metadata["modelspec.architecture"] == "stable-diffusion-v1/difference"


def test_learning_rate_zero_moves_no_weight(tmp_path):
    result = run_session(tmp_path, **{**ALL, "learning_rate": 0.0, "steps": 2})
    assert result.adapter and not any(tensor.any() for tensor in result.adapter.values())


# ---- rounding ------------------------------------------------------------------------------


def moved(weight_dtype, small, steps=100):
    """Return the mean relative change of weights of about 1 after that many small steps of a plain optimizer."""
    dtype = torch.bfloat16 if weight_dtype == "bf16" else torch.float32
    source = torch.Generator().manual_seed(1)
    start = (1 + torch.rand(4096, generator=source)).bfloat16()
    parameter = torch.nn.Parameter(start.to(dtype, copy=True))
    sgd = _Sgd()
    optimizer = per_parameter.PerParameterOptimizer(
        sgd, [{"params": [parameter], "lr": small}], {parameter: "w"}, _Seed()
    )
    for step in range(steps):
        optimizer.begin(step)
        parameter.grad = -parameter.detach()
        optimizer.step()
    return float((parameter.detach().float() / start.float()).mean() - 1), parameter


class _Seed:
    seed = 7


class _Sgd:
    def make(self, groups, recipe):
        return torch.optim.SGD(groups, lr=1.0)


def test_small_steps_are_made_in_bfloat16_as_in_float32(monkeypatch):
    """100 steps of 1e-4 of the weight, a fortieth of the distance between two neighboring bfloat16 values."""
    exact, _ = moved("fp32", 1e-4)
    assert exact == pytest.approx(1.0001**100 - 1, rel=1e-3)
    found, _ = moved("bf16", 1e-4)
    # 4096 weights, each with a deviation of about 4e-3 after a hundred roundings.
    assert found == pytest.approx(exact, abs=5 * 4e-3 / 64)
    # With rounding to nearest, each step is lost entirely.
    monkeypatch.setattr(per_parameter, "round_stochastically", lambda values, source: values.bfloat16())
    assert moved("bf16", 1e-4)[0] == 0.0


def test_rounding_is_to_a_neighbor_and_right_in_the_mean():
    source = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(500) * scale for scale in (1e-30, 1e-3, 1.0, 1e4)] + [torch.zeros(2)])
    drawn = torch.stack([round_stochastically(values, source).float() for _ in range(400)])
    gap = values.abs() * 2**-7
    assert ((drawn - values).abs() <= gap).all()
    # The standard deviation is at most half the gap; the mean of 400 draws lies within five of its deviations.
    assert ((drawn.mean(0) - values).abs() <= 5 * gap / 2 / 20 + 1e-38).all()
    exact = values.bfloat16().float()
    assert torch.equal(round_stochastically(exact, source).float(), exact)
    between = (values != exact).float().mean()
    assert between > 0.9 and (drawn.var(0) > 0).float().mean() > 0.7


def test_rounding_is_drawn_from_seed_step_and_parameter_alone():
    again = [moved("bf16", 1e-4, steps=3)[1].detach() for _ in range(2)]
    assert torch.equal(*again)
    found = []
    for name, step, seed in (("w", 0, 7), ("v", 0, 7), ("w", 1, 7), ("w", 0, 8)):
        parameter = torch.nn.Parameter(torch.ones(999).bfloat16())
        settings = _Seed()
        settings.seed = seed
        optimizer = per_parameter.PerParameterOptimizer(
            _Sgd(), [{"params": [parameter], "lr": 1e-3}], {parameter: name}, settings
        )
        optimizer.begin(step)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append(parameter.detach())
    assert not any(torch.equal(found[0], other) for other in found[1:])


def test_the_average_of_bfloat16_weights_is_kept_in_float32(tmp_path):
    result = run_session(tmp_path, **{**ALL, "weight_dtype": "bf16", "ema_decay": 0.9, "steps": 2, "batch_size": 2})
    state = kept_state(result)
    assert {tensor.dtype for tensor in state.trainables.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.ema.values()} == {torch.float32}
    assert any((tensor != tensor.bfloat16()).any() for tensor in state.ema.values())
