"""Tests of models with offloaded blocks: same bits, at most two blocks loaded, previews, and pending MODEL patches."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.engine.oom_fallback import offload_blocks
from graft_pack.trainers.memory import autograd, offload
from graft_pack.trainers.memory.checkpointing import is_checkpointed, keeps_attention
from graft_pack.trainers.methods import ADAPTERS
from graft_pack.trainers.recipe.options import ALL_BUT_ATTENTION
from graft_pack.trainers.recipe.parsing import parse_arguments

from tests.support import models
from tests.support.diffusers_host import make_dataset, run_session, same_state, same_tensors, state_of
from tests.support.streams import Far
from tests.toy import host as toy

pytestmark = pytest.mark.usefixtures("comfy")

FAMILIES = ("SD1", "SDXL", "Flux as in diffusers", "SD3", "WAN21_T2V")
ON = {"offload": "on"}


class Stopped(Exception):
    """The exception that interrupts a run in a test."""


@pytest.fixture
def far(monkeypatch):
    """Offload block weights to a device that only a copy reaches; return the list of its transfers."""
    found = []

    def carry(weights, folder):
        found.append(Far(weights))
        return found[-1].homes, found[-1]

    monkeypatch.setattr(offload, "map_weights", carry)
    return found


@pytest.fixture
def one_by_one(monkeypatch):
    """Disable prefetch."""
    monkeypatch.setattr(offload.BlockPrefetcher, "_start", lambda self, number: None)


def gradients(training, folder, count=2):
    """Return the gradients of so many steps, with the blocks offloaded if the plan says so."""
    if training.plan.recipe.offload == "on":
        assert offload_blocks(training.plan, SimpleNamespace(folder=str(folder)), training.host)
        assert offload.is_on_other_device(training.denoiser.module)
    return [training.gradients() for _ in range(count)]


def same(steps, other):
    """Report whether gradients are bit-identical and at least one is not zero."""
    assert any(one.any() for one in steps[0])
    return all(torch.equal(a, b) for one, two in zip(steps, other, strict=True) for a, b in zip(one, two, strict=True))


def sizes_of(training):
    """Return the offloaded bytes per block, largest first."""
    blocks = autograd.blocks_of(training.denoiser.module)
    rows = [[one.nbytes for one in block.parameters() if hasattr(one, "graft_offloaded")] for block in blocks]
    return sorted((sum(row) for row in rows), reverse=True)


@pytest.fixture(scope="module")
def near(comfy):
    """Return a function of gradients with everything in place, plain and checkpointed, computed once per family."""
    found = {}

    def of(name, checkpointing=False):
        key = name, checkpointing
        if key not in found:
            with models.in_training(models.patcher(name), name, checkpointing, 0.1) as training:
                found[key] = gradients(training, None)
        return found[key]

    return of


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_the_same_with_weights_in_a_file(name, checkpointing, near, tmp_path):
    with models.in_training(models.patcher(name), name, checkpointing, 0.1, **ON) as training:
        assert same(gradients(training, tmp_path), near(name, checkpointing))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_is_kept_where_that_is_wanted(checkpointing, near, tmp_path):
    """Also in blocks that offloading checkpoints."""
    fields = {**ON, "recompute": ALL_BUT_ATTENTION}
    with models.in_training(models.patcher("SD1"), "SD1", checkpointing, 0.1, **fields) as training:
        assert same(gradients(training, tmp_path), near("SD1", True))
        blocks = autograd.blocks_of(training.denoiser.module)
        assert all(keeps_attention(block) for block in blocks if is_checkpointed(block))
        assert any(keeps_attention(block) for block in blocks)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_the_same_with_copies_and_two_blocks_are_there_at_most(name, ahead, near, far, request, tmp_path):
    """A layer that computes with an offloaded weight would read no valid numbers."""
    if not ahead:
        request.getfixturevalue("one_by_one")
    with models.in_training(models.patcher(name), name, False, 0.1, **ON) as training:
        assert same(gradients(training, tmp_path), near(name))
        (device,) = far
        sizes = sizes_of(training)
        assert device.peak <= sum(sizes[:2])
        assert ahead or device.peak <= sizes[0]
        # Once for each forward, and once more for its recomputation if a gradient goes through.
        assert 2 * (len(sizes) - 1) <= device.loads <= 2 * 2 * len(sizes)


@pytest.mark.parametrize("kind, arguments", [*((kind, "") for kind in ADAPTERS), ("LoRA", "train_norm=true")])
def test_no_adapter_computes_with_what_is_away(kind, arguments, far, tmp_path):
    fields = {"method": kind, "targets": "all linear", "rank": 4, "adapter_args": parse_arguments(arguments)}
    found = []
    for more in ({}, ON):
        with models.in_training(models.patcher("SD1"), "SD1", False, 0.05, **fields, **more) as training:
            found.append(gradients(training, tmp_path, 1))
    assert same(*found)


def test_text_encoder_and_network_share_the_room(far, tmp_path):
    """Two blocks in all, from either tree."""
    found = []
    for more in ({}, ON):
        with models.with_text("SD1", spread=0.1, batch_size=2, **more) as training:
            found.append(gradients(training, tmp_path))
            trees = [training.denoiser.module, training.host.text.module]
    (device,) = far
    rows = [[one.nbytes for one in block.parameters()] for tree in trees for block in autograd.blocks_of(tree)]
    assert same(*found)
    assert device.peak <= sum(sorted(map(sum, rows))[-2:])


def test_a_preview_in_between_costs_nothing_but_waiting(far, near, tmp_path):
    """Blocks then come in another order, without gradients, and in the host's inference mode."""
    with models.in_training(models.patcher("SD1"), "SD1", False, 0.1, **ON) as training:
        gradients(training, tmp_path, 1)
        x, one = training.plan.train[0].show(0).latent, training.plan.train[0].show(0).conditioning
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert training.denoiser.predict(x, torch.tensor([0.7]), [one]).isfinite().all()
            assert same([training.gradients()], near("SD1")[:1])


def test_what_waits_on_the_model_counts(tmp_path):
    """An upstream LoRA is part of the frozen base, wherever its weights are; the graph's MODEL stays unchanged."""
    found = []
    for more in ({}, ON):
        model = models.patcher("SD1")
        weights = {name: one.clone() for name, one in model.model.state_dict().items()}
        patched = model.clone()
        keys = [name for name in weights if name.endswith("attn1.to_q.weight")]
        patched.add_patches({key: ("diff", (torch.full_like(weights[key], 0.05),)) for key in keys}, 0.5)
        for waiting in (model, patched):
            with models.in_training(waiting, "SD1", False, 0.1, **more) as training:
                found.append(gradients(training, tmp_path, 1))
        if more:
            assert all(torch.equal(one, weights[name]) for name, one in model.model.state_dict().items())
            assert not patched.backup and not model.object_patches_backup
    plain, with_lora, plain_away, with_lora_away = found
    assert same(plain, plain_away) and same(with_lora, with_lora_away)
    assert not same(plain, with_lora)


def test_the_host_is_not_asked_to_load_the_model(monkeypatch, tmp_path):
    """The model is also not on the host's list of loaded models, from which the host would move it to the device."""
    import comfy.model_management

    asked = []
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda *args, **kwargs: asked.append(args))
    model = models.patcher("SD1")
    comfy.model_management.current_loaded_models.clear()
    with models.in_training(model, "SD1", False, 0.1, **ON) as training:
        gradients(training, tmp_path, 1)
        assert not asked and not comfy.model_management.current_loaded_models
    assert training.denoiser.module is None


def test_what_the_host_keeps_off_the_device_is_trained_with_offload_alone(monkeypatch):
    """The host does this when it starts with --novram."""
    from graft_pack.nodes.host.model import denoiser as nodes_model
    from graft_pack.trainers.errors import ModelError

    real = nodes_model.check_trainable
    meta = torch.device("meta")
    monkeypatch.setattr(nodes_model, "check_trainable", lambda base, device: real(base, device and meta))
    with pytest.raises(ModelError, match="Switch offload on"):
        with models.in_training(models.patcher("SD1"), "SD1"):
            pass
    with models.in_training(models.patcher("SD1"), "SD1", **ON):
        pass


@pytest.mark.parametrize("kind", ["LoRA", "PiSSA", "DoRA"])
def test_killed_and_resumed_with_and_without_it_has_the_same_bits(kind, tmp_path):
    fields = {"steps": 4, "batch_size": 2, "save_every": 1, "method": kind, "rank": 2, "alpha": 2.0}
    straight = run_session(tmp_path / "straight", **fields)

    def stop(event, payload):
        if event == "step" and payload["step"] == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run_session(tmp_path / "parts", stop, **fields, **ON)
    resumed = run_session(tmp_path / "parts", **fields, offload="off" if kind == "DoRA" else "on")
    assert resumed.resumed_from == 2
    assert same_state(state_of(resumed), state_of(straight))
    assert same_tensors(resumed.adapter, straight.adapter)


@pytest.mark.parametrize("place", ["a file", "far"])
def test_pictures_are_drawn_with_what_is_away(place, tiny_base, comfy, tmp_path, monkeypatch, request):
    """The host's own sampler draws them and moves nothing; pictures and adapter equal those without offload."""
    from graft_pack.nodes.host.actions.train import TrainInputs, train
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.trainers.engine.resolve import Options

    if place == "far":
        request.getfixturevalue("far")
    drawn = []
    real = ComfyDenoiser.preview

    def preview(self, request):
        before = {id(one): one.data_ptr() for one in self.module.parameters()}
        drawn.append([picture.tobytes() for picture in real(self, request)])
        assert {id(one): one.data_ptr() for one in self.module.parameters()} == before
        return []

    monkeypatch.setattr(ComfyDenoiser, "preview", preview)
    fields = {("preview", "prompts"): "red\nblue", ("preview", "steps"): 2, ("preview", "every"): 1}
    adapters = []
    with torch.inference_mode():
        for offloaded in ("auto", "on"):
            graph = toy.load(tiny_base, comfy.path)
            options = Options(
                {**fields, ("run", "name"): f"drawn {place} {offloaded}", ("memory", "offload"): offloaded}
            )
            done = train(*graph, make_dataset(4), TrainInputs("LoRA", 2, 1e-2, 4, 1, 0), options, "7")
            adapters.append(done.adapter)
    assert len(drawn) == 6 and drawn[0] != drawn[2]
    assert drawn[:3] == drawn[3:]
    assert same_tensors(*adapters)


def test_losses_that_are_measured_are_the_same(tmp_path):
    """Validation and prior preservation, with offloaded blocks."""
    found = []
    for more in ({}, ON):
        with models.in_training(models.patcher("SD1"), "SD1", **more) as training:
            plan = replace(training.plan, validation=training.plan.train[:1])
            fields = {"steps": 2, "learning_rate": 1e-2, "validate_every": 1}
            state = models.train(replace(training, plan=plan), tmp_path / str(len(found)), **fields)
            found.append((state.losses, state.validation))
    assert found[0] == found[1] and len(found[0][1]) == 2
