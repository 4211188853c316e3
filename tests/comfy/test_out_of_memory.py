"""Tests of the out-of-memory fallbacks: the step repeats, and the weights equal those of a run with enough memory."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.engine import loop
from graft_pack.trainers.engine.oom_fallback import OOMFallback
from graft_pack.trainers.errors import OutOfMemory, is_out_of_memory
from graft_pack.trainers.memory import autograd, checkpointing
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION, AS_IT_IS, EVERYTHING, FP8, NF4

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

STEPS = 4
RUNGS = ("free", "checkpointing", "micro_batch", "offload")
# A part of the message for each fallback.
SAID = {
    "free": "moved other models and caches off",
    "checkpointing": "turned on checkpointing",
    "micro_batch": "limited the micro-batch",
    "offload": "offloaded the frozen weights",
}


def lora(name, **fields):
    """Return a LoRA training on a model of that name."""
    return models.in_training(models.patcher(name), name, examples=4, **fields)


def with_text(**fields):
    """Return a LoRA training on the network and its text encoder."""
    return models.with_text("SD1", **{"batch_size": 2, **fields})


def word(**fields):
    """Return a training of an embedding alone."""
    return models.learning_word("SD1", **{"batch_size": 2, **fields})


KINDS = {
    "SD1": lambda: lora("SD1", batch_size=4),
    "Flux": lambda: lora("Flux", batch_size=4),
    "Flux in small parts": lambda: lora("Flux", batch_size=4, accumulation=2, micro_batch=3),
    "DoRA": lambda: lora("SD1", batch_size=4, method="DoRA"),
    "text encoder": with_text,
    "word": word,
}


class Device:
    """A device with limited memory that raises torch's own error for anything larger.

    Args:
        rung: the fallback that makes the step fit; None for enough memory.
        place: "forward", "backward", or "later" for a forward after a backward of the same step.
    """

    def __init__(self, training, rung, place="forward"):
        self._training = training
        self._rung = rung
        self._place = place
        self._freed = False
        self.short = 0
        self._predict = training.denoiser.predict
        self._make_room = training.denoiser.make_room
        training.denoiser.predict = self._watched
        training.denoiser.make_room = self._watched_room

    def _watched_room(self, weights=False):
        self._freed = True
        self._make_room(weights)

    def _watched(self, x_t, sigma, conditioning):
        found = self._predict(x_t, sigma, conditioning)
        if self.fits(x_t) or not torch.is_grad_enabled():
            return found
        if self._place == "later" and all(one.grad is None for one in self._training.plan.trainables.values()):
            return found
        if self._place != "backward":
            self._fail()
        found.register_hook(lambda gradient: self._fail())
        return found

    def fits(self, x_t):
        """Report whether a forward with this input fits into memory."""
        if self._rung is None:
            return True
        blocks = autograd.blocks_of(self._training.denoiser.module)
        weights = [weight for block in blocks for weight in block.parameters()]
        return {
            "free": self._freed,
            "checkpointing": all(checkpointing.is_checkpointed(block) for block in blocks),
            "attention": all(
                checkpointing.is_checkpointed(one) and not checkpointing.keeps_attention(one) for one in blocks
            ),
            "micro_batch": len(x_t) == 1,
            "offload": any(hasattr(weight, "graft_offloaded") for weight in weights),
            "nothing": False,
        }[self._rung]

    def _fail(self):
        self.short += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nSee the documentation.")


def reporting(training, report):
    """Return the training with another report function."""
    return replace(training, host=replace(training.host, report=report))


def trained(kind, folder, rung, place="forward", **fields):
    """Return (final values, sent events, logged events) of a training whose memory needs a fallback."""
    told = []
    with KINDS[kind]() as training:
        training = reporting(training, lambda event, payload: told.append((event, payload)))
        device = Device(training, rung, place)
        state = models.train(training, folder, steps=STEPS, learning_rate=1e-3, **fields)
        assert (device.short > 0) == (rung is not None)
        kept = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        values = models.joined(state.trainables.values()).clone()
    return values, told, kept


@pytest.fixture(scope="module")
def enough(tmp_path_factory):
    """Return a function of the final values with enough memory, computed once per kind."""
    found = {}

    def of(kind):
        if kind not in found:
            found[kind] = trained(kind, tmp_path_factory.mktemp("enough"), None)[0]
        return found[kind]

    return of


@pytest.mark.parametrize("rung, place", zip(RUNGS, ("backward", "forward", "backward", "forward"), strict=True))
@pytest.mark.parametrize("kind", KINDS)
def test_each_rung_ends_with_the_same_weights(kind, rung, place, enough, tmp_path):
    """At the same effective batch, to 1e-5; each fallback is reported once, in order."""
    values, told, kept = trained(kind, tmp_path, rung, place)
    assert models.distance(values, enough(kind)) <= 1e-5
    done = [payload["done"] for event, payload in told if event == "memory"]
    assert SAID[rung] in done[-1]
    assert len(done) == len(set(done))
    climbed = [next(rung for rung in RUNGS if SAID[rung] in one) for one in done]
    assert climbed == sorted(climbed, key=RUNGS.index)
    assert [event["done"] for event in kept if event["event"] == "memory"] == done
    assert all("CUDA out of memory" in event["said"] for event in kept if event["event"] == "memory")
    assert [event["step"] for event in kept if event["event"] == "step"] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_that_is_kept_is_given_up_before_anything_else(checkpointing, enough, tmp_path):
    told = []
    with lora("SD1", batch_size=4, checkpointing=checkpointing, recompute=ALL_BUT_ATTENTION) as training:
        training = reporting(training, lambda event, payload: told.append((event, payload)))
        Device(training, "attention", "backward")
        state = models.train(training, tmp_path, steps=STEPS, learning_rate=1e-3)
        assert models.distance(models.joined(state.trainables.values()), enough("SD1")) <= 1e-5
    done = [payload["done"].split(" for ")[0].split(" in ")[0] for event, payload in told if event == "memory"]
    assert done[0] == "moved other models and caches off the device"
    assert done[1:] == ["turned on checkpointing"] * (not checkpointing) + ["turned on the recomputation of attention"]


@pytest.mark.parametrize("rung", ["free", "checkpointing", "offload"])
def test_gradients_of_a_step_that_failed_are_not_kept(rung, enough, tmp_path):
    """The step fails half way, after some of its pictures have added their gradients."""
    values, told, _ = trained("Flux in small parts", tmp_path, rung, "later")
    assert models.distance(values, enough("Flux in small parts")) <= 1e-5


@pytest.mark.parametrize("kind", ["SD1", "Flux in small parts"])
def test_short_again_later_it_climbs_on(kind, enough, tmp_path):
    """A fallback that sufficed at first may not suffice for a larger bucket, or beside another program."""
    told = []
    with KINDS[kind]() as training:
        training = reporting(training, lambda event, payload: told.append((event, payload)))
        device = Device(training, None)
        needed = {2: "checkpointing", 3: "offload"}
        original = loop.accumulate_gradients

        def gradients(plan, host, window, *given):
            device._rung = needed.get(window.step, device._rung)
            return original(plan, host, window, *given)

        loop.accumulate_gradients = gradients
        try:
            state = models.train(training, tmp_path, steps=STEPS, learning_rate=1e-3)
        finally:
            loop.accumulate_gradients = original
        values = models.joined(state.trainables.values()).clone()
    assert models.distance(values, enough(kind)) <= 1e-5
    steps = [payload["step"] for event, payload in told if event == "memory"]
    assert steps[:2] == [3, 3] and set(steps[2:]) == {4}


def test_nothing_left_says_what_fits_and_keeps_what_there_is(tmp_path, enough):
    """The step before is saved; with memory again the run resumes to the same bits."""
    with KINDS["SD1"]() as training:
        device = Device(training, None)
        device.fits = lambda x_t: step["reached"] < 2 or x_t.shape[-1] <= models.SIZES["SD1"].latent[-1] // 2
        step = {"reached": 0}

        def report(event, payload):
            if event == "step":
                step["reached"] = payload["step"]

        training = reporting(training, report)
        with pytest.raises(OutOfMemory, match="Memory ran out in step 3") as error:
            models.train(training, tmp_path, steps=STEPS, learning_rate=1e-3)
    text = str(error.value)
    for said in SAID.values():
        assert said in text
    # Half of 64 x 64.
    assert "Pictures of 32 x 32 fit" in text
    assert "resolution" in text and "set base_dtype to nf4" in text
    with KINDS["SD1"]() as training:
        state = models.train(training, tmp_path, resume=True, steps=STEPS, learning_rate=1e-3)
        assert torch.equal(models.joined(state.trainables.values()), enough("SD1"))


@pytest.mark.parametrize(
    "checkpointing, recompute, cure",
    [
        (False, EVERYTHING, "set checkpointing to on"),
        (True, ALL_BUT_ATTENTION, "set recompute to everything"),
        (True, EVERYTHING, None),
    ],
)
def test_with_weights_in_shares_the_error_names_what_takes_less(checkpointing, recompute, cure):
    """With shards, no fallback runs within a step."""
    with lora("SD1", checkpointing=checkpointing, recompute=recompute) as training:
        host = replace(training.host, group=SimpleNamespace(sharded=True, lockstep=True))
        with pytest.raises(OutOfMemory, match="start more processes") as error:
            OOMFallback(training.plan, None, host, False).run(short, lambda: None, 1)
    named = [text for text in ("set checkpointing to on", "set recompute to everything") if text in str(error.value)]
    assert named == ([cure] if cure else [])


@pytest.mark.parametrize("base_dtype, is_cure", [(FP8, True), (NF4, False)])
def test_nf4_is_a_cure_only_for_larger_weights(base_dtype, is_cure):
    """Here Graft has quantized them; the host's quantized layers are of the same class."""
    with lora("SD1", base_dtype=base_dtype) as training:
        plan = replace(training.plan, recipe=replace(training.plan.recipe, base_dtype=AS_IT_IS))
        host = replace(training.host, group=SimpleNamespace(sharded=False, lockstep=True))
        with pytest.raises(OutOfMemory) as error:
            OOMFallback(plan, None, host, False).run(short, lambda: None, 1)
    assert ("set base_dtype to nf4" in str(error.value)) == is_cure


def short(plan):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_all_weights_that_move_within_the_backward(place, tmp_path):
    """Before any update the step is repeated; a batch is not split, because that takes more memory, not less."""
    fields = {"method": "all weights", "rank": 0, "max_grad_norm": 0.0, "batch_size": 2}
    found = []
    for rung in (None, "checkpointing"):
        told = []
        with models.in_training(models.patcher("SD1"), "SD1", **fields) as training:
            training = reporting(training, lambda event, payload, told=told: told.append((event, payload)))
            Device(training, rung, place)
            state = models.train(training, tmp_path / str(rung), steps=2, learning_rate=1e-4)
            found.append(models.joined(state.trainables.values()).clone())
    assert models.distance(found[1], found[0]) <= 1e-5
    assert [payload["done"].split(" for ")[0] for event, payload in told if event == "memory"] == [
        "moved other models and caches off the device",
        "turned on checkpointing",
    ]


def test_weights_that_have_moved_are_not_moved_twice(tmp_path):
    """Memory that runs out in the middle of such a backward ends the run, and the last save stands."""
    fields = {"method": "all weights", "rank": 0, "max_grad_norm": 0.0, "batch_size": 2}
    with models.in_training(models.patcher("SD1"), "SD1", **fields) as training:
        moved = []
        first = next(iter(training.plan.trainables.values()))

        def fail(parameter):
            moved.append(parameter)
            if len(moved) == 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

        first.register_post_accumulate_grad_hook(fail)
        with pytest.raises(OutOfMemory, match="had already updated some weights"):
            models.train(training, tmp_path, steps=3, learning_rate=1e-4, save_every=1)
    assert [path.name for path in (tmp_path / "run").glob("state-*")] == ["state-00000001.safetensors"]


def test_offload_from_the_start_changes_no_bit(tmp_path, enough):
    """Weights in a file have the same values. Recomputation may round differently, so checkpointing is on in both."""
    found = []
    for offload in ("auto", "on"):
        with lora("SD1", batch_size=4, checkpointing="on") as training:
            checkpointing.checkpoint_blocks(autograd.blocks_of(training.denoiser.module))
            state = models.train(training, tmp_path / offload, steps=STEPS, learning_rate=1e-3, offload=offload)
            found.append(models.joined(state.trainables.values()).clone())
            weights = [weight for weight in training.denoiser.module.parameters() if hasattr(weight, "graft_offloaded")]
            assert bool(weights) == (offload == "on")
    assert torch.equal(*found)


def test_previews_that_do_not_fit_are_left_out(tmp_path):
    """The preview is tried once with everything else offloaded, then skipped: a picture is not worth the run."""
    told = []
    with KINDS["SD1"]() as training:
        training = reporting(training, lambda event, payload: told.append(event))
        training.denoiser.preview = lambda request: Device._fail(Device(training, None))
        fields = {"preview_prompts": ("a",), "preview_every": 2}
        state = models.train(training, tmp_path, steps=STEPS, learning_rate=1e-3, **fields)
    assert state.step == STEPS and "sample" not in told
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("skipped the previews") == 3


@pytest.mark.parametrize(
    "error, is_one",
    [
        (torch.cuda.OutOfMemoryError("anything"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 17.98 GB, other allocations: 432 KB)"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("XPU out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("Could not allocate tensor with 4096 bytes. There is not enough GPU video memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (8)"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_devices_say_when_memory_runs_out(error, is_one):
    assert is_out_of_memory(error) is is_one
