"""Tests of sample pictures on another model than the trained one."""

import functools
import gc
import re
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils import backend_registration

from tests.support import models, simulated_device
from tests.support.base import get_tiny_base
from tests.support.diffusers_host import make_dataset, same_tensors
from tests.support.forked import forked
from tests.support.pack import use_comfy
from tests.toy import host as toy

pytestmark = pytest.mark.usefixtures("comfy")

STRENGTH, CFG, DRAWN = 0.7, 1.5, 2
TEXT = "a large embedding:my-word circle"
FLAGS = "--w 64 --h 96 --d 5"
# Inputs of a training by its name: what it trains, and the options.
KINDS = {
    "LoRA": ("LoRA", {}),
    "DoRA with convolutions": ("LoRA", {("adapter", "type"): "DoRA", ("adapter", "targets"): "linear + conv"}),
    "text encoder": ("LoRA", {("adapter", "text_encoder"): "on"}),
    "pivotal": (
        "LoRA",
        {("pivotal", "name"): "my-word", ("pivotal", "init_text"): "red", ("pivotal", "learning_rate"): 0.1},
    ),
    "all weights": ("all weights", {("memory", "checkpointing"): "on"}),
    "offloaded, averaged": ("LoRA", {("memory", "offload"): "on", ("optimizer", "ema_decay"): 0.5}),
    "quantized": ("LoRA", {("memory", "base_dtype"): "nf4"}),
}


@pytest.fixture(scope="module")
def graphs(comfy, tiny_base):
    """Return (model, clip, vae) of two loader nodes for the same file."""
    with torch.inference_mode():
        return [toy.load(tiny_base, comfy.path) for _ in range(2)]


def changed(model, size, seed):
    """Return a clone of a model with a difference on its attention layers, as a LoRA loader would make it."""
    generator = torch.Generator().manual_seed(seed)
    clone = model.clone()
    weights = model.model.state_dict()
    keys = [key for key in weights if key.endswith("to_v.weight")]
    clone.add_patches({key: ("diff", (size * torch.randn(weights[key].shape, generator=generator),)) for key in keys})
    return clone


def train(graph, kind, name, preview=None, **options):
    """Train two steps as a node does. Return (outputs, pictures by step)."""
    from graft_pack.nodes.host import paths
    from graft_pack.nodes.host.actions.train import TrainInputs
    from graft_pack.nodes.host.actions.train import train as run
    from graft_pack.nodes.host.model.preview_model import PreviewChoice
    from graft_pack.trainers.engine.resolve import Options

    method, fields = KINDS[kind]
    drawing = {"prompts": f"{TEXT} {FLAGS}", "steps": DRAWN, "cfg": CFG, "every": 1, **options}
    chosen = {**fields, ("run", "name"): name, **{("preview", key): value for key, value in drawing.items()}}
    chosen = Options(chosen)
    chosen.preview_model = None if preview is None else PreviewChoice(preview, "3")
    widgets = TrainInputs(method, 2, 2e-2 if method == "LoRA" else 1e-3, 4, 1, 0)
    with torch.inference_mode():
        done = run(*graph, make_dataset(2), widgets, chosen, "7")
    pictures = {}
    for path in Path(paths.folders().runs).glob(f"{name}-*/samples/*.png"):
        pictures[int(re.match(r"step-0*(\d+)-1", path.name).group(1))] = np.asarray(Image.open(path)).astype(int)
    return done, pictures


@torch.inference_mode()
def drawn_by_nodes(model, clip, vae, prompt):
    """Draw as CLIPTextEncode, KSampler and VAEDecode do."""
    import nodes

    text, blank = (nodes.CLIPTextEncode().encode(clip, words)[0] for words in (prompt, ""))
    (latent,) = nodes.EmptyLatentImage().generate(64, 96)
    (latent,) = nodes.KSampler().sample(model, 5, DRAWN, CFG, "euler", "normal", text, blank, latent)
    (pixels,) = nodes.VAEDecode().decode(vae, latent)
    return (pixels[0] * 255).round().numpy().astype(int)


@torch.inference_mode()
def applied_by_nodes(done, model, clip, strength):
    """Apply what was trained as Graft's nodes do."""
    from graft_pack.nodes.adapter import GraftApplyAdapter, GraftApplyEmbedding

    model, clip = GraftApplyAdapter.execute(model, done.adapter, strength, strength, clip).result
    if done.embedding is not None:
        (clip,) = GraftApplyEmbedding.execute(clip, done.embedding).result
    return model, clip


def largest(one, other):
    return int(abs(one - other).max())


# A DoRA holds the norms of the trained model's weights. An embedding starts as the vectors of its init text.
ACT_AT_THE_START = ("DoRA with convolutions", "pivotal")
# With the trained checkpoint itself, the host patches the weights that the private tree shares.
CASES = [(kind, True) for kind in KINDS] + [("LoRA", False), ("all weights", False)]


@pytest.fixture(scope="module")
def plain(graphs):
    """Return plain(kind), a training whose pictures are drawn on the trained model itself."""
    model, clip, vae = graphs[0]
    return functools.cache(
        lambda kind: train((changed(model, 0.1, 1), clip, vae), kind, f"preview-plain-{list(KINDS).index(kind)}")
    )


@pytest.mark.parametrize("kind, same", CASES)
def test_pictures_equal_those_of_the_graph(kind, same, graphs, plain):
    """Upstream of the trainer is an adapter that the preview model lacks. The training has the same bits."""
    (model, clip, vae), (other, _, _) = graphs
    graph = changed(model, 0.1, 1), clip, vae
    preview = changed(model if same else other, 0.1, 2)
    name = f"preview-{list(KINDS).index(kind)}-{same}"
    expected, own = plain(kind)
    done, pictures = train(graph, kind, f"{name}-other", preview, strength=STRENGTH)
    assert done.loss == expected.loss
    assert same_tensors(dict(done.adapter), dict(expected.adapter))
    before = drawn_by_nodes(preview, clip, vae, TEXT)
    after = drawn_by_nodes(*applied_by_nodes(done, preview, clip, STRENGTH), vae, TEXT)
    assert largest(pictures[2], after) <= 1
    assert largest(before, after) > 5 and largest(own[2], after) > 5
    if kind not in ACT_AT_THE_START:
        assert largest(pictures[0], before) <= 1


def test_pictures_of_a_quantized_base_are_drawn_on_the_graphs_model(graphs):
    model, clip, vae = graphs[0]
    graph = changed(model, 0.1, 1), clip, vae
    done, pictures = train(graph, "quantized", "preview-quantized")
    before, after = drawn_by_nodes(*graph[:2], vae, TEXT), drawn_by_nodes(done.model, done.clip, vae, TEXT)
    assert largest(pictures[0], before) <= 1 and largest(pictures[2], after) <= 1
    assert largest(before, after) > 5


def test_the_check_of_a_full_fine_tune_computes_no_difference(graphs, monkeypatch):
    """All differences together are as large as the model."""
    from graft_pack.trainers.engine import preflight
    from graft_pack.trainers.formats.full_diff import FullDiff

    (model, clip, vae), (other, _, _) = graphs
    check, compute = preflight.check_keys, FullDiff.__getitem__
    computed, during = [], []

    def counted(self, key):
        computed.append(key)
        return compute(self, key)

    def checked(*args):
        check(*args)
        during.append(len(computed))

    monkeypatch.setattr(FullDiff, "__getitem__", counted)
    monkeypatch.setattr(preflight, "check_keys", checked)
    train((model, clip, vae), "all weights", "preview-check", other, every=0)
    assert during == [0] and computed


def test_pictures_of_a_full_fine_tune_hold_one_difference_at_a_time(graphs, monkeypatch):
    from graft_pack.trainers.formats.full_diff import FullDiff

    (model, clip, vae), (other, _, _) = graphs
    compute, computed, most = FullDiff.__getitem__, [], []

    def counted(self, key):
        difference = compute(self, key)
        most.append(sum(reference() is not None for reference in computed))
        computed.append(weakref.ref(difference))
        return difference

    monkeypatch.setattr(FullDiff, "__getitem__", counted)
    _, pictures = train((model, clip, vae), "all weights", "preview-memory", other)
    assert len(pictures) == 3 and len(computed) > 100
    assert max(most) <= 1


@pytest.mark.parametrize("swapped", [False, True], ids=["SDXL on SD1", "SD1 on SDXL"])
def test_a_model_of_another_family_is_refused_before_training(swapped, graphs):
    import comfy.supported_models
    from graft_pack.trainers.errors import ModelError

    larger = models.patcher("SDXL")
    larger.model.model_config.__class__ = comfy.supported_models.SDXL
    (trained, *others), drawn = graphs[0], larger
    names = ("SDXL", "SD1")
    if swapped:
        trained, drawn, names = drawn, trained, names[::-1]
    with pytest.raises(
        ModelError, match=f"Preview Options is {names[0]}, and the trained model is {names[1]}"
    ) as error:
        train((trained, *others), "LoRA", "preview-family", drawn)
    assert error.value.input == "options"


def test_a_model_of_another_size_is_refused_before_step_1(graphs):
    """Also if pictures are drawn after the last step only."""
    from graft_pack.trainers.errors import ModelError

    smaller = models.patcher("SD1")
    with pytest.raises(ModelError, match="does not fit the model of Graft Preview Options") as error:
        train(graphs[0], "LoRA", "preview-smaller", smaller, every=0)
    assert error.value.input == "options"
    assert not logged("preview-smaller")


def logged(name):
    """Return the events in the log of a run."""
    from graft_pack.nodes.host import paths

    return [file.read_text() for file in Path(paths.folders().runs).glob(f"{name}-*/metrics.jsonl")]


def test_option_nodes_pass_the_model_on(graphs):
    from graft_pack.nodes.options import GraftPreviewOptions, GraftRunOptions

    model = graphs[0][0]
    first = GraftPreviewOptions.execute(model=model, strength=0.5)[0]
    later = GraftPreviewOptions.execute(options=GraftRunOptions.execute(options=first, name="a")[0], steps=3)[0]
    assert later.preview_model.model is model
    assert later == {("preview", "strength"): 0.5, ("run", "name"): "a", ("preview", "steps"): 3}
    assert GraftPreviewOptions.execute(strength=1.0)[0] == {}


@pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="older torch")
@forked
def test_on_a_device_without_room_for_both_the_trained_model_makes_way():
    """Losses and pictures are the same whether both fit or not."""
    from graft_pack.nodes.host.model import denoiser, sampling

    device = simulated_device.register()
    comfy = use_comfy()
    places, made = [], []

    def remembered(self, *args):
        real(self, *args)
        made.append(self)

    def draw(self, requests):
        places.append({one.device.type for one in made[-1].module.parameters()})
        return real_draw(self, requests)

    real, real_draw = denoiser.ComfyDenoiser.__init__, sampling.PromptSampler.draw
    denoiser.ComfyDenoiser.__init__, sampling.PromptSampler.draw = remembered, draw
    found = []
    with simulated_device.comfy_on(device.device):
        for limit in (None, 300_000_000):
            model, clip, vae = toy.load(get_tiny_base(), comfy.path)
            other, _, _ = toy.load(get_tiny_base(), comfy.path)
            gc.collect()
            with device.measured(limit) as usage:
                done, pictures = train((model, clip, vae), "LoRA", f"preview-{limit}", changed(other, 0.1, 2))
            assert not usage.short and not usage.hazards
            found.append((done.loss["loss"], pictures))
    assert places == 3 * [{simulated_device.NAME}] + 3 * [{"cpu"}]
    (losses, pictures), (others, limited) = found
    assert losses == others
    assert all(largest(pictures[step], limited[step]) <= 1 for step in (0, 1, 2))
