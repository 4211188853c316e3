"""Tests of training on a device that is not the CPU: losses, bits after resuming, memory, reads, streams.

Each test runs in a process of its own, because the device stays registered.
"""

import gc
import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.engine import estimate, loop
from graft_pack.trainers.engine.oom_fallback import offload_blocks
from graft_pack.trainers.errors import ModelError, NumbersError
from graft_pack.trainers.memory import autograd, offload, transfer
from graft_pack.trainers.methods import ADAPTERS
from graft_pack.trainers.recipe.options import BASE_DTYPES
from graft_pack.trainers.recipe.parsing import parse_arguments
from graft_pack.trainers.runs.run import Run
from graft_pack.trainers.steps.step import predict_sample
from torch.utils import backend_registration

from benchmarks.full_size import Work
from tests.support import models, simulated_device
from tests.support.base import get_tiny_base
from tests.support.diffusers_host import make_dataset, same_state
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


@forked
def test_without_pinned_memory_copies_wait():
    """The system limits pinned memory."""

    def fail(tensor):
        raise RuntimeError("CUDA error: out of memory")

    device = gpu()
    assert transfer.copies_in_queue(device.device)
    torch.Tensor.pin_memory = fail
    with device.measured() as usage:
        values = transfer.upload(torch.ones(3), device.device)
        assert transfer.HostCopy(values * 2, later=True).read() == [2.0, 2.0, 2.0]
    assert len(usage.blocking) == 1 and [kind for kind, _ in usage.reads] == ["copy"]


# Training on it.


@pytest.mark.parametrize("method", ADAPTERS)
@forked
def test_adapter_types_train_as_on_the_cpu(method, tmp_path):
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "Flux", method=method, rank=4))


@pytest.mark.parametrize(
    "method, arguments",
    [*((kind, "use_tucker=true") for kind in ("LoRA", "LoHa", "LoKr")), ("LoRA", "train_norm=true train_bias=true")],
)
@forked
def test_variants_train_as_on_the_cpu(method, arguments, tmp_path):
    fields = {"adapter_args": parse_arguments(arguments), "targets": "linear + conv", "rank": 4}
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, "SD1", method=method, **fields))


@forked
def test_eva_starts_as_on_the_cpu():
    from graft_pack.trainers.engine.preflight import start_at_inputs

    started = []
    for device in (CPU, gpu().device):
        with training_on(device, "Flux", adapter_args=(("eva", True),), rank=4) as training:
            before = models.joined(one.detach().cpu().clone() for one in training.plan.trainables.values())
            start_at_inputs(training.plan, training.host)
            started.append(models.joined(one.detach().cpu() for one in training.plan.trainables.values()))
            assert models.distance(started[-1], before) > 0.5
    # The last directions of few inputs are within rounding of each other.
    assert models.distance(started[1], started[0]) <= 1e-3


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
def test_encoded_prompts_train_as_on_the_cpu(tmp_path):
    """Their latents in lists move to the device too."""

    @contextmanager
    def with_encoded_prompts(device):
        from graft_pack.nodes.host.model.encoded_prompts import encoded_prompts

        text = models.conditioning("Flux", 7).tensors
        more = {"guidance": 4.0, "reference_latents": [torch.ones(1, 16, 6, 8)], **text}
        (prompt,) = encoded_prompts([[[more.pop("cross_attn"), more]]])
        with training_on(device, "Flux") as training:
            samples = [one.show(None) for one in training.plan.train]
            told = [replace(one, conditioning=replace(one.conditioning, tensors=prompt.tensors)) for one in samples]
            items = [
                replace(item, show=lambda visit, one=one: one)
                for item, one in zip(training.plan.train, told, strict=True)
            ]
            yield replace(training, plan=replace(training.plan, train=items))

    check_as_on_the_cpu(tmp_path, with_encoded_prompts)


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


RESUMED = {
    "LoRA": (training_on, {"optimizer": "AdamW", "ema_decay": 0.9}),
    "fp16": (training_on, {"compute_dtype": "fp16"}),
    "Prodigy": (training_on, {"optimizer": "Prodigy"}),
    "all weights": (training_on, FULL),
    "offload": (training_on, {"offload": "on"}),
    "an embedding": (word_on, {}),
    "text encoders": (text_on, {}),
}


@pytest.mark.parametrize("kind", RESUMED)
@forked
def test_resume_is_bit_identical(kind, tmp_path):
    make, fields = RESUMED[kind]
    found = []
    for parts in ((3,), (2, 3)):
        for steps in parts:
            with make(gpu().device, **fields) as training:
                more = {"steps": steps, "save_every": 2, "offload": fields.get("offload", "auto")}
                done = finish(training, tmp_path / str(parts), resume=steps != parts[0], **more)
        log = (tmp_path / str(parts) / "run" / "metrics.jsonl").read_text().splitlines()
        events = [{**json.loads(line), "seconds": 0, "steps": 0} for line in log]
        found.append((done, [event for event in events if event["event"] == "step"]))
    (whole, log), (resumed, other_log) = found
    assert whole[0] == resumed[0] and torch.equal(whole[1], resumed[1])
    assert log == other_log and [event["step"] for event in log] == [1, 2, 3]


# Memory.


@forked
def test_offload_trains_as_on_the_cpu(tmp_path):
    device = gpu()
    with device.measured() as usage:
        check_as_on_the_cpu(tmp_path, lambda where: training_on(where, "SDXL", offload="on"), offload="on")
    assert not usage.hazards
    assert {kind for kind, _, _ in device.events} == {"record", "wait"}
    # The host waits once, before it unpins the weights at the end; the copies themselves do not wait.
    waits = [place for kind, place in usage.reads if kind == "synchronize"]
    assert len(waits) == 1 and waits[0].startswith("nodes/host/model/placement.py")
    assert not [place for place in usage.blocking if "memory/transfer.py" in place]


@pytest.mark.parametrize("offloaded", ["off", "on"])
@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
@forked
def test_a_quantized_base_trains_as_on_the_cpu(base_dtype, offloaded, tmp_path):
    fields = {"base_dtype": base_dtype, "offload": offloaded}
    check_as_on_the_cpu(tmp_path, lambda where: training_on(where, "SD3", **fields), **fields)


@forked
def test_a_prediction_with_fetched_blocks_is_that_of_the_cpu():
    """The blocks' weights stay off the device, and no trace of the fetching is left."""
    found = []
    for device in (CPU, gpu().device):
        with training_on(device, "SD3", offload="on") as training:
            tree = training.denoiser.module
            # The adapters lie beside the weights so far.
            offload.place(tree, device)
            with offload.fetched(tree, device):
                found.append(predict_sample(training.plan.train[0].show(None), training.plan.recipe, training.host))
            blocks = autograd.blocks_of(tree)
            weights = [weight for block in blocks for weight in block.parameters() if not weight.requires_grad]
            assert {weight.device for weight in weights} == {CPU}
            assert not [block for block in blocks if "forward" in vars(block)]
    assert models.distance(found[1].cpu(), found[0]) <= ROUNDING


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


def read_in_a_step(make, folder, step=2, **fields):
    """Train on the device. Return (reads, lags, blocking uploads) from the report of a step to that of the next."""
    device = gpu()
    seen = []

    def report(event, payload):
        if event == "step":
            usage = device.usage
            seen.append((list(usage.reads), list(usage.lags), list(usage.blocking)))

    with make(device.device) as training:
        reporting = replace(training, host=replace(training.host, report=report))
        with device.measured() as usage:
            finish(reporting, folder, **{"steps": step + 2, **fields})
    assert not usage.hazards
    return tuple(after[len(before) :] for before, after in zip(seen[step - 1], seen[step], strict=True))


# Options with which the device masks the update of a step that is refused or skipped.
MASKED = {
    "AdamW": {},
    "accumulation": {"accumulation": 2, "max_grad_norm": 1e-3, "ema_decay": 0.9},
    "micro-batches": {"batch_size": 2, "micro_batch": 1, "max_grad_norm": 0.0, "loss_spike_factor": 10.0},
    "fp16": {"compute_dtype": "fp16"},
    "offload": {"offload": "on"},
    "DoRA": {"method": "DoRA", "dropout": 0.1},
}


@pytest.mark.parametrize("name", MASKED)
@forked
def test_a_step_reads_the_numbers_of_the_step_before(name, tmp_path):
    """The host reads once, while the operations of the next step are queued behind what it reads."""
    fields = MASKED[name]
    reads, lags, blocking = read_in_a_step(
        lambda device: training_on(device, "Flux", **fields), tmp_path, offload=fields.get("offload", "auto")
    )
    assert [kind for kind, _ in reads] == ["event"], reads
    assert lags[0] > 500
    assert not blocking, blocking


PARTS = {"an embedding": word_on, "text encoders": text_on}


@pytest.mark.parametrize("part", PARTS)
@forked
def test_training_of_text_reads_once(part, tmp_path):
    reads, lags, blocking = read_in_a_step(PARTS[part], tmp_path)
    assert [kind for kind, _ in reads] == ["event"], reads
    assert lags[0] > 200
    assert not blocking, blocking


# Classes whose inputs ComfyUI prepares in different ways.
PREPARED = [
    "SD15",
    "SDXL",
    "SD15_instructpix2pix",
    "SD3",
    "PixArtAlpha",
    "Chroma",
    "Lumina2",
    "Omnigen2",
    "QwenImage",
]


@pytest.mark.parametrize("family", PREPARED)
@forked
def test_classes_train_without_waiting(family, tmp_path):
    """They compute as on the CPU. Neither ComfyUI nor Graft waits for the device to prepare their inputs."""
    check_as_on_the_cpu(tmp_path, lambda device: training_on(device, family))
    reads, _, blocking = read_in_a_step(lambda device: training_on(device, family), tmp_path / "read")
    assert [kind for kind, _ in reads] == ["event"], reads
    assert not blocking, blocking


# Options with which the host decides about the update, and so reads before it.
AT_ONCE = {
    "Adafactor": {"optimizer": "Adafactor"},
    "bf16 weights": {**FULL, "weight_dtype": "bf16", "max_grad_norm": 1.0},
}


@pytest.mark.parametrize("name", AT_ONCE)
@forked
def test_a_step_that_cannot_be_masked_reads_twice_before_it(name, tmp_path):
    """The losses, while a fallback can still repeat the step, and the norm."""
    fields = AT_ONCE[name]
    reads, _, _ = read_in_a_step(lambda device: training_on(device, "Flux", **fields), tmp_path, learning_rate=1e-4)
    assert [kind for kind, _ in reads] == ["copy", "copy"], reads


@forked
def test_a_step_that_updates_within_the_backward_reads_thrice(tmp_path):
    """The loss before the backward; after it the losses, while memory errors have a message, and the norms."""
    reads, _, _ = read_in_a_step(lambda device: training_on(device, "Flux", **FULL), tmp_path, learning_rate=1e-4)
    assert [kind for kind, _ in reads] == ["item", "copy", "copy"], reads


@pytest.mark.parametrize("in_gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("fields", [{}, {"compute_dtype": "fp16"}], ids=["fp32", "fp16"])
@forked
def test_a_refused_step_leaves_the_state_before_it(fields, in_gradient, tmp_path):
    """The device has masked the update, and computed the next step, when the host reads that the loss is not finite."""
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    real = ComfyDenoiser.predict
    calls = 0

    def sick(self, x_t, sigma, conditioning):
        nonlocal calls
        output = real(self, x_t, sigma, conditioning)
        calls += torch.is_grad_enabled()
        if not torch.is_grad_enabled() or calls != 3:
            return output
        return output + (output.sum() * 0).sqrt() if in_gradient else output * float("nan")

    fields = {"ema_decay": 0.9, "batch_size": 2, **fields}
    refused = not in_gradient or "compute_dtype" not in fields
    states = []
    for folder, predict in ((tmp_path / "sick", sick), (tmp_path / "sound", real)):
        ComfyDenoiser.predict = predict
        with training_on(gpu().device, "Flux", **fields) as training:
            context = pytest.raises(NumbersError, match="of step 3") if refused and predict is sick else nullcontext()
            with context:
                finish(training, folder, steps=5, save_every=1 if predict is real else 100, keep_last=9)
        run = Run(str(folder / "run"), str(folder / "adapters"), str(folder / "embeddings"))
        states.append(run.load(2 if refused else 5))
    assert calls == (4 if refused else 5)
    assert (states[0].step, states[0].scaler) == (states[1].step, states[1].scaler) or not refused
    if refused:
        assert same_state(*states)
    else:
        # An infinite gradient is normal in fp16: the loss scaler halves its factor and skips the step.
        assert states[0].scaler["scale"] == states[1].scaler["scale"] / 2


@forked
def test_a_spike_is_skipped_by_the_device(tmp_path):
    limit = loop.loss_limit
    loop.loss_limit = lambda losses, factor: 1e-6 if len(losses) == 2 else limit(losses, factor)
    with training_on(gpu().device, "Flux") as training:
        finish(training, tmp_path, steps=4, save_every=1, keep_last=9, ema_decay=0.9)
    run = Run(str(tmp_path / "run"), str(tmp_path / "adapters"), str(tmp_path / "embeddings"))
    states = [run.load(step) for step in (2, 3, 4)]
    values = [models.joined(state.trainables.values()) for state in states]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    assert [state.ema_updates for state in states] == [2, 2, 3]
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "spike"] == [3]


@forked
def test_the_update_of_a_step_takes_few_launches(tmp_path):
    """Clipping, the mask, AdamW, EMA and the step's numbers; a foreach call counts as one."""
    counts = []
    real = loop._Trainer.update

    def update(self):
        with Work() as work:
            real(self)
        counts.append(work)

    loop._Trainer.update = update
    with training_on(gpu().device, "Flux", ema_decay=0.9, lora_plus_ratio=4.0) as training:
        assert len(training.plan.trainables) > 20
        finish(training, tmp_path, steps=3)
    print(counts[2].launches, counts[2].names)
    assert counts[2].launches <= 80


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


@forked
def test_dreambooth_from_nodes_equals_that_of_the_cpu(tmp_path):
    """Each draws its own class images with ComfyUI's sampler."""
    from graft_pack.nodes.host.actions import dreambooth
    from graft_pack.nodes.host.actions.train import TrainInputs
    from graft_pack.trainers.engine.resolve import Options

    name = str(tmp_path).replace("/", " ")
    subject = dreambooth.Subject(f"a photo of sks {name}", f"a photo of a {name}", 2, 1.0, "class images")
    losses, texts = [], []
    for device in (gpu().device, CPU):
        with simulated_device.comfy_on(device), torch.inference_mode():
            graph = toy.load(get_tiny_base(), use_comfy().path)
            inputs = TrainInputs("LoRA", STEPS, 1e-3, 4, 1, 0)
            options = Options({("run", "name"): f"subject on {device.type}"})
            done = dreambooth.train(*graph, make_dataset(2), subject, inputs, options, "7")
            losses.append(done.loss["loss"])
            texts.append(" ".join(done.ui["text"]))
    assert all("2 drawn" in text for text in texts), texts
    assert len(losses[0]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-3)
