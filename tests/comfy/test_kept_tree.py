"""Tests of trees that stay prepared while their training gives way: the same bits, and when they are dropped."""

import gc
import time
from types import SimpleNamespace

import pytest
import torch
from graft_pack.trainers.data.scan import scan_folder
from graft_pack.trainers.engine.kept import Kept, keep_tree
from graft_pack.trainers.engine.session import run_recipe
from graft_pack.trainers.engine.trainable_modules import TrainableModules
from graft_pack.trainers.memory.tracking import bytes_of
from graft_pack.trainers.methods import ADAPTERS
from graft_pack.trainers.protocols import Host
from graft_pack.trainers.runs.folders import Folders

from tests.comfy.test_quantized import quantized
from tests.support import gguf_models, models, simulated_device
from tests.support.base import get_tiny_base
from tests.support.diffusers_host import same_state
from tests.support.forked import forked
from tests.support.pack import use_comfy
from tests.toy import host as toy
from tests.toy import world

STEPS, PAUSES = 5, (2, 4)
FULL = {"method": "all weights", "rank": 0, "alpha": 0.0, "targets": "all weights"}
CASES = {
    **{name: {"method": name} for name in ADAPTERS},
    "full": FULL,
    "EMA": {"ema_decay": 0.9, "batch_size": 2},
    "checkpointed": {"checkpointing": "on", "dropout": 0.2},
    "bf16": {"compute_dtype": "bf16", "optimizer": "Prodigy"},
}


class Runs:
    """Trainings of one base and dataset."""

    def __init__(self, folder, base, **fields):
        self.base, self.folder = base, folder
        self.recipe = models.recipe("SD1", **{"steps": STEPS, "batch_size": 1, "resolution": 64, **fields})
        self.training = SimpleNamespace(gives_way=True, is_held=False, has_fallback=False)

    def go(self, name, until=None):
        """Train a run until it gives way at a step, or to its end; return its last state then."""
        from graft_pack.nodes.host.model.denoiser import ComfyDenoiser
        from graft_pack.nodes.host.model.kept_tree import TreeKeeper
        from graft_pack.nodes.host.model.text_encoder import ComfyText
        from graft_pack.nodes.host.model.vae import ComfyCodec

        steps = []
        model, clip, vae = self.base
        text = ComfyText(clip)
        denoiser = ComfyDenoiser(model, text, vae)

        def command():
            if until is not None and steps and steps[-1] >= until:
                raise KeyboardInterrupt

        def hear(event, payload):
            if event == "step":
                steps.append(payload["step"])

        keeper = TreeKeeper(denoiser, self.training)
        host = Host(denoiser, text, ComfyCodec(vae), hear, command, keeper=keeper)
        dataset = scan_folder(str(world.CONCEPT_FOLDER / "toy"), "", 64, 1)
        places = [self.folder / name / place for place in ("runs", "loras", "embeddings")]
        # All tests encode the same pictures.
        cache = self.folder.parent / "encoded for kept trees"
        folders = Folders(str(places[0]), str(cache), *map(str, places[1:]))
        try:
            with torch.inference_mode(False):
                run = run_recipe(self.recipe, dataset, host, folders).run
        except KeyboardInterrupt:
            assert until is not None
        # As after each pause.
        gc.collect()
        if until is not None:
            return None
        return run.load(STEPS)


@pytest.fixture
def counted(monkeypatch):
    """Return the list of the trees to which trainables were added."""
    trees, inject = [], TrainableModules.inject

    def counting(self):
        trees.append(self)
        return inject(self)

    monkeypatch.setattr(TrainableModules, "inject", counting)
    return trees


@pytest.fixture
def keep_for(comfy, monkeypatch):
    """Return a function that sets the seconds for which trees are kept, at first an hour."""
    from graft_pack.nodes.host import settings
    from graft_pack.nodes.host.model.kept_tree import TreeKeeper

    def set_seconds(seconds):
        monkeypatch.setattr(settings, "give_way_keep", lambda: seconds)

    set_seconds(3600.0)
    yield set_seconds
    TreeKeeper.clear()


@pytest.fixture(scope="module")
def base(comfy, tiny_base, tmp_path_factory):
    """Return what a loader gives. A first training has loaded all modules, so that no later collection visits them."""
    graph = load(tiny_base, comfy.path)
    Runs(tmp_path_factory.mktemp("first"), graph).go("run")
    gc.collect()
    gc.freeze()
    return graph


def load(path, folder):
    """Return model, text encoder and VAE as they arrive at a node."""
    with torch.inference_mode():
        return toy.load(path, folder)


def entries():
    """Return the kept trees in ComfyUI's list of loaded models."""
    import comfy.model_management
    from graft_pack.nodes.host.model.kept_tree import _Entry

    return [loaded.model for loaded in comfy.model_management.current_loaded_models if isinstance(loaded.model, _Entry)]


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_a_warm_return_gives_the_bits_of_a_straight_run(tmp_path, base, keep_for, counted, fields):
    runs = Runs(tmp_path, base, **fields)
    straight = runs.go("straight")
    assert len(counted) == 1
    for step in PAUSES:
        runs.go("warm", step)
    assert same_state(runs.go("warm"), straight)
    assert len(counted) == 2 and entries() == []


def test_a_cold_return_gives_the_bits_of_a_straight_run(tmp_path, base, keep_for, counted):
    keep_for(0.0)
    runs = Runs(tmp_path, base)
    for step in PAUSES:
        runs.go("cold", step)
    assert same_state(runs.go("cold"), runs.go("straight")) and len(counted) == 4


@pytest.fixture
def paused(tmp_path, base, keep_for, counted):
    """Return trainings, one of which has given way and is kept."""
    runs = Runs(tmp_path, base)
    runs.go("run", 2)
    assert len(entries()) == 1
    return runs


def free(device, size=1e30):
    import comfy.model_management

    comfy.model_management.free_memory(size, device)


def other_weights(runs):
    weight = next(runs.base[0].model.diffusion_model.parameters())
    with torch.no_grad():
        weight.add_(0.0)


WAYS = {
    "ComfyUI frees all memory": lambda runs: free(torch.device("cpu")),
    "ComfyUI unloads a part": lambda runs: entries()[0].partially_unload(torch.device("cpu"), 1),
    "the weights were changed": other_weights,
    "another run was kept": lambda runs: runs.go("other", 2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_tree_that_is_gone_is_built_again_for_the_same_bits(paused, counted, way):
    entry = entries()[0]
    way(paused)
    counted.clear()
    state = paused.go("run")
    assert entry.tree is None and len(counted) == 1
    assert same_state(state, paused.go("straight"))


def kept_over(model, change=lambda network: None):
    """Keep the tree of a training on a MODEL. Return (bytes that it needs besides the MODEL's, what is taken back)."""
    from graft_pack.nodes.host.model.kept_tree import TreeKeeper

    with models.in_training(model, "Flux") as training:
        keeper = TreeKeeper(training.denoiser, SimpleNamespace(gives_way=True, is_held=False, has_fallback=False))
        keeper.keep("run", "rest")
        (entry,) = entries()
        size = entry.size
        change(model.model.diffusion_model)
        return size, keeper.take("run")


def move(network):
    weight = next(weight for weight in network.parameters() if hasattr(weight, "__tensor_flatten__"))
    name = weight.__tensor_flatten__()[0][0]
    setattr(weight, name, getattr(weight, name).clone())


@pytest.mark.parametrize("kind", ["GGUF", "fp8"])
def test_a_tree_over_quantized_weights_is_kept(kind, keep_for):
    with torch.inference_mode():
        plain = models.patcher("Flux")
        if kind == "GGUF":
            weights = gguf_models.tensors(plain.model.diffusion_model.state_dict(), "Q4_0")
            low = gguf_models.alike("Flux", weights)
        else:
            low, plain, _ = quantized("Flux")
    size, taken = kept_over(low)
    assert taken == "rest"
    assert size == kept_over(plain)[0]
    if kind == "fp8":
        assert kept_over(low, move)[1] is None


def test_it_is_dropped_after_its_time(tmp_path, base, keep_for):
    keep_for(0.05)
    Runs(tmp_path, base).go("run", 2)
    (entry,) = entries()
    deadline = time.monotonic() + 30
    while entry.tree is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert entry.tree is None and entry.loaded_size() == 0


@pytest.mark.parametrize("why", ["paused by the user", "outside its hours", "fallback", "no memory"])
def test_a_tree_is_not_kept_in_vain(tmp_path, base, keep_for, monkeypatch, why):
    import comfy.model_management

    runs = Runs(tmp_path, base)
    runs.training.gives_way = why != "paused by the user"
    runs.training.is_held = why == "outside its hours"
    runs.training.has_fallback = why == "fallback"
    if why == "no memory":
        monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 1e18)
    runs.go("run", 2)
    assert entries() == [] and not hasattr(runs.training, "stays_prepared")


@pytest.mark.parametrize("fields", [{}, {"text_encoder": True}, {"offload": "on"}, {"base_dtype": "nf4"}], ids=str)
def test_only_a_single_tree_that_is_whole_in_memory_is_kept(fields):
    tree, parameter, kept = torch.nn.Module(), torch.nn.Parameter(torch.zeros(2)), []
    parameter.grad = torch.zeros(2)
    keeper, group = SimpleNamespace(keep=lambda key, rest: kept.append(key)), SimpleNamespace(world_size=1)
    host = SimpleNamespace(keeper=keeper, group=group, denoiser=SimpleNamespace(module=tree))
    plan = SimpleNamespace(recipe=models.recipe("SD1", **fields))
    keep_tree(host, plan, "run", Kept({"up": parameter}, 1, 0))
    assert kept == ([] if fields else ["run"])
    assert bool(fields) or parameter.grad is None


@forked
def test_on_a_device_it_stays_until_its_memory_is_needed(tmp_path):
    """Memory of the tree: that of its adapters, or all of it once ComfyUI has unloaded the MODEL."""
    import comfy.model_management
    from graft_pack.nodes.host import settings

    settings.give_way_keep = lambda: 3600.0
    device = simulated_device.register()
    with simulated_device.comfy_on(device.device):
        runs = Runs(tmp_path, load(get_tiny_base(), use_comfy().path))
        straight = runs.go("straight")
        for is_needed in (False, True):
            name = f"run {is_needed}"
            runs.go(name, 2)
            (entry,) = entries()
            whole = bytes_of(entry.tree.state_dict().values())
            assert 0 < entry.loaded_size() < whole / 10
            before = comfy.model_management.get_free_memory(device.device)
            if is_needed:
                free(device.device)
                assert entry.tree is None
                freed = comfy.model_management.get_free_memory(device.device) - before
                assert freed >= whole, (freed, whole, bytes_of(runs.base[0].model.diffusion_model.parameters()))
            else:
                # There is enough: nothing is unloaded.
                free(device.device, before - 1)
                assert entry.tree is not None
            assert same_state(runs.go(name), straight)
