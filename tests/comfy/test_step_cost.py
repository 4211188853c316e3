"""Cost of a training step over the bare model, counted and as ratios, so that a busy machine changes nothing.

`make bench` measures seconds, and other trainers.
"""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import contestants
from benchmarks.contestants import Case
from tests.support import counting, models

pytestmark = pytest.mark.usefixtures("comfy")

# A narrow adapter, whose own products cost almost nothing beside the model's.
RANK = 1
MODELS = ["SD1", "Flux as in diffusers"]


def counted(case, name, counter, at=3):
    """Run a contestant's step under a counter; at the third step all optimizer state exists."""
    steps = 0

    class Done(Exception):
        pass

    def stand():
        nonlocal steps
        steps += 1
        if steps == at - 1:
            counter.__enter__()
        if steps == at:
            counter.__exit__(None, None, None)
            raise Done

    with pytest.raises(Done):
        contestants.ALL[name](case, stand)
    return counter


def work(case, name):
    return counted(case, name, counting.FlopCounter()).get_total_flops()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_computed_that_the_bare_model_does_not_need(model, checkpointing):
    """Gradients for the frozen weights of the adapted layers alone would exceed this bound."""
    case = Case(model, 2, checkpointing, rank=RANK)
    bare = work(case, "limit")
    assert work(case, "attention") <= 1.01 * bare
    if checkpointing:
        plain = replace(case, checkpointing=False)
        assert bare <= work(plain, "limit") + work(plain, "forward"), "each block is computed again, and once"


@pytest.mark.parametrize("model", MODELS)
def test_memory_is_the_bare_models_and_the_adapters(model, monkeypatch):
    """Peak bytes of live tensors, with 5 % for the input of each layer, which the gradient of its A needs."""
    case = Case(model, 2, rank=RANK)
    patcher = case.patcher()
    monkeypatch.setattr(Case, "patcher", lambda self: patcher)
    # Everything that the MODEL holds, also what a bare forward does not read, such as its table of noise levels.
    held = [*patcher.model.parameters(), *patcher.model.buffers()]
    bare = counted(case, "limit", counting.Counter(held))
    step = counted(case, "attention", counting.Counter(held))
    with models.in_training(patcher, model, rank=RANK, alpha=1.0) as training:
        # Values, gradients and AdamW's two moments.
        adapters = 4 * sum(one.nbytes for one in training.plan.trainables.values())
        # The next batch, which a thread fetches during the step; it stays in CPU memory on any device.
        _, batch = next(training.plan.batches(0))
        shown = training.plan.samples(batch)
        coming = sum(one.latent.nbytes + sum(x.nbytes for x in one.conditioning.tensors.values()) for one in shown)
    base = sum(one.nbytes for one in held)
    assert base < bare.peak < 2 * base, "the weights once, and little enough beside them that a copy would show"
    assert coming < 0.005 * bare.peak
    assert step.peak <= 1.05 * (bare.peak + adapters) + coming


def test_a_step_of_many_pictures_has_no_more_operations_than_one():
    """A larger batch makes tensors larger and adds no operations."""
    few, many = (counted(Case("SD1", batch), "attention", counting.Counter()).operations for batch in (1, 4))
    assert many <= 1.1 * few


def test_a_late_step_has_the_operations_of_an_early_one():
    early, late = (counted(Case("SD1", 1), "attention", counting.Counter(), at).operations for at in (3, 9))
    assert late == early


class Calls:
    """Counter of calls of Python functions within its block."""

    def __init__(self):
        self.count = 0

    def __enter__(self):
        sys.setprofile(self._note)

    def __exit__(self, *error):
        sys.setprofile(None)

    def _note(self, frame, event, argument):
        self.count += event == "call"


@pytest.mark.parametrize("model", ["SD1", "SDXL"])
def test_a_step_makes_at_most_twice_the_bare_models_python_calls(model):
    """On small shapes a step waits for Python. Data, loss, clipping, AdamW and log are counted too."""
    bare, step = (counted(Case(model, 1), name, Calls()).count for name in ("limit", "attention"))
    print(f"{model}: {step} Python calls, the bare model {bare}, {step / bare:.2f} times")
    assert step <= 2.0 * bare


class Products(TorchDispatchMode):
    """Recorder of the shapes of matrix products within its block."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.add(tuple(found.shape))
        return found


@pytest.mark.parametrize("model", MODELS)
def test_no_product_of_an_adapter_is_made_the_slow_way_round(model):
    """A product whose last size is the rank takes a CPU two to five times as long as its transpose."""
    rank = 5
    bare, step = (counted(Case(model, 2, rank=rank), name, Products()).shapes for name in ("limit", "attention"))
    assert not any(rank in shape for shape in bare), "a size that is the rank's alone"
    made = step - bare
    assert any(shape[0] == rank for shape in made)
    assert not any(shape[-1] == rank for shape in made)


def test_a_block_that_ends_with_an_adapted_convolution_is_not_computed_again_to_its_end():
    """No gradient needs its frozen convolution's output, so recomputation skips it; a narrow adapter adds little."""
    again = []
    for name in ("attention", "linear + conv"):
        plain, checkpointed = (work(Case("SD1", 2, on, rank=RANK), name) for on in (False, True))
        again.append(checkpointed - plain)
    assert again[0] <= again[1] <= 1.1 * again[0]
