"""Tests that the graph's MODEL, CLIP and VAE are unchanged however a training ends, and that nothing stays behind."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from graft_pack.trainers.memory import compilation
from graft_pack.trainers.memory.tracking import bytes_of
from torch._subclasses import FakeTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from tests.support import models
from tests.support.diffusers_host import make_dataset
from tests.toy import host as toy

pytestmark = pytest.mark.usefixtures("comfy")

STEPS = 3
METHODS = {
    "LoRA": ("LoRA", {}),
    "LoRA, text encoder and a word": (
        "LoRA",
        {
            ("adapter", "text_encoder"): "on",
            ("pivotal", "name"): "my-word",
            ("pivotal", "init_text"): "red",
        },
    ),
    "LoRA, compiled": ("LoRA", {("memory", "compile"): "on"}),
    "DoRA, checkpointed": ("LoRA", {("adapter", "type"): "DoRA", ("memory", "checkpointing"): "on"}),
    "all weights": ("all weights", {("optimizer", "max_grad_norm"): 0.0}),
}
# Attributes that the host itself sets on a layer when it loads a model, and removes when it unloads the model.
HOSTS_OWN = {"comfy_patched_weights", "weight_function", "bias_function", "comfy_cast_weights", "manual_cast_dtype"}
OUTCOMES = ("finished", "stopped", "paused", "cancelled", "raised", "not a number", "memory ran out", "offloaded")


class Fault(Exception):
    """An error inside the pack itself."""


@pytest.fixture(scope="module")
def graph(comfy, tiny_base):
    """Return (model, clip, vae) as CheckpointLoaderSimple gives them in a prompt."""
    with torch.inference_mode():
        return toy.load(tiny_base, comfy.path)


@pytest.fixture
def faulty(monkeypatch):
    """Return faulty(outcome), which makes later trainings end like that in their second step."""
    import comfy.model_management
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
    from graft_pack.nodes.host.server.control import REGISTRY, UserCommand
    from graft_pack.trainers.engine import loop

    def arrange(outcome):
        real = loop.accumulate_gradients

        # Without a C++ compiler.
        monkeypatch.setattr(compilation, "BACKEND", "aot_eager")

        def gradients(plan, host, window, updater, batch_of):
            if window.step == 1:
                if outcome == "raised":
                    raise Fault("in the second step")
                if outcome == "cancelled":
                    comfy.model_management.interrupt_current_processing(True)
                if outcome in ("stopped", "paused"):
                    REGISTRY.of_node("7").submit(UserCommand.STOP if outcome == "stopped" else UserCommand.PAUSE)
            losses = real(plan, host, window, updater, batch_of)
            return (
                replace(losses, sums=losses.sums * float("nan"))
                if outcome == "not a number" and window.step == 1
                else losses
            )

        def predict(self, x_t, sigma, conditioning):
            short = outcome == "memory ran out" or not any(
                hasattr(weight, "graft_offloaded") for weight in self.module.parameters()
            )
            if short and torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return real_predict(self, x_t, sigma, conditioning)

        monkeypatch.setattr(loop, "accumulate_gradients", gradients)
        real_predict = ComfyDenoiser.predict
        if outcome in ("memory ran out", "offloaded"):
            monkeypatch.setattr(ComfyDenoiser, "predict", predict)

    return arrange


def train(graph, method, name):
    """Train as a training node does, under the host's inference mode."""
    from graft_pack.nodes.host.actions.train import TrainInputs
    from graft_pack.nodes.host.actions.train import train as run
    from graft_pack.trainers.engine.resolve import Options

    kind, fields = METHODS[method]
    options = Options({**fields, ("run", "name"): name, ("preview", "prompts"): "red", ("preview", "steps"): 1})
    widgets = TrainInputs(kind, STEPS, 1e-4, 4, 1, 0)
    return run(*graph, make_dataset(4), widgets, options, "7")


def trees(graph):
    model, clip, vae = graph
    return model.model, clip.cond_stage_model, vae.first_stage_model


def outline(graph):
    """Return everything visible of the graph's objects and of torch, except numbers."""
    import comfy.model_management

    model, clip, _ = graph
    modules = [part for tree in trees(graph) for part in tree.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "keys": [list(tree.state_dict()) for tree in trees(graph)],
        "classes": [type(part) for part in modules],
        "own": [sorted(set(vars(part)) - HOSTS_OWN) for part in modules],
        "hooks": [sum(len(getattr(part, name)) for name in hooks) for part in modules],
        "training": [part.training for part in modules],
        "wanted": [one.requires_grad for tree in trees(graph) for one in tree.parameters()],
        "gradients": [one.grad for tree in trees(graph) for one in tree.parameters()],
        "patches": (len(model.patches), sorted(model.object_patches), len(clip.patcher.patches)),
        "options": repr(model.model_options),
        "modes": (
            len(_get_current_function_mode_stack()),
            len(_get_current_dispatch_mode_stack()),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_num_threads(),
            torch.get_default_dtype(),
        ),
        "in_training": getattr(comfy.model_management, "in_training", False),
        "interrupted": comfy.model_management.processing_interrupted(),
    }


def seen(graph):
    """Return the outputs of the graph's MODEL, CLIP and VAE as one vector."""
    model, clip, vae = graph
    context = toy.encode(clip, "a red circle")
    latent = toy.draw_noise(3)
    from graft_pack.trainers.protocols import Conditioning

    one = Conditioning({"cross_attn": context}, (64, 64), (0, 0), (64, 64))
    picture = vae.decode(latent)
    return models.joined([models.denoised(model, latent, 2.0, one), context, picture, vae.encode(picture)])


def held_bytes():
    """Return the bytes of all live tensors, each storage once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if isinstance(one, torch.Tensor) and one.device.type == "cpu"]
    tensors = [one for one in tensors if not isinstance(one, FakeTensor)]
    return bytes_of(tensors)


# Every outcome with LoRA, and every other method with some of them.
CASES = [("LoRA", outcome) for outcome in OUTCOMES]
CASES += [("LoRA, text encoder and a word", outcome) for outcome in ("paused", "raised")]
CASES += [("LoRA, compiled", "raised")]
CASES += [("DoRA, checkpointed", outcome) for outcome in ("finished", "cancelled", "offloaded")]
CASES += [("all weights", outcome) for outcome in ("finished", "stopped", "not a number", "memory ran out")]


@pytest.mark.parametrize("method, outcome", CASES)
def test_nothing_stays_behind(method, outcome, graph, faulty):
    import comfy.model_management

    name = f"{list(METHODS).index(method)}-{outcome}"
    with torch.inference_mode():
        before = seen(graph)
        # A process's first training creates objects that later ones reuse, such as peft's and diffusers' modules.
        outlined, held = outline(graph), held_bytes()
        faulty(outcome)
        ended = "finished"
        try:
            done = train(graph, method, name)
            del done
        except BaseException as error:
            ended = type(error).__name__
        expected = {
            "raised": "Fault",
            "cancelled": "InterruptProcessingException",
            "paused": "InterruptProcessingException",
            "not a number": "NumbersError",
            "memory ran out": "OutOfMemory",
        }
        assert ended == expected.get(outcome, "finished")
        if outcome == "paused":
            assert not comfy.model_management.current_loaded_models, "the device is for others now"
        assert outline(graph) == outlined
        assert torch.equal(seen(graph), before)
        assert held_bytes() <= held


def test_run_after_run_no_tensors_are_left(graph):
    """The next run's outputs replace the graph's, as in ComfyUI's cache."""
    sizes = []
    with torch.inference_mode():
        for number in range(3):
            for place, method in enumerate(("LoRA", "LoRA, text encoder and a word")):
                done = train(graph, method, f"{number}-{place} again")
            sizes.append(held_bytes())
    assert done.adapter is not None and done.embedding is not None
    assert sizes[2] <= sizes[1], sizes


def test_private_trees_go_with_the_training(graph, monkeypatch):
    """They must not wait for Python's next cycle collection: the text encoder's, in float32, is twice the graph's."""
    from graft_pack.nodes.host.model import denoiser as model
    from graft_pack.trainers.memory import autograd

    made = []

    def private_tree(module):
        tree = real(module)
        made.append(weakref.ref(tree))
        return tree

    real = autograd.private_tree
    for owner in (autograd, model):
        monkeypatch.setattr(owner, "private_tree", private_tree)
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            done = train(graph, "LoRA, text encoder and a word", "trees")
        left = [type(tree()).__name__ for tree in made if tree() is not None]
    finally:
        gc.enable()
    assert done.embedding is not None
    assert made and left == []


def test_threads_that_it_does_without_are_given_back(graph):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            train(graph, "LoRA", "threads")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
