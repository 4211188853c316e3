"""Tests that a run's estimate matches the cost of its steps, and that estimating does not change the run."""

import gc
import json
import mmap
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.data.examples import Augmentation
from graft_pack.trainers.engine import estimate as estimates
from graft_pack.trainers.memory import autograd, checkpointing, tracking
from graft_pack.trainers.optimizers import OPTIMIZERS
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION, EVERYTHING

from tests.support import diffusers_host, models

pytestmark = pytest.mark.usefixtures("comfy")

STEPS = 60
FEW = 4
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights", "max_grad_norm": 0.0}


def lora(name, **fields):
    return models.in_training(models.patcher(name), name, examples=4, **fields)


KINDS = {
    "SD1": lambda: lora("SD1", batch_size=1),
    "SD1, batch 4": lambda: lora("SD1", batch_size=4),
    "SD1, parts of a batch": lambda: lora("SD1", batch_size=4, micro_batch=2, accumulation=2),
    "checkpointed": lambda: lora("SD1", batch_size=4, checkpointing=True),
    "attention kept": lambda: lora("SD1", batch_size=4, checkpointing=True, recompute=ALL_BUT_ATTENTION),
    "linear + conv": lambda: lora("SD1", batch_size=2, targets="linear + conv", rank=16, alpha=16.0),
    "Flux": lambda: lora("Flux", batch_size=4),
    "SDXL, Prodigy, average": lambda: lora("SDXL", batch_size=2, optimizer="Prodigy", ema_decay=0.99),
    "DoRA": lambda: lora("SD3", batch_size=2, method="DoRA"),
    "dropout": lambda: lora("SD1", batch_size=2, dropout=0.2),
    "all weights": lambda: lora("SD1", batch_size=2, ema_decay=0.999, **FULL),
    "all weights, clipped": lambda: lora("SD1", batch_size=2, **{**FULL, "max_grad_norm": 1.0}),
    "all weights, bf16, Adafactor": lambda: lora(
        "SD1", batch_size=1, optimizer="Adafactor", beta1=0.0, beta2=0.0, weight_dtype="bf16", **FULL
    ),
    "text encoder": lambda: models.with_text("SD1", batch_size=2),
    "word": lambda: models.learning_word("SD1", batch_size=2),
}


class _Enough(Exception):
    """The exception that ends a training after its third step."""


def observed(training, folder, watched=(2, 4), **fields):
    """Return (the estimate event, peak bytes in the steps after the first)."""
    told = []
    weights = list(training.denoiser.module.parameters()) + list(training.denoiser.module.buffers())
    if training.plan.recipe.live_text:
        weights += list(training.host.text.module.parameters()) + list(training.host.text.module.buffers())
    counter = tracking.TensorTracker(weights)

    def report(event, payload):
        if event == "estimate":
            told.append(payload)
        if event == "step":
            if payload["step"] == watched[0] - 1:
                counter.__enter__()
            if payload["step"] == watched[1] - 1:
                counter.__exit__(None, None, None)
                raise _Enough

    training = replace(training, host=replace(training.host, report=report))
    with pytest.raises(_Enough):
        models.train(training, folder, **{"steps": STEPS, "save_every": STEPS, **fields})
    return told, counter.peak


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_told_within_15_percent(kind, tmp_path):
    with KINDS[kind]() as training:
        (told,), peak = observed(training, tmp_path)
    assert told["memory"] == pytest.approx(peak, rel=0.15)
    assert told["fits"] and told["seconds"] > 0 and told["cures"] == ()
    kept = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event["memory"] for event in kept if event["event"] == "estimate"] == [told["memory"]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_in_it(optimizer, tmp_path):
    kind = OPTIMIZERS[optimizer]
    fields = {"optimizer": optimizer, "beta1": kind.beta1, "beta2": kind.beta2}
    if optimizer == "pytorch-optimizer":
        fields["optimizer_args"] = (("name", "Yogi"),)
    with lora("SD3", batch_size=1, rank=256, alpha=32.0, spread=0.01, **fields) as training:
        (told,), peak = observed(training, tmp_path)
    assert told["memory"] == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("kind", ["SD1, parts of a batch", "dropout", "all weights", "text encoder"])
def test_the_run_is_the_same_to_the_bit(kind, tmp_path, monkeypatch):
    found = []
    for least in (FEW, FEW + 1):
        monkeypatch.setattr(estimates, "_LEAST_STEPS", least)
        with KINDS[kind]() as training:
            told = []
            host = replace(training.host, report=lambda event, payload, told=told: told.append(event))
            training = replace(training, host=host)
            state = models.train(training, tmp_path / str(least), steps=FEW)
            assert ("estimate" in told) == (least == FEW)
            assert all(one.grad is None for one in training.plan.trainables.values())
            found.append(models.joined(state.trainables.values()).clone())
    assert torch.equal(*found)


def told_of(training, free):
    """Return the estimates that a device with so many free bytes reports."""
    training.denoiser.free_memory = lambda: free
    told = []

    def report(event, payload):
        if event == "estimate":
            told.append(payload)
            raise _Enough

    training = replace(training, host=replace(training.host, report=report))
    return training, told


def test_what_would_fit_is_told_in_the_order_of_its_cost(tmp_path):
    steps = [
        (),
        ("checkpointing", "recompute all but attention"),
        ("checkpointing",),
        ("checkpointing", "micro_batch 2"),
        ("checkpointing", "micro_batch 1"),
    ]
    free = 1 << 40
    with KINDS["Flux"]() as training:
        for cures in steps:
            told = asked(training, free, tmp_path)
            assert told["cures"] == cures
            assert told["fits"] == (not cures) and (told["seconds"] is None) == bool(cures)
            with applied(training, cures) as changed:
                needed = asked(changed, 1 << 40, tmp_path)["missing"]
            assert needed <= free, "with what was advised it fits"
            free = needed - 1
        last = asked(training, free, tmp_path)
        assert last["cures"] == ("checkpointing", "micro_batch 1", "offload")
        told = [last["cures"]]
        while told[-1]:
            free -= 20_000
            told.append(asked(training, free, tmp_path)["cures"])
        assert list(dict.fromkeys(told)) == [last["cures"], (*last["cures"], "base_dtype nf4"), ()]
        assert asked(training, -(1 << 40), tmp_path)["cures"] == ()
        # The search leaves nothing behind.
        assert not any(checkpointing.is_checkpointed(block) for block in autograd.blocks_of(training.denoiser.module))


@pytest.mark.parametrize("fields, is_cure", [({}, True), ({**FULL, "targets": "attention"}, False)])
def test_nf4_is_no_cure_where_all_weights_are_trained(fields, is_cure, tmp_path, monkeypatch):
    """Such a run refuses base_dtype, even if it leaves most weights frozen."""
    monkeypatch.setattr(estimates, "saved_by_nf4", lambda block, frozen: ((1 << 42) * bool(frozen), 0))
    with lora("SD1", batch_size=1, **fields) as training:
        cures = asked(training, -(1 << 40), tmp_path)["cures"]
    assert ("base_dtype nf4" in cures) == is_cure


def asked(training, free, folder):
    training, told = told_of(training, free)
    with pytest.raises(_Enough):
        models.train(training, folder, steps=STEPS)
    return told[0]


@contextmanager
def applied(training, cures):
    """Yield the training with the advised options applied."""
    size = next((int(cure.split()[1]) for cure in cures if cure.startswith("micro_batch")), 0)
    recipe = replace(training.plan.recipe, micro_batch=size)
    blocks = autograd.blocks_of(training.denoiser.module) if "checkpointing" in cures else []
    with checkpointing.checkpointed(blocks, "recompute all but attention" in cures):
        yield replace(training, plan=replace(training.plan, recipe=recipe))


@pytest.mark.parametrize(
    "size, fits, cures",
    [
        (1, lambda x_t, on, kept: on, ("checkpointing", "recompute all but attention")),
        (1, lambda x_t, on, kept: on and not kept, ("checkpointing",)),
        (2, lambda x_t, on, kept: len(x_t) == 1, ("checkpointing", "micro_batch 1")),
        (2, lambda x_t, on, kept: False, ()),
    ],
    ids=["attention kept", "checkpointed", "one alone", "never"],
)
@pytest.mark.parametrize("free", [1 << 40, None])
def test_memory_that_runs_out_while_measuring_is_no_end(size, fits, cures, free, tmp_path, caplog):
    with lora("SD1", batch_size=size) as training:
        blocks = autograd.blocks_of(training.denoiser.module)
        predict = training.denoiser.predict

        def short(x_t, sigma, conditioning):
            on = all(checkpointing.is_checkpointed(block) for block in blocks)
            if not fits(x_t, on, any(checkpointing.keeps_attention(block) for block in blocks)):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return predict(x_t, sigma, conditioning)

        training.denoiser.predict = short
        told = asked(training, free, tmp_path)
    assert (told["fits"], told["memory"], told["missing"], told["cures"]) == (False, None, None, cures)
    assert "more memory than the device has" in caplog.text
    assert ("it would fit with" if cures else "no known option helps") in caplog.text


@pytest.mark.parametrize(
    "wanted, on, cures",
    [
        (EVERYTHING, False, ("checkpointing",)),
        (EVERYTHING, True, ("micro_batch 1",)),
        (ALL_BUT_ATTENTION, False, ("checkpointing", "recompute everything")),
        (ALL_BUT_ATTENTION, True, ("recompute everything",)),
    ],
)
def test_what_is_forgotten_already_is_no_advice(wanted, on, cures, tmp_path):
    splits = cures == ("micro_batch 1",)
    with lora("SD1", batch_size=1 + splits, checkpointing=on, recompute=wanted) as training:
        blocks = autograd.blocks_of(training.denoiser.module)
        predict = training.denoiser.predict

        def short(x_t, *args):
            forgets = all(
                checkpointing.is_checkpointed(one) and not checkpointing.keeps_attention(one) for one in blocks
            )
            if not forgets or len(x_t) > 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return predict(x_t, *args)

        training.denoiser.predict = short
        assert asked(training, 1 << 40, tmp_path)["cures"] == cures
        assert {checkpointing.keeps_attention(block) for block in blocks} == {on and wanted == ALL_BUT_ATTENTION}


def test_where_nobody_knows_what_is_free_nothing_is_said_of_it(tmp_path):
    with KINDS["SD1"]() as training:
        told = asked(training, None, tmp_path)
    assert told["fits"] and told["seconds"] > 0 and told["free"] is None and told["memory"] > 0


def test_checkpointing_for_a_while_leaves_blocks_as_they_were():
    """One has its own forward, as an adapted layer that is itself a block has."""
    blocks = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    own = blocks[1].forward = lambda x: 2 * x
    checkpointing.checkpoint_blocks(blocks[2:])
    before = blocks[2].forward
    for keep in (True, False):
        with checkpointing.checkpointed(blocks, keep):
            assert all(checkpointing.is_checkpointed(block) for block in blocks)
            assert [checkpointing.keeps_attention(block) for block in blocks] == [keep] * 3
    assert not checkpointing.keeps_attention(blocks[2])
    assert "forward" not in vars(blocks[0])
    assert blocks[1].forward is own
    assert blocks[2].forward is before


def test_only_what_the_run_will_show_is_tried(tmp_path, monkeypatch):
    """No other captions are encoded."""
    monkeypatch.setattr(estimates, "_LEAST_STEPS", 1)
    dataset = diffusers_host.make_dataset(12)
    handling = Augmentation(wildcards=True, caption_variants=8)
    varied = [(f"{number} {{a|b|c|d|e|f|g|h}} {{i|j|k|l|m|n|o|p}}",) for number in range(12)]
    rows = zip(dataset.examples, varied, strict=True)
    dataset = replace(dataset, examples=tuple(replace(one, captions=row, handling=handling) for one, row in rows))
    told = []

    def report(event, payload):
        told.extend([payload] if event == "estimate" else [])

    diffusers_host.run_session(tmp_path, report, dataset=dataset, steps=1, batch_size=3)
    assert told and told[0]["fits"]


def test_few_steps_tell_by_themselves(tmp_path):
    with KINDS["SD1"]() as training:
        told = []
        training = replace(training, host=replace(training.host, report=lambda event, payload: told.append(event)))
        models.train(training, tmp_path, steps=3)
    assert "estimate" not in told


def test_what_cannot_be_measured_is_no_end_either(tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no such kernel")

    with KINDS["SD1"]() as training:
        monkeypatch.setattr(tracking.DevicePeakMemory, "peak_of", broken)
        with caplog.at_level("INFO"):
            assert models.train(training, tmp_path, steps=50, save_every=50).step == 50
    assert "cannot measure the memory and the time of a step: no such kernel" in caplog.text


def test_a_device_that_keeps_account_is_asked(monkeypatch):
    """No such device is here, so the test records the calls to one."""
    asked_for = []

    class Kind:
        @staticmethod
        def reset_peak_memory_stats(device):
            asked_for.append("reset")

        @staticmethod
        def memory_allocated(device):
            asked_for.append("now")
            return 100

        @staticmethod
        def max_memory_allocated(device):
            asked_for.append("peak")
            return 175

    monkeypatch.setattr(torch, "cuda", Kind)
    account = tracking.DevicePeakMemory(torch.device("cuda"))
    found = account.peak_of(lambda: asked_for.append("work"), [torch.zeros(8)])
    assert found == 75 + 32
    assert asked_for == ["now", "reset", "work", "peak"]


SIZE = 200 * 1024 * 1024

# The system's report on a process that resets its peak memory, then takes some memory and frees it.
ASKED = f"""
def told(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

bytearray(b"x") * {2 * SIZE}
open("/proc/self/clear_refs", "w").write("5")
before = told("VmRSS")
bytearray(b"x") * {SIZE}
print(told("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def told_by_system():
    """Skip if the system does not report a process's peak memory since a moment."""
    found = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True)
    if found.returncode or int(found.stdout) != pytest.approx(SIZE, rel=0.1):
        pytest.skip(f"this system does not tell what a process has taken at the most: {found.stdout or found.stderr}")


def taken():
    """Return memory fresh from the system, because an allocation may reuse memory that the process freed before."""
    region = mmap.mmap(-1, SIZE)
    for _ in range(SIZE >> 20):
        region.write(b"x" * (1 << 20))
    return region


@pytest.mark.usefixtures("told_by_system")
def test_on_a_cpu_the_system_sees_what_is_no_tensor():
    """Some libraries allocate memory themselves during an operation."""
    account = tracking.DevicePeakMemory(torch.device("cpu"))
    found = account.peak_of(taken, [torch.zeros(8)])
    assert found == pytest.approx(SIZE, rel=0.1)
    assert account.peak_of(lambda: torch.ones(256), [torch.zeros(8)]) == 32 + 1024


@pytest.mark.usefixtures("told_by_system")
def test_what_is_only_collected_while_it_is_measured_hides_nothing():
    garbage = [taken()]
    garbage.append(garbage)
    del garbage
    account = tracking.DevicePeakMemory(torch.device("cpu"))

    def work():
        gc.collect()
        return taken()

    assert account.peak_of(work, []) == pytest.approx(SIZE, rel=0.1)


@pytest.mark.parametrize("lacks", ["begin again", "the largest", "forget the largest"])
def test_where_the_system_tells_nothing_tensors_are_counted(monkeypatch, lacks):
    told = {"VmRSS": SIZE, "VmHWM": 3 * SIZE if lacks == "forget the largest" else SIZE}
    if lacks == "the largest":
        del told["VmHWM"]

    class System:
        def __init__(self, path):
            self._path = path

        def read_text(self):
            return "".join(f"{field}:\t{size // 1024} kB\n" for field, size in told.items())

        def write_text(self, text):
            if lacks == "begin again":
                raise PermissionError(13, "no", self._path)

    monkeypatch.setattr(tracking, "Path", System)
    account = tracking.DevicePeakMemory(torch.device("cpu"))
    assert account.peak_of(lambda: torch.ones(256), [torch.zeros(8)]) == 32 + 1024
