"""Tests of training in half precision: an adapter that changes nothing leaves every bit of the host's inference."""

from contextlib import nullcontext

import pytest
import torch
from graft_pack.trainers.engine.preflight import share_inputs
from graft_pack.trainers.lowrank.layers import low_rank_layers
from graft_pack.trainers.memory.autograd import OutOfPlace
from graft_pack.trainers.methods import METHODS
from graft_pack.trainers.recipe.parsing import parse_arguments

from docs.build import make_families
from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SIGMA = 0.7
# Types whose adapter is zero at the start. PiSSA starts as a difference of two equal products.
VARIANTS = (
    ("LoRA", "use_tucker=true"),
    ("LoRA", "rank_dropout=0.5 module_dropout=0.5"),
    ("LoHa", "dora_wd=true"),
    ("LoKr", "dora_wd=true use_tucker=true factor=2"),
    ("LoRA", "train_norm=true train_bias=true"),
)
ADAPTERS = [name for name, method in METHODS.items() if method.trains_model and name != "all weights"]


def x_of(name):
    return torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(0))


def of_host(patcher, name):
    """Return the x0 that the host computes at inference, by PyTorch's attention."""
    from graft_pack.nodes.host.model import placement

    options = patcher.model_options.setdefault("transformer_options", {})
    options["optimized_attention_override"] = placement.pytorch_attention
    return models.denoised(patcher, x_of(name), SIGMA, models.conditioning(name))


def of_training(training, name):
    """Return the x0 that a training step computes."""
    share_inputs(training.plan, training.host, 0)
    level = torch.full((1,), SIGMA)
    with OutOfPlace() if training.denoiser.adds_in_place else nullcontext():
        raw = training.denoiser.predict(x_of(name), level, [models.conditioning(name)])
    assert raw.requires_grad
    return training.denoiser._sampling.calculate_denoised(level, raw.detach(), x_of(name))


@HALF
@pytest.mark.parametrize("name", networks.CLASSES)
def test_training_computes_what_inference_computes(name, dtype):
    if name not in make_families.list_classes():
        pytest.skip("this ComfyUI has no such class")
    patcher = models.patcher(name, dtype)
    expected = of_host(patcher, name)
    with models.in_training(patcher, name, targets="attention") as training:
        assert training.denoiser.compute_dtype == dtype
        assert torch.equal(of_training(training, name), expected)


@HALF
@pytest.mark.parametrize("method, arguments", [*((name, "") for name in ADAPTERS), *VARIANTS])
def test_every_adapter_type_starts_as_the_host(method, arguments, dtype):
    patcher = models.patcher("SD1", dtype)
    expected = of_host(patcher, "SD1")
    targets = "linear + conv" if arguments else METHODS[method].default_targets
    fields = {"method": method, "targets": targets, "adapter_args": parse_arguments(arguments)}
    with models.in_training(patcher, "SD1", **fields) as training:
        assert torch.equal(of_training(training, "SD1"), expected)


@HALF
@pytest.mark.parametrize("name", ["SDXL", "SD3", "Flux"])
def test_norms_and_biases_start_as_the_host_and_round_as_it(name, dtype):
    """The host rounds the sum of a norm's weight and its difference to half precision too."""
    from graft_pack.nodes.host.model.lora import apply_adapter

    patcher = models.patcher(name, dtype)
    expected = of_host(patcher, name)
    fields = {"targets": "all linear", "adapter_args": parse_arguments("train_norm=true train_bias=true")}
    with models.in_training(patcher, name, **fields) as training:
        assert torch.equal(of_training(training, name), expected)
        trainables = training.plan.trainables
        norms = {one: value for one, value in trainables.items() if ".diff" in one and ".diff_b." not in one}
        models.scatter(norms, 0.1)
        trained = of_training(training, name)
        adapter = training.plan.export(trainables, 0).adapter
    applied = of_host(apply_adapter(patcher, None, adapter, 1.0, 1.0)[0], name)
    assert torch.equal(trained, applied) and not torch.equal(trained, expected)


@HALF
@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_gradients_reach_the_masters_in_float32(name, dtype):
    """They are those of the same weights in float32, but for the rounding of activations."""
    found = {}
    for compute in (dtype, torch.float32):
        with models.in_training(models.patcher(name, dtype), name, spread=0.1) as training:
            training.denoiser.compute_dtype = compute
            share_inputs(training.plan, training.host, 0)
            found[compute] = models.joined(training.gradients())
            assert all(one.grad is None or one.grad.dtype is torch.float32 for one in training.plan.trainables.values())
            copied = [layer.group.copies for layer in low_rank_layers(training.denoiser.module).values()]
            assert all((copies is not None) == (compute is dtype) for copies in copied)
    assert models.distance(found[dtype], found[torch.float32]) <= 0.2


def in_float32(patcher, name):
    """Return a MODEL with the same weights in float32."""
    exact = models.patcher(name, torch.float32)
    exact.model.diffusion_model.load_state_dict(patcher.model.diffusion_model.state_dict())
    return exact


@HALF
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_what_was_trained_is_as_near_to_the_exact_result_as_what_the_host_merges(name, dtype):
    """The host rounds the sum of weight and adapter to half precision; training adds the adapter's own product."""
    import comfy.sd

    patcher = models.patcher(name, dtype)
    with models.in_training(patcher, name, spread=0.1, targets="attention") as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
        trained = of_training(training, name)
    found = []
    for model in (patcher, in_float32(patcher, name)):
        applied, _ = comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0.0)
        found.append(of_host(applied, name))
    merged, exact = found
    rounding = models.distance(merged, exact)
    print(f"{name} {dtype}: merged {rounding:.1e}, trained {models.distance(trained, exact):.1e} from the exact result")
    assert models.distance(trained, exact) <= 2 * rounding
    assert models.distance(trained, merged) <= 3 * rounding
