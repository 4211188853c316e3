"""Tests of the adapter's gradients through each architecture, against finite differences."""

import re
from contextlib import nullcontext

import pytest
import torch
from graft_pack.trainers.engine.gradient_check import check_gradient
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.memory import checkpointing as blocks
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION, RECOMPUTED
from graft_pack.trainers.rng import generator
from graft_pack.trainers.steps import predict
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import models
from tests.support.gradients import directional_error

pytestmark = pytest.mark.usefixtures("comfy")

# By dtype: the bar, and the finite-difference step at which its rounding error and its curvature error are both at most
# a fifth of the bar.
BARS = {torch.float64: (1e-5, 0.005), torch.float32: (1e-3, 0.2)}


def make_model(name, dtype, seed=0):
    """Return a model as the graph has it: loaded under inference mode, so its weights are inference tensors."""
    with torch.inference_mode():
        return models.patcher(name, dtype, seed)


def error_of(training, part, step):
    """Return the relative error of the derivative along one direction of all A or all B."""
    parameters = [value for name, value in training.plan.trainables.items() if f"lora_{part}" in name]
    error, _ = directional_error(training.losses, parameters, step=step)
    return error


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dtype", BARS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_gradients_are_those_of_finite_differences(name, dtype, checkpointing):
    bar, step = BARS[dtype]
    with models.in_training(make_model(name, dtype), name, checkpointing, spread=0.1) as training:
        with models.float64_throughout(training) if dtype is torch.float64 else nullcontext():
            assert error_of(training, "A", step) <= bar
            assert error_of(training, "B", step) <= bar


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_checkpointing_changes_no_gradient(name):
    found = []
    for checkpointing in (False, True):
        with models.in_training(make_model(name, torch.float32), name, checkpointing, spread=0.1) as training:
            found.append(models.joined(training.gradients()))
    assert models.distance(found[1], found[0]) <= 1e-6


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_checkpointing_forgets_activations(name):
    """Fewer tensors are saved for the backward with checkpointing; otherwise the switch does nothing."""
    kept = []
    for checkpointing in (False, True):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with models.in_training(make_model(name, torch.float32), name, checkpointing, spread=0.1) as training:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                training.losses()
        kept.append(total)
    assert kept[1] < 0.5 * kept[0]


class Attentions(TorchDispatchMode):
    """Counter of forward attention computations within its block, the backward included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.count += "_scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_attention_that_is_kept_is_computed_once_and_changes_no_bit(name):
    found, counts = [], []
    for fields in (None, {}, {"recompute": ALL_BUT_ATTENTION}):
        made = make_model(name, torch.float32)
        with models.in_training(made, name, fields is not None, 0.1, **(fields or {})) as training:
            with Attentions() as attentions:
                found.append(models.joined(training.gradients()))
        counts.append(attentions.count)
    in_place, forgotten, kept = counts
    assert in_place
    # The last block needs no recomputation if nothing after it needs gradients.
    assert 2 * in_place >= forgotten > in_place
    assert kept == in_place
    assert torch.equal(found[2], found[1])


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_a_graph_may_be_gone_back_through_twice(recompute):
    with models.in_training(make_model("SD1", torch.float32), "SD1", True, 0.1, recompute=recompute) as training:
        losses = training.losses()
        trained = list(training.plan.trainables.values())
        first, second = (torch.autograd.grad(losses.sum(), trained, retain_graph=True) for _ in range(2))
    assert torch.equal(models.joined(first), models.joined(second))


@pytest.fixture
def no_cure(monkeypatch):
    """Disable the engine's rule for in-place residuals."""
    monkeypatch.setattr(predict, "OutOfPlace", nullcontext)
    monkeypatch.setattr(blocks, "OutOfPlace", nullcontext)


def test_without_the_cure_flux_raises(no_cure):
    with models.in_training(make_model("Flux", torch.float32), "Flux", spread=0.1) as training:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            training.gradients()


def test_without_the_cure_in_the_recomputation_flux_is_silently_wrong(monkeypatch):
    """A mode around the forward is not enough: it has ended when a checkpointed block is recomputed."""
    monkeypatch.setattr(blocks, "OutOfPlace", nullcontext)
    with models.in_training(make_model("Flux", torch.float64), "Flux", True, spread=0.1) as training:
        assert max(error_of(training, "A", 0.02), error_of(training, "B", 0.02)) > 1e-3


def test_the_self_check_finds_a_wrong_gradient(monkeypatch):
    """This check stops a training of an unknown architecture that would learn nothing."""
    monkeypatch.setattr(blocks, "OutOfPlace", nullcontext)
    with models.in_training(make_model("Flux", torch.float32, 1), "Flux", True) as training:
        with pytest.raises(ModelError, match="wrong"):
            check_gradient(training.losses, training.plan.trainables)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_the_self_check_passes_and_puts_the_trainables_back(name):
    with models.in_training(make_model(name, torch.float32), name) as training:
        before = models.joined(training.plan.trainables.values())
        assert check_gradient(training.losses, training.plan.trainables) <= 0.01
        assert torch.equal(models.joined(training.plan.trainables.values()), before)


def derivatives(training):
    """Return {block: |derivative| along its own gradient} at the point of the gradient check."""
    source = generator("check", 0)
    values = training.plan.trainables
    with torch.no_grad():
        for parameter in values.values():
            parameter.add_(torch.randn(parameter.shape, generator=source) * 0.02)
    gradients = dict(zip(values, training.gradients(), strict=True))
    with torch.no_grad():
        source = generator("check", 0)
        for parameter in values.values():
            parameter.sub_(torch.randn(parameter.shape, generator=source) * 0.02)
    found = {}
    for name in values:
        found.setdefault(block_of(name), []).append(gradients[name])
    return {block: float(models.joined(parts).norm()) for block, parts in found.items()}


def block_of(name):
    """Return the block that the check's error names: the path up to its first number."""
    parts = name.split(".")
    return ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdecimal()) + 1])


@pytest.mark.parametrize("name", ["SD1", "SD3"])
def test_the_self_check_lets_no_more_than_five_per_cent_pass(name):
    """This holds even in the block with the least effect on the loss, where rounding weighs most."""
    with models.in_training(make_model(name, torch.float32), name) as training:
        found = derivatives(training)
        weakest = min(found, key=found.get)
        for share in (0.06, 0.1):
            hooks = [
                parameter.register_hook(lambda gradient, share=share: (1 - share) * gradient)
                for name, parameter in training.plan.trainables.items()
                if block_of(name) == weakest
            ]
            with pytest.raises(ModelError, match=rf"is wrong: .*% in {re.escape(weakest)}"):
                check_gradient(training.losses, training.plan.trainables)
            for hook in hooks:
                hook.remove()


def test_a_patch_that_adds_in_place_is_trained_through_exactly():
    """SD1's network adds nothing in place and computes without the cure, unless a node upstream patches it."""

    def patch(query, key, value, options):
        changed = query.sigmoid()
        changed *= 2.0
        return changed, key, value

    plain, patched = make_model("SD1", torch.float64), make_model("SD1", torch.float64)
    patched.set_model_attn1_patch(patch)
    for model, adds in ((plain, False), (patched, True)):
        with models.in_training(model, "SD1", spread=0.1) as training, models.float64_throughout(training):
            assert training.denoiser.adds_in_place == adds
            assert error_of(training, "A", 0.005) <= 1e-5
