"""Tests of compiled blocks: their gradients, the number of graphs, what cannot be compiled, and what is left behind."""

import gc
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.engine.preflight import share_inputs
from graft_pack.trainers.memory import compilation
from graft_pack.trainers.memory.autograd import blocks_of
from graft_pack.trainers.memory.checkpointing import checkpoint_blocks
from graft_pack.trainers.memory.tracking import TensorTracker
from graft_pack.trainers.methods.dropout import dropping_out
from graft_pack.trainers.preprocessing.items import DatasetItem, Sample
from graft_pack.trainers.recipe.parsing import parse_arguments
from graft_pack.trainers.steps.step import batch_loss
from torch._dynamo.utils import counters

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

CONV = {"method": "LoRA with conv", "targets": "linear + conv"}
FAMILIES = {"SD1": CONV, "SDXL": {}, "Flux": {}, "SD3": {}, "QwenImage": {}, "ZImage": {}}
METHODS = {
    "DoRA": {"method": "DoRA"},
    "LoHa": {"method": "LoHa"},
    "LoKr": {"method": "LoKr"},
    "norms and biases": {"adapter_args": parse_arguments("train_norm=true train_bias=true")},
    "all weights": {"method": "all weights", "targets": "all weights", "rank": 0},
    "offloaded": {"offload": "on"},
    "fp8 (scaled)": {"base_dtype": "fp8 (scaled)"},
    "int8": {"base_dtype": "int8"},
    "nf4": {"base_dtype": "nf4"},
}
# Largest relative difference of the gradient, fp32.
BAR = 1e-5

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")


@pytest.fixture(autouse=True)
def backend(monkeypatch):
    """Compile without a C++ compiler: trace, and derive the backward. Return a function that sets another backend."""
    use = lambda name: monkeypatch.setattr(compilation, "BACKEND", name)  # noqa: E731
    use("aot_eager")
    counters.clear()
    return use


def make_model(name, dtype=torch.float32):
    with torch.inference_mode():
        return models.patcher(name, dtype)


def training(name, compile="on", checkpointing=False, model=None, **fields):
    spread = 0.0 if fields.get("method") == "all weights" else 0.1
    return models.in_training(model or make_model(name), name, checkpointing, spread, compile=compile, **fields)


def gradient_of(found):
    return models.joined(found.gradients())


def graphs():
    return counters["stats"]["unique_graphs"]


def compiled_classes(found):
    """Return the compiled classes of a training's blocks, and the number of different weight shapes."""
    blocks = [block for block in found.denoiser.module.modules() if forward_of(block)]
    shapes = {(type(block), *(weight.shape for weight in block.parameters())) for block in blocks}
    return {forward_of(block).compiled for block in blocks}, len(shapes)


def forward_of(block):
    """Return a block's CompiledForward, also below checkpointing and offloading; None if it has none."""
    forward = vars(block).get("forward")
    while forward is not None and not isinstance(forward, compilation.CompiledForward):
        forward = getattr(forward, "forward", None)
    return forward


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_without_compilation(name):
    with training(name, "off", **FAMILIES[name]) as found:
        expected = gradient_of(found)
    with training(name, **FAMILIES[name]) as found:
        share_inputs(found.plan, found.host, 0)
        assert graphs() == 0, "a forward without gradients compiles nothing"
        assert models.distance(gradient_of(found), expected) <= BAR
        classes, shapes = compiled_classes(found)
        first = graphs()
        # The first block of a network has an input without a gradient.
        assert shapes <= first <= 2 * shapes
        checkpoint_blocks(blocks_of(found.denoiser.module), keep_attention=True)
        assert models.distance(gradient_of(found), expected) <= BAR
        assert graphs() == first, "a checkpointed block and its recomputation have the same graph"
        assert not any(compiled.has_failed for compiled in classes)
        assert not counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_compiled(method):
    with training("QwenImage", "off", **METHODS[method]) as found:
        expected = gradient_of(found)
    with training("QwenImage", **METHODS[method]) as found:
        assert models.distance(gradient_of(found), expected) <= BAR
        assert not any(compiled.has_failed for compiled in compiled_classes(found)[0])
        assert graphs()


def test_half_precision_is_compiled_once():
    """Each step casts the adapter's weights to new tensors."""
    with training("QwenImage", "off", model=make_model("QwenImage", torch.bfloat16)) as found:
        expected = gradient_of(found)
    with training("QwenImage", model=make_model("QwenImage", torch.bfloat16)) as found:
        assert models.distance(gradient_of(found), expected) <= 0.05
        first = graphs()
        gradient_of(found)
        assert 0 < first == graphs()


def test_dropout_drops_the_same():
    found_gradients = []
    for compile in ("off", "on"):
        with training("QwenImage", compile, dropout=0.5) as found:
            recipe, device = found.plan.recipe, found.denoiser.device
            with dropping_out([found.denoiser.module], device, recipe, 0):
                found_gradients.append(gradient_of(found))
    assert models.distance(*found_gradients) <= BAR


def with_side(found, height, width):
    """Return a training on one picture of this size."""

    def show(visit):
        latent = torch.randn(1, 16, 1, height, width, generator=torch.Generator().manual_seed(height))
        return Sample(latent, models.conditioning("QwenImage"))

    return replace(found, plan=replace(found.plan, train=[DatasetItem("picture", (64, 64), 1, show)]))


SIZES = [(8, 8), (8, 12), (12, 8), (16, 16), (16, 8), (4, 20), (20, 12), (12, 12)]


def test_many_sizes_need_few_graphs():
    with training("QwenImage", "off") as found:
        expected = [gradient_of(with_side(found, *size)) for size in SIZES]
    with training("QwenImage") as found:
        for size, gradient in zip(SIZES, expected, strict=True):
            assert models.distance(gradient_of(with_side(found, *size)), gradient) <= BAR
        assert graphs() <= 6
        assert not any(compiled.has_failed for compiled in compiled_classes(found)[0])


def test_a_checkpointed_block_is_recomputed_by_the_graph_of_its_forward(monkeypatch):
    """Also if another size has brought a more general graph since."""
    runs = []

    def backend(graph, inputs):
        return lambda *args: runs.append(id(graph)) or graph(*args)

    monkeypatch.setattr(compilation, "_backend", backend)
    with training("QwenImage", checkpointing=True) as found:
        loss = sum(batch_loss(with_side(found, *size).plan, found.host) for size in SIZES[:3])
        loss.backward()
    # The backward begins with the last block.
    assert len(set(runs)) > 2 and runs == runs[::-1]


def failing_from(number, calls):
    """Return a backend that cannot compile the graph of this number, nor any after it."""

    def compile(graph, inputs):
        calls.append(graph)
        if len(calls) >= number:
            raise NotImplementedError("no such operation\nand more")
        return graph.forward

    return compile


@pytest.mark.parametrize("number, calls", [(1, 1), (2, 2)])
def test_a_block_that_cannot_be_compiled_is_computed_as_usual(number, calls, backend, monkeypatch, caplog):
    """This includes blocks that ran compiled in the forward of the same step: their recomputation runs compiled."""
    seen = []
    with training("QwenImage", "off", True) as found:
        expected = gradient_of(found)
    monkeypatch.setattr(compilation, "_backend", failing_from(number, seen))
    with training("QwenImage", checkpointing=True) as found:
        gradients = [gradient_of(found) for _ in range(2)]
    assert all(models.distance(gradient, expected) <= BAR for gradient in gradients)
    assert len(seen) == calls
    messages = [record.getMessage() for record in caplog.records if "cannot compile" in record.getMessage()]
    assert len(messages) == 1
    assert "QwenImageTransformerBlock" in messages[0]
    assert messages[0].endswith("NotImplementedError: no such operation")


def test_a_system_that_torch_does_not_compile_for_computes_as_usual(monkeypatch, caplog):
    def refuse(is_dynamic):
        raise RuntimeError("torch.compile is not supported here")

    monkeypatch.setattr(compilation, "_compile", refuse)
    with training("QwenImage", "off") as found:
        expected = gradient_of(found)
    with training("QwenImage") as found:
        assert torch.equal(gradient_of(found), expected)
    assert sum("cannot compile QwenImageTransformerBlock" in record.getMessage() for record in caplog.records) == 1


def test_without_a_compiler_nothing_is_compiled(backend, monkeypatch, tmp_path, caplog):
    import torch._inductor.config as inductor

    backend("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with training("QwenImage", "off") as found:
        expected = gradient_of(found)
    with training("QwenImage") as found, inductor.patch({"cpp.cxx": (str(tmp_path / "no compiler"),)}):
        assert torch.equal(gradient_of(found), expected)
    assert sum("cannot compile QwenImageTransformerBlock" in record.getMessage() for record in caplog.records) == 1


@needs_compiler
def test_inductor_gives_the_same_gradient(backend, trials, monkeypatch, tmp_path):
    """Quick: of one block of one family."""
    backend("inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for name in trials(["QwenImage"], FAMILIES):
        with training(name, "off", **FAMILIES[name]) as found:
            expected = gradient_of(found)
        with training(name, **FAMILIES[name]) as found:
            if trials(True, False):
                del next(block for block in found.denoiser.module.modules() if forward_of(block)).forward
            assert models.distance(gradient_of(found), expected) <= BAR
            assert not any(compiled.has_failed for compiled in compiled_classes(found)[0])
            assert graphs()


def test_memory_is_measured_without_compilation():
    with training("QwenImage") as found, TensorTracker() as tracker:
        gradient_of(found)
    assert tracker.peak and graphs() == 0


def test_patches_may_tell_blocks_apart():
    seen = []

    def patch(query, key, value, options):
        seen.append((*options["block"], options["block_index"]))
        return query, key, value

    model = make_model("SD1")
    model.set_model_attn1_patch(patch)
    with training("SD1", model=model) as found:
        assert not found.denoiser.position_options
    with training("SD1") as found:
        assert found.denoiser.position_options


def test_graphs_end_with_the_training():
    model = make_model("QwenImage")
    with training("QwenImage", model=model) as found:
        gradient_of(found)
        classes, _ = compiled_classes(found)
        kept = [weakref.ref(compiled) for compiled in classes]
        kept += [weakref.ref(function) for compiled in classes for function in compiled._functions.values()]
        kept += [weakref.ref(block) for block in found.denoiser.module.modules() if forward_of(block)]
    assert not any(forward_of(block) for block in model.model.modules())
    del found, classes
    gc.collect()
    assert len(kept) > 3
    assert [reference() for reference in kept if reference() is not None] == []
