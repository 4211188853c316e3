"""Tests of quantized base weights: their formats, the products with them, and runs on them, without ComfyUI."""

import logging

import pytest
import torch
from graft_pack.trainers.engine import base_dtype, trainable_modules
from graft_pack.trainers.engine.resolve import Options, RecipeInputs, resolve
from graft_pack.trainers.errors import SettingsError
from graft_pack.trainers.families import family_of
from graft_pack.trainers.formats.json_files import read_json
from graft_pack.trainers.lowrank.quantized import QuantizedLinear
from graft_pack.trainers.memory import quantization, tracking
from graft_pack.trainers.memory.autograd import blocks_of
from graft_pack.trainers.recipe.options import AS_IT_IS, BASE_DTYPES, FP8, INT8, NF4

from tests.support.diffusers_host import make_host, make_unet, run_session, same_state, same_tensors, state_of

CPU = torch.device("cpu")
# Bytes of a weight's number: codes, and scales of four bytes per row of 256 or per block of 64.
SIZES = {FP8: 1 + 4 / 256, INT8: 1 + 4 / 256, NF4: 0.5 + 4 / 64}
# Relative errors of normally distributed weights: a step of the format, uniformly distributed.
ERRORS = {FP8: (0.02, 0.03), INT8: (0.005, 0.01), NF4: (0.08, 0.1)}


def weight(rows=96, columns=256, seed=0):
    """Return a normally distributed weight, one row of which is zero."""
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found[3] = 0
    return found


def quantized(values, name):
    """Return (parts, dequantized values in float32)."""
    parts, dequantize = quantization.quantize(values, name, CPU)
    return parts, dequantize(parts, torch.float32)


class Tree(torch.nn.Module):
    """A block of two layers behind an input layer."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(20, 20)
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(20, 72, bias), torch.nn.GELU(), torch.nn.Linear(72, 20, bias))
            for _ in range(2)
        )
        self.requires_grad_(False)

    def forward(self, x):
        x = self.head(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def trees(name):
    """Return (quantized tree, the tree of the values that its weights stand for)."""
    low, plain = Tree(), Tree()
    quantization.quantize_linears(low, name, CPU)
    for path, layer in low.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(path).weight.data = layer.weight.detach().clone()
    return low, plain


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_a_format_has_its_size_and_its_error(name):
    values = weight()
    parts, numbers = quantized(values, name)
    error = (numbers - values).norm() / values.norm()
    assert sum(part.nbytes for part in parts) == pytest.approx(SIZES[name] * values.numel(), rel=0.01)
    assert ERRORS[name][0] < error < ERRORS[name][1]
    assert not numbers[3].any() and numbers.isfinite().all()


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_pieces_and_odd_shapes_change_no_number(name, monkeypatch):
    """A weight whose size is no multiple of a block, quantized at once and in pieces."""
    values = weight(7, 33)
    whole = quantized(values, name)[1]
    monkeypatch.setattr(quantization, "_AT_ONCE", 64)
    assert torch.equal(quantized(values, name)[1], whole) and whole.shape == values.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASE_DTYPES)
def test_half_precision_is_rounded_once(name, dtype):
    parts, dequantize = quantization.quantize(weight(), name, CPU)
    assert torch.equal(dequantize(parts, dtype), dequantize(parts, torch.float32).to(dtype))


def test_nf4_has_the_bits_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    values = weight()
    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    parts, numbers = quantized(values, NF4)
    assert torch.equal(parts[0].flatten(), codes.flatten()) and torch.equal(parts[1].flatten(), state.absmax)
    assert torch.equal(numbers, functional.dequantize_4bit(codes, state))


def test_int8_has_the_codes_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    values = weight()[4:]
    codes, largest, _ = functional.int8_vectorwise_quant(values.half())
    parts, _ = quantized(values.half().float(), INT8)
    # It computes in 16 bits, so a code next to a half may differ by one.
    assert (parts[0] - codes).abs().max() <= 1 and (parts[0] != codes).float().mean() < 0.02
    assert torch.allclose(parts[1].flatten() * 127, largest)


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_only_linears_of_blocks_are_quantized(name):
    tree = Tree()
    quantization.quantize_linears(tree, name, CPU)
    assert type(tree.head) is torch.nn.Linear
    layers = [layer for block in blocks_of(tree) for layer in block.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == 4 and all(isinstance(layer, QuantizedLinear) for layer in layers)
    assert layers[0].weight.shape == (72, 20) and layers[0].weight.dtype == torch.float32


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_memory_holds_at_most_one_layer_in_both_forms(name, monkeypatch):
    monkeypatch.setattr(quantization, "_AT_ONCE", 4096)
    tree = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(torch.nn.Linear(256, 256, False) for _ in range(8))})
    tree.requires_grad_(False)
    layer = 256 * 256
    with tracking.TensorTracker(tree.parameters()) as tracker:
        quantization.quantize_linears(tree, name, CPU)
    assert tracker.peak <= 8 * 4 * layer + 4 * layer
    assert tracking.bytes_of(tree.parameters()) == pytest.approx(8 * SIZES[name] * layer, rel=0.03)


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_gradients_are_those_of_the_dequantized_weights(name):
    found = []
    for tree in trees(name):
        x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = tree(x)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    for low, plain in zip(*found, strict=True):
        assert (low - plain).norm() <= 1e-6 * plain.norm()


def test_autograd_keeps_no_dequantized_weight():
    low, _ = trees(NF4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        low(torch.randn(3, 20, requires_grad=True))
    assert saved and not [one for one in saved if one.shape in ((72, 20), (20, 72)) and one.is_floating_point()]


def test_casts_of_a_tree_leave_its_quantized_weights():
    low, _ = trees(FP8)
    before = [part.dtype for part in low.parameters()]
    x = torch.randn(3, 20)
    assert torch.equal(low.float()(x), low(x)) and [part.dtype for part in low.parameters()] == before


def test_a_run_has_another_identity_only_if_it_is_set(tmp_path):
    runs = [run_session(tmp_path, steps=1, **fields).run.name for fields in ({}, {"base_dtype": AS_IT_IS})]
    other = run_session(tmp_path, steps=1, base_dtype=NF4).run.name
    assert runs[0] == runs[1] != other


class Stopped(Exception):
    """The exception that interrupts a run in a test."""


@pytest.mark.parametrize("name", BASE_DTYPES)
def test_resume_and_offload_keep_the_bits(name, tmp_path):
    fields = {"steps": 4, "batch_size": 2, "save_every": 1, "base_dtype": name, "targets": "all linear"}
    straight = run_session(tmp_path / "straight", **fields)

    def stop(event, payload):
        if event == "step" and payload["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop, **fields, offload="on")
    resumed = run_session(tmp_path / "parts", **fields)
    assert resumed.resumed_from == 2
    assert same_state(state_of(resumed), state_of(straight))
    assert same_tensors(resumed.adapter, straight.adapter)
    usual = run_session(tmp_path / "usual", **{**fields, "base_dtype": AS_IT_IS})
    assert usual.adapter.keys() == straight.adapter.keys() and not same_tensors(usual.adapter, straight.adapter)


def test_the_log_states_the_measured_error(tmp_path, caplog):
    host = make_host()
    with caplog.at_level(logging.INFO, base_dtype.log.name):
        run_session(tmp_path, host=host, steps=1, base_dtype=NF4)
    (line,) = [record.getMessage() for record in caplog.records if "quantized the model" in record.getMessage()]
    percent = float(line.rpartition("by ")[2].rstrip("%."))
    assert "nf4" in line and 0.1 < percent < 50


@pytest.mark.parametrize("name", [AS_IT_IS, *BASE_DTYPES])
def test_checkpointing_by_itself_counts_weights_and_not_their_packed_parts(name, tmp_path, monkeypatch):
    found = {}
    count = sum(weight.numel() for weight in make_unet().parameters())
    for limit in (count - 1, count):
        monkeypatch.setattr(trainable_modules, "_LARGE_MODEL", limit)
        run = run_session(tmp_path / str(limit), steps=1, base_dtype=name).run
        found[limit] = read_json(run.recipe_path)["checkpointed_blocks"]
    assert found[count - 1] > 0 == found[count]


def test_full_fine_tuning_refuses_it():
    options = Options({("memory", "base_dtype"): NF4})
    with pytest.raises(SettingsError, match="base_dtype is nf4.*Leave base_dtype.*or train a LoRA"):
        resolve(options, family_of("SD1"), RecipeInputs("all weights", 10, 0.0, 0, 2, 0, 64, ""))
