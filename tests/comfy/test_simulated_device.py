"""Tests of training on a device that is not the CPU: losses, bits after resuming, memory, reads, streams.

Each test runs in a process of its own, because the device stays registered.
"""

import gc
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.engine import estimate
from graft_pack.trainers.engine.oom_fallback import offload_blocks
from graft_pack.trainers.errors import ModelError
from graft_pack.trainers.memory import autograd, offload
from graft_pack.trainers.methods import ADAPTERS
from torch.utils import backend_registration

from tests.support import models, simulated_device
from tests.support.base import get_tiny_base
from tests.support.diffusers_host import make_dataset
from tests.support.forked import forked
from tests.support.pack import use_comfy
from tests.toy import host as toy

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this version of torch registers no device from Python",
)

STEPS = 2
CPU = torch.device("cpu")
# The device adds in another order than the CPU's fused kernels.
ROUNDING = 2e-5
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}
# Reads for which the host waits in a step: of the losses, and of the gradient's norm.
READS = 2
# A part of the message for each fallback, in their order.
FALLBACKS = (
    "moved other models and caches off",
    "turned on checkpointing",
    "limited the micro-batch",
    "offloaded the frozen weights",
)


def gpu():
    """Return the simulated GPU of this process."""
    return simulated_device.register()


@contextmanager
def training_on(device, family="SD1", state="NORMAL_VRAM", checkpointing=False, **fields):
    """Yield a Training of a family's network on a device."""
    with simulated_device.comfy_on(device, state):
        with models.in_training(models.patcher(family), family, checkpointing, **fields) as training:
            yield training


@contextmanager
def word_on(device, **fields):
    """Yield a Training of an embedding on a device."""
    with simulated_device.comfy_on(device), models.learning_word("SD1", **fields) as training:
        yield training


@contextmanager
def text_on(device, **fields):
    """Yield a Training of adapters on network and text encoder on a device."""
    with simulated_device.comfy_on(device), models.with_text("SD1", **fields) as training:
        yield training


def finish(training, folder, **fields):
    """Train to the end; return (losses, trained values on the CPU, state)."""
    state = models.train(training, folder, **{"steps": STEPS, "learning_rate": 1e-3, **fields})
    device = training.denoiser.device.type
    assert {one.device.type for one in state.trainables.values()} == {device}
    return state.losses, models.joined(one.cpu() for one in state.trainables.values()), state


def check_as_on_the_cpu(folder, make, **fields):
    """Train on the CPU and on the device; check that losses and weights are the same. Return the device's state."""
    found = []
    for device in (CPU, gpu().device):
        with make(device) as training:
            found.append(finish(training, folder / device.type, **fields))
    (plain, values, _), (losses, others, state) = found
    assert len(plain) == STEPS and losses == pytest.approx(plain, rel=ROUNDING)
    assert models.distance(others, values) <= 1e-3
    return state


# The device itself.


@forked
def test_operations_on_two_devices_raise():
    here, there = torch.ones(3, device=gpu().device), torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        here + there
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.nn.functional.linear(here, there[None])
    with pytest.raises(RuntimeError, match="generator"):
        here.normal_(generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        here.numpy()
    # A number is a number.
    assert (here + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]


@forked
def test_gradients_equal_those_of_the_cpu():
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4)
    )
    x = torch.randn(2, 3, 8, 8)
    network(x).pow(2).mean().backward()
    expected = [one.grad.clone() for one in network.parameters()]
    network.zero_grad()
    weight = network[0].weight
    network.to(gpu().device)
    assert weight is network[0].weight and weight.device == gpu().device
    network(x.to(gpu().device)).pow(2).mean().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        assert models.distance(parameter.grad.cpu(), gradient) <= 1e-5


@forked
def test_memory_is_counted_and_limited():
    device = gpu()
    before = device.live
    kept = torch.empty(1000, device=device.device)
    assert device.live - before == 4000
    view = kept[10:].view(-1, 10).t()
    assert device.live - before == 4000 and view.is_contiguous() is False
    del kept, view
    assert device.live == before
    with device.measured(before + 4000) as usage:
        first = torch.zeros(500, device=device.device)
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            torch.cat([first, first])
        assert usage.peak == before + 2000 and usage.short == 1


@pytest.mark.parametrize("place", ["kernel", "hook", "checkpoint", "function"])
@forked
def test_memory_errors_leave_the_backward(place):
    from torch.utils.checkpoint import checkpoint

    def fail(*args):
        raise torch.OutOfMemoryError("of a hook")

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        backward = staticmethod(fail)

    calls = []

    def recomputed(x):
        calls.append(x)
        return fail() if len(calls) == 2 else x * x

    device = gpu()
    x = torch.ones(3, device=device.device, requires_grad=True)
    if place == "kernel":
        y = (x * 2).expand(400, 3) * 1
    elif place == "hook":
        y = x * 2
        y.register_hook(fail)
    elif place == "checkpoint":
        y = checkpoint(recomputed, x * 2, use_reentrant=False)
    else:
        y = Failing.apply(x * 2)
    y = y.sum()
    with device.measured(device.live + 1000), pytest.raises(torch.OutOfMemoryError):
        y.backward()


@forked
def test_reads_by_the_host_are_counted():
    device = gpu()
    x = torch.arange(6.0, device=device.device)
    with device.measured() as usage:
        x.sum()
        x.reshape(2, 3).t().contiguous()
        assert not usage.reads
        x[0].item(), x.tolist(), x.cpu(), bool(x.any()), x.nonzero(), x[x > 2], torch.equal(x, x)
    assert [kind for kind, _ in usage.reads] == ["item", "copy", "copy", "item", "shape", "shape", "value"]
    with device.measured() as usage:
        torch.ones(5).to(device.device)
    assert usage.uploads == [20] and not usage.reads


@forked
def test_work_of_two_streams_needs_an_order():
    device = gpu()
    module = getattr(torch, simulated_device.NAME)
    main, side = module.current_stream(device.device), module.Stream(device.device)
    with device.measured() as usage:
        x = torch.empty(4, device=device.device)
        side.wait_stream(main)
        with module.stream(side):
            x.copy_(torch.ones(4), non_blocking=True)
            done = side.record_event()
        main.wait_event(done)
        assert x.sum().item() == 4 and not usage.hazards
        with module.stream(side):
            x.add_(1)
        assert len(usage.hazards) == 1 and "stream 1 writes what stream 0 uses" in usage.hazards[0]
        x + 1
        assert "stream 0 reads what stream 1 uses" in usage.hazards[1]
        del x
        assert "freed while stream 1" in usage.hazards[2]


# Training on it.


@pytest.mark.parametrize("method", ADAPTERS)
@forked
def test_adapter_types_train_as_on_the_cpu(method, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", method=method, rank=4))


@pytest.mark.parametrize("family", ["SD1", "SDXL", "SD3"])
@forked
def test_families_train_as_on_the_cpu(family, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, family))


OPTIONS = {
    "all linear": {"targets": "all linear"},
    "checkpointing": {"checkpointing": True},
    "EMA and accumulation": {"ema_decay": 0.9, "accumulation": 2},
    "Prodigy": {"optimizer": "Prodigy"},
    "Adafactor": {"optimizer": "Adafactor"},
    "clipping": {"max_grad_norm": 1e-3},
}


@pytest.mark.parametrize("name", OPTIONS)
@forked
def test_options_train_as_on_the_cpu(name, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", **OPTIONS[name]))


@pytest.mark.parametrize("fields", [{}, {"weight_dtype": "bf16", "optimizer": "Adafactor"}], ids=["fp32", "bf16"])
@forked
def test_all_weights_train_as_on_the_cpu(fields, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", **FULL, **fields), learning_rate=1e-4)


@forked
def test_an_embedding_trains_as_on_the_cpu(tmp_path):
    check_as_on_the_cpu(tmp_path, word_on)


@forked
def test_text_encoders_train_as_on_the_cpu(tmp_path):
    check_as_on_the_cpu(tmp_path, text_on)


@pytest.mark.parametrize("state", ["LOW_VRAM", "HIGH_VRAM"])
@forked
def test_states_of_comfyui_train_as_on_the_cpu(state, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", state))


@forked
def test_without_video_memory_offload_is_needed(tmp_path):
    def train(**fields):
        return check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", "NO_VRAM", **fields), **fields)

    with pytest.raises(ModelError, match="Switch offload on"):
        train()
    train(offload="on")


@forked
def test_prior_targets_train_as_on_the_cpu(tmp_path):
    @contextmanager
    def with_prior_targets(device):
        with training_on(device, "Flux") as training:
            items = []
            for one in training.plan.train:
                show = one.show
                other = models.conditioning("Flux", 7)

                def shown(visit, show=show, other=other):
                    sample = show(visit)
                    return replace(sample, prior_target=replace(sample, conditioning=other, factor=0.5))

                items.append(replace(one, show=shown, has_prior_target=True))
            yield replace(training, plan=replace(training.plan, train=items))

    check_as_on_the_cpu(tmp_path, with_prior_targets)


@forked
def test_validation_measures_as_on_the_cpu(tmp_path):
    @contextmanager
    def validating(device):
        with training_on(device, "Flux", validate_every=1) as training:
            yield replace(training, plan=replace(training.plan, validation=training.plan.train[:1]))

    check_as_on_the_cpu(tmp_path, validating)
    found = [
        [json.loads(line) for line in path.read_text().splitlines()] for path in tmp_path.glob("*/run/metrics.jsonl")
    ]
    losses = [[one["loss"] for one in events if one["event"] == "validation"] for events in found]
    assert len(losses) == 2 and len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], rel=ROUNDING)


@forked
def test_resume_is_bit_identical(tmp_path):
    fields = {"steps": 4, "optimizer": "AdamW", "ema_decay": 0.9}
    found = []
    for parts in ((4,), (2, 4)):
        for steps in parts:
            with training_on(gpu().device, "Flux", **fields, save_every=2) as training:
                done = finish(training, tmp_path / str(parts), resume=steps != parts[0], **{**fields, "steps": steps})
        found.append(done)
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


# Memory.


@forked
def test_offload_trains_as_on_the_cpu(tmp_path):
    device = gpu()
    with device.measured() as usage:
        check_as_on_the_cpu(tmp_path, lambda where: training_on(where, "SDXL", offload="on"), offload="on")
    assert not usage.hazards
    assert {kind for kind, _, _ in device.events} == {"record", "wait"}
    # From memory that other work of the host may use, the copy would wait.
    assert not [place for kind, place in usage.reads if kind == "synchronize"]


@forked
def test_two_offloaded_blocks_at_most_are_on_the_device():
    device = gpu()
    with training_on(device.device, "Flux", offload="on") as training:
        offload_blocks(training.plan, SimpleNamespace(folder=""), training.host)
        blocks = autograd.blocks_of(training.denoiser.module)
        weights = [[one for one in block.parameters() if offload.is_offloaded(one)] for block in blocks]
        sizes = sorted(sum(one.nbytes for one in held) for held in weights)
        assert all(one.device == CPU for held in weights for one in held)
        training.gradients()
        most = 0
        enter = offload.BlockPrefetcher.enter

        def watched(self, number):
            nonlocal most
            here = enter(self, number)
            coming = self._incoming[1]._there if self._incoming else []
            most = max(most, sum(one.nbytes for one in (*here, *coming)))
            return here

        offload.BlockPrefetcher.enter = watched
        with device.measured() as usage:
            training.gradients()
        assert 0 < most <= sum(sizes[-2:])
        assert not usage.hazards


def memory_of(folder, limit=None, **fields):
    """Train on the device with so much memory; return (peak, fallbacks in order, trained values)."""
    told = []
    # What an earlier training left in cycles of references counts too.
    gc.collect()
    with training_on(
        gpu().device, "Flux", report=lambda *event: told.append(event), batch_size=2, **fields
    ) as training:
        with gpu().measured(limit) as usage:
            _, values, _ = finish(training, folder, steps=1, offload=fields.get("offload", "auto"))
    return usage.peak, [payload["done"] for event, payload in told if event == "memory"], values


@forked
def test_fallbacks_are_tried_in_order_at_real_limits(tmp_path):
    """With a limit between the peaks of two fallbacks, all up to the second are tried, and none after it."""
    ways = [{}, {"checkpointing": True}, {"micro_batch": 1}, {"offload": "on"}]
    peaks = []
    fields = {}
    for number, way in enumerate(ways):
        fields |= way
        peak, done, values = memory_of(tmp_path / f"measured {number}", **fields)
        assert not done
        peaks.append(peak)
    assert peaks == sorted(peaks, reverse=True)
    for number in range(1, len(ways)):
        limit = (peaks[number - 1] + peaks[number]) // 2
        _, done, others = memory_of(tmp_path / f"limited {number}", limit)
        tried = [next(index for index, part in enumerate(FALLBACKS) if part in text) for text in done]
        assert list(dict.fromkeys(tried)) == list(range(number + 1)), (peaks, limit, done)
        assert models.distance(others, values) <= 1e-5


@forked
def test_estimate_predicts_the_peak(tmp_path):
    estimate._LEAST_STEPS = 1
    told = []
    device = gpu()
    with training_on(device.device, "Flux", report=lambda *event: told.append(event), batch_size=2) as training:
        with device.measured() as usage:
            finish(training, tmp_path)
    (found,) = [payload for event, payload in told if event == "estimate"]
    assert found["memory"] == pytest.approx(usage.peak, rel=0.1)


@forked
def test_a_step_waits_for_the_device_twice(tmp_path):
    device = gpu()
    reads = []

    def report(event, payload):
        if event == "step":
            reads.append(list(device.usage.reads))

    with training_on(device.device, "Flux", report=report) as training, device.measured():
        finish(training, tmp_path, steps=3)
    assert len(reads[2]) - len(reads[1]) == READS, reads[2][len(reads[1]) :]


# A whole run from nodes.


@forked
def test_a_run_from_nodes_equals_that_of_the_cpu():
    """ComfyUI's VAE encodes the pictures, and its sampler draws the previews."""
    from graft_pack.nodes.host.actions.train import TrainInputs, train
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.engine.resolve import Options

    drawn = []
    real = ComfyDenoiser.preview

    def preview(self, request):
        pictures = real(self, request)
        drawn.append([torch.from_numpy(np.array(one)).float() for one in pictures])
        return pictures

    ComfyDenoiser.preview = preview
    fields = {("preview", "prompts"): "red", ("preview", "steps"): 2, ("preview", "every"): STEPS}
    losses = []
    for device in (CPU, gpu().device):
        with simulated_device.comfy_on(device), torch.inference_mode():
            graph = toy.load(get_tiny_base(), use_comfy().path)
            options = Options({**fields, ("run", "name"): f"drawn on {device.type}"})
            done = train(*graph, make_dataset(2), TrainInputs("LoRA", STEPS, 1e-3, 4, 1, 0), options, "7")
            losses.append(done.loss["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(drawn) == 4 and drawn[0][0].std() > 1
    for one, other in zip(drawn[:2], drawn[2:], strict=True):
        assert all((a - b).abs().mean() <= 1 for a, b in zip(one, other, strict=True))
