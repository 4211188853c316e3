"""Tests of training on the host's quantized weights, and on weights that Graft quantizes, in the host's networks."""

import functools
import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.engine.oom_fallback import offload_blocks
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.lowrank.quantized import QuantizedLinear
from graft_pack.trainers.memory import quantization
from graft_pack.trainers.recipe.options import BASE_DTYPES

from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")

FORMATS = ("float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise")
METHOD_NAMES = ("LoRA", "DoRA", "LoRA with conv", "LoKr", "LoHa", "PiSSA", "IA3", "OFT")
FIELDS = {"spread": 0.1, "targets": "all linear", "rank": 4}


def quantized(name, kind="float8_e4m3fn", **more):
    """Return (MODEL with quantized Linears, MODEL of the values that they stand for), as the host loads such files.

    Args:
        more: further tensors of the first layer.
    """
    from comfy import quant_ops

    if kind not in getattr(quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI has no such format")
    plain = models.patcher(name)
    network = plain.model.diffusion_model
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and ("blocks" in path or "attn" in path)
    ]
    layers = {}
    for path in chosen:
        layout = quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
        parts, numbers = host_quantized(weights[f"{path}.weight"], layout)
        weights.update({f"{path}.weight{end}": part for end, part in parts.items()})
        layers[path] = {"format": kind}
        with torch.no_grad():
            network.get_submodule(path).weight.copy_(numbers)
    weights.update({f"{chosen[0]}.{end}": tensor for end, tensor in more.items()})
    config = networks.SIZES[name].build()
    config.set_inference_dtype(torch.float32, torch.float32)
    if hasattr(config, "quant_config"):
        config.quant_config = {"mixed_ops": True}
        for path, told in layers.items():
            weights[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    else:
        config.layer_quant_config = layers
    model = config.get_model({}, "", device="cpu")
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [key for key in missing if not key.endswith(".weight")]
    return models.patched(model), plain, chosen


def host_quantized(weight, layout):
    """Return a weight's tensors in a file by the ends of their keys, and the numbers that they stand for."""
    from comfy.quant_ops import QuantizedTensor

    if hasattr(QuantizedTensor, "state_dict"):
        packed = QuantizedTensor.from_float(weight, layout, scale="recalculate")
        return packed.state_dict(), packed.dequantize()
    packed = QuantizedTensor.from_float(weight, layout)
    return {"": packed._qdata, "_scale": packed._layout_params["scale"]}, packed.dequantize()


@pytest.fixture(scope="module")
def pair(comfy):
    """Return `quantized`, made once for its arguments."""

    @functools.cache
    def made(name, kind):
        with torch.inference_mode():
            return quantized(name, kind)

    return made


def results(model, name, checkpointing=False, **fields):
    """Return (loss, gradients, names of the trainables, keys of the file)."""
    with models.in_training(model, name, checkpointing, **{**FIELDS, **fields}) as training:
        gradients = models.joined(training.gradients())
        keys = training.plan.products(0).adapter.keys()
        return training.losses().detach(), gradients, training.plan.trainables.keys(), keys


def assert_same_training(low, plain, bound=1e-5):
    """Compare two `results`."""
    assert low[2:] == plain[2:]
    assert torch.allclose(low[0], plain[0], rtol=bound)
    assert models.distance(low[1], plain[1]) <= bound


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_a_lora_is_trained_as_on_the_numbers_the_weights_stand_for(name, kind, pair):
    low, plain, chosen = pair(name, kind)
    found = results(low, name)
    assert any(key.startswith(chosen[0]) for key in found[2])
    assert_same_training(found, results(plain, name))


@pytest.mark.parametrize("method", METHOD_NAMES[1:])
def test_every_type_is_trained_as_on_those_numbers(method, pair):
    low, plain, _ = pair("SD1", "float8_e4m3fn")
    assert_same_training(results(low, "SD1", method=method), results(plain, "SD1", method=method))


@pytest.mark.parametrize("kind", FORMATS)
def test_checkpointed_and_offloaded_have_the_same_bits(kind, pair, tmp_path):
    low, _, _ = pair("Flux", kind)
    found = []
    for checkpointing, offload in ((False, "off"), (True, "off"), (False, "on")):
        with models.in_training(low, "Flux", checkpointing, **FIELDS, offload=offload) as training:
            if offload == "on":
                assert offload_blocks(training.plan, SimpleNamespace(folder=str(tmp_path)), training.host)
                layers = [layer for layer in training.denoiser.module.modules() if isinstance(layer, QuantizedLinear)]
                assert layers and all(hasattr(part, "graft_offloaded") for layer in layers for part in layer.parts)
            found.append(models.joined(training.gradients()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_no_second_copy_of_the_quantized_weights(kind, pair):
    low, _, _ = pair("Flux", kind)
    with models.in_training(low, "Flux") as training:
        shared = set()
        for weight in low.model.parameters():
            if hasattr(weight, "__tensor_flatten__"):
                shared |= {getattr(weight, name).data_ptr() for name in weight.__tensor_flatten__()[0]}
        layers = [layer for layer in training.denoiser.module.modules() if isinstance(layer, QuantizedLinear)]
        assert layers and all(part.data_ptr() in shared for layer in layers for part in layer.parts)


def test_layers_that_scale_their_inputs_are_refused():
    with torch.inference_mode():
        low, _, chosen = quantized("Flux", "nvfp4", pre_quant_scale=torch.ones(1))
    with pytest.raises(ModelError, match=f"{chosen[0]} scales its inputs.*Load the original model"):
        results(low, "Flux")


@pytest.mark.parametrize("damage", ["missing", "not finite"])
def test_weights_with_damaged_scales_are_refused_by_name(damage):
    """Of one layer among sound ones, as in a file that is put together of two."""
    from graft_pack.nodes.host.model.checks import check_sockets

    with torch.inference_mode():
        low, _, chosen = quantized("Flux")
        weight = low.model.diffusion_model.get_submodule(chosen[1]).weight
        params = getattr(weight, "_layout_params", None)
        if damage == "not finite":
            getattr(weight, weight.__tensor_flatten__()[0][1]).fill_(torch.nan)
        elif params is not None and isinstance(params, dict):
            params["scale"] = None
        else:
            pytest.skip("this ComfyUI refuses the file itself")
    with pytest.raises(ModelError, match=f"{chosen[1]}.weight has no scale.*Download"):
        check_sockets(low, object(), object(), "LoRA")


def test_full_fine_tuning_refuses_the_layers_by_name(pair):
    low, _, chosen = pair("Flux", "float8_e4m3fn")
    with pytest.raises(ModelError, match="weight is quantized.*Load the original model"):
        results(low, "Flux", method="all weights", rank=0, targets="all weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 200], ids=["fewer inputs", "fewer weights"])
def test_scaled_fp8_has_the_bits_of_the_host(rows, dtype):
    import comfy.ops
    from graft_pack.nodes.host.model.quantization.quantized import as_linears

    if not hasattr(comfy.ops, "scaled_fp8_ops"):
        pytest.skip("this ComfyUI reads scaled fp8 otherwise")
    source = torch.Generator().manual_seed(0)
    layer = comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn).Linear(24, 32, bias=False, device="cpu")
    layer.requires_grad_(False).weight.copy_(torch.randn(32, 24, generator=source))
    layer.scale_weight.fill_(0.37)
    x = torch.randn(1, rows, 24, generator=source).to(dtype).requires_grad_()
    found = []
    for turn in (lambda tree: None, lambda tree: as_linears(tree, tree)):
        turn(torch.nn.Sequential(layer))
        out = layer(x)
        found.append((out, *torch.autograd.grad(out.square().sum(), x)))
    (theirs, gradient), (ours, own_gradient) = found
    assert isinstance(layer, QuantizedLinear) and theirs.any()
    assert torch.equal(theirs, ours) and models.distance(own_gradient, gradient) <= 0.01


def mixed_linear(layer, parts, kind):
    """Return the host's quantized Linear with the tensors of `host_quantized` in the place of a layer's weight."""
    import comfy.ops

    tensors = {**{f"weight{end}": part for end, part in parts.items()}, "bias": layer.bias.detach().clone()}
    told = {"format": kind}
    if "disabled" in inspect.signature(comfy.ops.mixed_precision_ops).parameters:
        operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32, full_precision_mm=True)
        tensors["comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    else:
        operations = comfy.ops.mixed_precision_ops({"": told}, torch.float32, full_precision_mm=True)
    mixed = operations.Linear(layer.in_features, layer.out_features, device="cpu", dtype=torch.float32)
    mixed.load_state_dict(tensors)
    return mixed


@pytest.mark.parametrize("kind", FORMATS[:1] + FORMATS[2:3])
def test_text_encoders_are_trained_as_on_those_numbers(kind):
    from comfy import quant_ops

    if kind not in getattr(quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI has no such format")
    layout = quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    plain, low = models.text("SD1"), models.text("SD1")
    for path, layer in list(plain.cond_stage_model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and "layers" in path:
            parts, numbers = host_quantized(layer.weight.detach().clone(), layout)
            layer.weight.data.copy_(numbers)
            parent, _, name = path.rpartition(".")
            setattr(low.cond_stage_model.get_submodule(parent), name, mixed_linear(layer, parts, kind))
    found = []
    for clip in (low, plain):
        with models.with_text("SD1", clip=clip, spread=0.1, targets="all linear") as training:
            gradients = models.joined(training.gradients())
            found.append((training.losses().detach(), gradients, list(training.plan.trainables)))
    assert any(key.startswith("text/") for key in found[0][2])
    assert_same_training(*found)


def test_the_error_about_a_text_encoder_names_its_input():
    from comfy.quant_ops import QUANT_ALGOS
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = models.text("SD1")
    layer = clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0].mlp
    parts, _ = host_quantized(layer.fc1.weight.detach().clone(), QUANT_ALGOS[FORMATS[0]]["comfy_tensor_layout"])
    layer.fc1 = mixed_linear(layer.fc1, parts, FORMATS[0])
    layer.fc1.pre_quant_scale = torch.ones(1)
    with pytest.raises(ModelError, match="fc1 scales its inputs") as error, ComfyText(clip).training():
        pass
    assert error.value.input == "clip"


def dequantized(name, base_dtype):
    """Return a family's MODEL with the numbers that its quantized weights stand for."""
    model = models.patcher(name)
    for layer in quantization.linears_of(model.model.diffusion_model):
        parts, dequantize = quantization.quantize(layer.weight.detach(), base_dtype, torch.device("cpu"))
        layer.weight.data.copy_(dequantize(parts, torch.float32))
    return model


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_base_dtype_trains_as_on_the_dequantized_base(name, base_dtype):
    model = models.patcher(name)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    low = results(model, name, base_dtype=base_dtype)
    assert_same_training(low, results(dequantized(name, base_dtype), name))
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


def test_base_dtype_quantizes_again_what_is_quantized(pair):
    low, plain, _ = pair("Flux", "float8_e4m3fn")
    found = [results(model, "Flux", base_dtype="nf4") for model in (low, plain)]
    assert_same_training(*found)


BESIDE = {"adapter_args": (("train_norm", True), ("train_bias", True))}


@pytest.mark.parametrize(
    "fields", [*({"method": method} for method in METHOD_NAMES[1:]), BESIDE, {**BESIDE, "method": "DoRA"}], ids=str
)
def test_base_dtype_trains_every_type(fields):
    low = results(models.patcher("SD1"), "SD1", base_dtype="nf4", **fields)
    assert_same_training(low, results(dequantized("SD1", "nf4"), "SD1", **fields))


@pytest.mark.parametrize(
    "fields", [*({"method": method} for method in ("LoRA", "DoRA", "PiSSA", "IA3", "OFT")), BESIDE], ids=str
)
def test_base_dtype_trains_a_base_in_fp8(fields):
    """The base is what the host loads with the weight_dtype fp8_e4m3fn."""
    config = networks.SIZES["SD1"].build()
    config.set_inference_dtype(torch.float8_e4m3fn, torch.float32)
    model = models.patched(config.get_model({}, "", device="cpu"))
    wide = models.patcher("SD1")
    with torch.no_grad():
        for ours, theirs in zip(model.model.parameters(), wide.model.parameters(), strict=True):
            ours.copy_(theirs)
            theirs.copy_(ours)
    found = [results(one, "SD1", base_dtype="nf4", **fields) for one in (model, wide)]
    assert_same_training(*found)


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
def test_autograd_keeps_no_dequantized_weight(method):
    saved = []
    fields = {**FIELDS, "base_dtype": "nf4", "method": method}
    with models.in_training(models.patcher("SD1"), "SD1", **fields) as training:
        layers = [layer for layer in training.denoiser.module.modules() if isinstance(layer, QuantizedLinear)]
        shapes = {shape for layer in layers for shape in (layer.weight.shape, layer.weight.t().shape)}
        with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
            training.losses()
    # Activations of these shapes depend on an adapter.
    weights = [one for one in saved if one.shape in shapes and one.is_floating_point() and not one.requires_grad]
    assert layers and saved and not weights


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
def test_base_dtype_checkpointed_and_offloaded_has_the_same_bits(base_dtype, tmp_path):
    found = []
    for checkpointing, offload in ((False, "off"), (True, "off"), (False, "on")):
        fields = {**FIELDS, "offload": offload, "base_dtype": base_dtype}
        with models.in_training(models.patcher("SD3"), "SD3", checkpointing, **fields) as training:
            if offload == "on":
                assert offload_blocks(training.plan, SimpleNamespace(folder=str(tmp_path)), training.host)
            found.append(models.joined(training.gradients()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2]) and found[0].any()


@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
def test_base_dtype_in_half_precision_rounds_once(base_dtype):
    """The gradient in bf16 is as near to that in fp32 as on the dequantized base."""
    exact = results(dequantized("SD1", base_dtype), "SD1")[1]
    for model, fields in ((models.patcher("SD1"), {"base_dtype": base_dtype}), (dequantized("SD1", base_dtype), {})):
        rounded = results(model, "SD1", compute_dtype="bf16", **fields)[1]
        assert models.distance(rounded, exact) < 0.1
