"""Tests of training on GGUF models: in the ComfyUI-GGUF pack's layers if GRAFT_GGUF_PACK names it, or in like ones."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from graft_pack.trainers.engine.oom_fallback import offload_blocks
from graft_pack.trainers.errors import ModelError, SettingsError
from graft_pack.trainers.memory import offload
from graft_pack.trainers.memory.tracking import TensorTracker
from graft_pack.trainers.methods import ADAPTERS

from tests.support import gguf_models, models
from tests.support.streams import Far

pytestmark = pytest.mark.usefixtures("comfy")

# Families with a GGUF architecture of the pack's, and a type whose blocks fit the tiny networks' layers.
FAMILIES = {
    "Flux": ("flux", "Q4_0"),
    "SD3": ("sd3", "Q5_1"),
    "Lumina 2": ("lumina2", "Q8_0"),
    "ZImage": ("lumina2", "Q4_K"),
    "QwenImage": ("qwen_image", "BF16"),
    "SD1": ("sd1", "Q4_1"),
}


def alike(name, kind, block=""):
    """Return the MODEL of a tiny family in layers like the pack's, its matrices, or those of a block, in a type."""
    weights = models.patcher(name).model.diffusion_model.state_dict()
    return gguf_models.alike(name, gguf_models.tensors(weights, kind, block))


def step(model, name, folder=None, **fields):
    """Return (loss, gradients, names) of a step, with the blocks offloaded into a folder if the fields say so."""
    with models.in_training(model, name, spread=0.1, **fields) as training:
        if training.plan.recipe.offload == "on":
            assert offload_blocks(training.plan, SimpleNamespace(folder=str(folder)), training.host)
        loss = training.losses().detach()
        return loss, models.joined(training.gradients()), list(training.plan.trainables)


def assert_alike(found, wanted):
    assert found[2] == wanted[2]
    assert torch.allclose(found[0], wanted[0], rtol=1e-5)
    assert wanted[1].any()
    assert models.distance(found[1], wanted[1]) <= 1e-5


@pytest.fixture
def far(monkeypatch):
    """Offload block weights to a device that only a copy reaches; return the list of its transfers."""
    found = []

    def carry(weights, folder):
        found.append(Far(weights))
        return found[-1].homes, found[-1]

    monkeypatch.setattr(offload, "map_weights", carry)
    return found


@pytest.mark.parametrize("kind", gguf_models.TYPES)
def test_every_type_trains_as_on_its_values(kind, far, tmp_path):
    model = alike("ZImage", kind, "layers.1.")
    found = step(model, "ZImage")
    assert_alike(found, step(gguf_models.plain("ZImage", model), "ZImage"))
    checkpointed = step(model, "ZImage", checkpointing=True)
    assert torch.equal(checkpointed[1], found[1])
    offloaded = step(model, "ZImage", tmp_path, offload="on")
    assert torch.equal(offloaded[0], found[0])
    assert torch.equal(offloaded[1], found[1])
    (transfer,) = far
    moved = {home.dtype for home in transfer.homes if home.dim() > 1}
    assert torch.uint8 in moved


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_adapter_trains_as_on_the_values(method):
    model = alike("Flux", "Q5_0")
    fields = {"method": method, "targets": "all linear"}
    assert_alike(step(model, "Flux", **fields), step(gguf_models.plain("Flux", model), "Flux", **fields))


def test_private_tree_shares_the_bytes_and_stores_no_more():
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    weights = gguf_models.tensors(models.patcher("ZImage").model.diffusion_model.state_dict(), "Q4_K")
    model = gguf_models.alike("ZImage", weights)
    own = {one.data_ptr() for one in model.model.diffusion_model.parameters()}
    before = patcher_digest(model)
    with models.in_training(model, "ZImage") as training:
        frozen = [one for one in training.denoiser.module.parameters() if not one.requires_grad]
        training.gradients()
        assert {one.data_ptr() for one in frozen} <= own
        stored = sum(one.nbytes for one in frozen)
        assert stored == pytest.approx(sum(numbers.nbytes for numbers, _ in weights.values()), rel=0.03)
    assert patcher_digest(model) == before


def test_waiting_patches_are_part_of_the_base():
    model = alike("SD3", "Q8_0")
    network = model.model.diffusion_model
    source = torch.Generator().manual_seed(1)
    for path, layer in network.named_modules():
        if getattr(layer.weight if hasattr(layer, "get_weight") else None, "tensor_type", 0) > 1:
            change = torch.randn(layer.weight.shape, generator=source) * 0.05
            layer.weight.patches = [([(0.7, ("diff", (change,)), 1.0, None, None)], f"diffusion_model.{path}.weight")]
    patched = step(model, "SD3")
    assert_alike(patched, step(gguf_models.plain("SD3", model), "SD3"))
    assert not torch.allclose(patched[0], step(alike("SD3", "Q8_0"), "SD3")[0], rtol=1e-3)


class Layers(torch.nn.Module):
    """Layers of all kinds that may be quantized."""

    def __init__(self):
        super().__init__()
        make = gguf_models.like_the_pack().Operations
        self.table = make.Embedding(16, 64)
        self.norm = make.LayerNorm(64)
        self.conv = make.Conv2d(4, 8, 4, padding=1, stride=2)
        self.linear = make.Linear(64, 32)

    def forward(self, x, tokens):
        return self.linear(self.norm(self.table(tokens, out_dtype=torch.float32))).sum() + self.conv(x).square().sum()


@pytest.fixture
def layers():
    """Return (layers with quantized weights and vectors, the same with their values)."""
    from graft_pack.nodes.host.model.quantization import gguf

    like, made, wanted = gguf_models.like_the_pack(), Layers(), Layers()
    shapes = {"table.weight": (16, 64), "norm.weight": (64,), "norm.bias": (64,), "conv.weight": (8, 4, 4, 4)}
    shapes |= {"conv.bias": (8,), "linear.weight": (32, 64), "linear.bias": (32,)}
    for number, (key, shape) in enumerate(shapes.items()):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        kind = "F32" if key == "conv.bias" else "Q8_0"
        # Files keep the weight of a convolution as rows of whole blocks.
        numbers = torch.from_numpy(gguf_models.packed(value.view(-1, 32), kind)) if kind == "Q8_0" else value
        tensor = like.Tensor(numbers.flatten(), tensor_type=gguf_models.type_of(kind), tensor_shape=torch.Size(shape))
        path, name = key.split(".")
        setattr(made.get_submodule(path), name, torch.nn.Parameter(tensor, requires_grad=False))
        setattr(wanted.get_submodule(path), name, torch.nn.Parameter(gguf.dequantized(tensor).view(shape).clone()))
    return made, wanted


def test_convolutions_embeddings_and_vectors_compute_with_their_values(layers):
    from graft_pack.nodes.host.model.quantization import gguf

    made, wanted = layers
    gguf.as_plain_layers(made)
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    tokens = torch.tensor([[1, 5, 15]])
    found = []
    for each in (made, wanted):
        result = each(x, tokens)
        found.append((result.detach(), torch.autograd.grad(result, x)[0]))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert models.distance(found[0][1], found[1][1]) <= 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ1_S"])
def test_an_embedding_dequantizes_the_rows_it_looks_up(kind):
    from graft_pack.nodes.host.model.quantization import gguf

    like = gguf_models.like_the_pack()
    values = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    numbers = torch.from_numpy(gguf_models.packed(values, kind))
    weight = like.Tensor(numbers, tensor_type=gguf_models.type_of(kind), tensor_shape=values.shape)
    layer = like.Operations.Embedding(2000, 256)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    wanted = gguf.dequantized(weight).view(2000, 256)
    gguf.as_plain_layers(torch.nn.Sequential(layer))
    tokens = torch.tensor([[5, 1999, 5], [0, 7, 1999]])
    with TensorTracker() as tracker:
        found = layer(tokens)
    assert torch.equal(found, wanted[tokens])
    assert tracker.peak <= numbers.nbytes + 0.05 * wanted.nbytes


DAMAGES = {
    "truncated": (lambda one: replaced(one, numbers=one.as_subclass(torch.Tensor)[:-34]), "bytes instead of"),
    "of another layer": (lambda one: replaced(one, shape=torch.Size((64, 32))), r"\[64, 32\] instead of \[32, 64\]"),
    "of a type without a formula": (lambda one: replaced(one, kind="Q8_1"), "GGUF type Q8_1.*cannot dequantize"),
    "missing": (lambda one: torch.nn.Parameter(torch.zeros(32, 64), requires_grad=False), "the file lacks it"),
}


def replaced(one, numbers=None, shape=None, kind="Q8_0"):
    numbers = one.as_subclass(torch.Tensor) if numbers is None else numbers
    shape = one.tensor_shape if shape is None else shape
    tensor = gguf_models.like_the_pack().Tensor(numbers, tensor_type=gguf_models.type_of(kind), tensor_shape=shape)
    return torch.nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_name(damage, layers):
    from graft_pack.nodes.host.model.quantization import gguf

    made, _ = layers
    change, said = DAMAGES[damage]
    made.linear.weight = change(made.linear.weight)
    with pytest.raises(ModelError, match=f"^linear.weight.*{said}"):
        gguf.as_plain_layers(made)


def test_missing_library_is_named(layers, monkeypatch):
    from graft_pack.nodes.host.model.quantization import gguf

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SettingsError, match="needs the package gguf.*pip install gguf"):
        gguf.as_plain_layers(layers[0])


def test_fingerprint_covers_bytes_and_types():
    from graft_pack.nodes.host.model.fingerprint import patcher_digest

    weights = gguf_models.tensors(models.patcher("Flux").model.diffusion_model.state_dict(), "Q4_0")
    found = [patcher_digest(gguf_models.alike("Flux", weights))]
    key = max(weights, key=lambda one: weights[one][0].dtype == np.uint8)
    numbers, _ = weights[key]
    weights[key] = numbers, gguf_models.type_of("IQ4_NL")
    found.append(patcher_digest(gguf_models.alike("Flux", weights)))
    other = numbers.copy()
    other.flat[-1] ^= 1
    weights[key] = other, gguf_models.type_of("IQ4_NL")
    found.append(patcher_digest(gguf_models.alike("Flux", weights)))
    assert len(set(found)) == 3


def test_full_fine_tuning_and_ranges_are_refused_by_name():
    from graft_pack.nodes.host.model.checks import check_sockets
    from graft_pack.nodes.host.model.lora import apply_adapter

    model = alike("Flux", "Q8_0")
    check_sockets(model, object(), object(), "LoRA")
    with pytest.raises(ModelError, match="Cannot train all weights of a GGUF model.*Train a LoRA"):
        check_sockets(model, object(), object(), "all weights")
    with models.in_training(model, "Flux") as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    with pytest.raises(ModelError, match="on a GGUF model.*Set start_percent to 0"):
        apply_adapter(model, None, adapter, 1.0, 1.0, span=(0.2, 1.0))


def test_tools_read_the_values_of_weights():
    from graft_pack.nodes.host.model.lora import layer_weights

    model = alike("Flux", "Q8_0")
    with models.in_training(model, "Flux") as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    values = layer_weights(model, None, adapter)
    wide = dict(gguf_models.plain("Flux", model).model.diffusion_model.named_parameters())
    name = next(key.rpartition(".lora_up")[0] for key in adapter if key.endswith("lora_up.weight"))
    path = values.place(name).key.removeprefix("diffusion_model.")
    assert torch.equal(values(name)[0], wide[path])


def test_frozen_text_encoder_encodes_and_passes_gradients():
    """A T5 in GGUF beside a CLIP-L from another file, as the pack's loader of two encoders joins them."""
    from graft_pack.nodes.host.model.quantization import gguf
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    source = models.text("Flux")
    weights = gguf_models.tensors(source.cond_stage_model.t5xxl.state_dict(), "Q8_0")
    like = gguf_models.like_the_pack()
    clip = models.text("Flux", operations=like.Operations)
    clip.cond_stage_model.clip_l.load_state_dict(source.cond_stage_model.clip_l.state_dict())
    clip.cond_stage_model.t5xxl.load_state_dict(gguf_models.read(weights, source.cond_stage_model.t5xxl))
    wide = dict(source.cond_stage_model.t5xxl.named_parameters())
    with torch.no_grad():
        for key, tensor in gguf_models.read(weights, source.cond_stage_model.t5xxl).items():
            wide[key].copy_(gguf.dequantized(tensor).as_subclass(torch.Tensor))
    assert torch.equal(
        ComfyText(clip).encode("a red dog")["cross_attn"], ComfyText(source).encode("a red dog")["cross_attn"]
    )
    found = []
    for each in (clip, source):
        with models.with_text("Flux", clip=each, spread=0.1) as training:
            found.append(
                (training.losses().detach(), models.joined(training.gradients()), list(training.plan.trainables))
            )
    assert_alike(*found)


@pytest.mark.parametrize("name", FAMILIES)
def test_files_train_in_the_packs_own_layers(name, tmp_path):
    gguf_models.real_pack()
    arch, kind = FAMILIES[name]
    with torch.inference_mode():
        weights = gguf_models.tensors(models.patcher(name).model.diffusion_model.state_dict(), kind)
        model = gguf_models.loaded(name, gguf_models.write(tmp_path / "base.gguf", arch, weights))
    wide = gguf_models.plain(name, model)
    found, wanted = step(model, name), step(wide, name)
    assert_alike(found, wanted)
    offloaded = step(model, name, tmp_path, offload="on")
    assert torch.equal(offloaded[1], found[1])


@pytest.mark.parametrize("name", ["Flux", "ZImage"])
def test_the_pack_applies_what_was_trained(name, tmp_path):
    """The adapter has a normal base's keys, acts on the GGUF model as in training, and then is a part of the base."""
    from graft_pack.nodes.host.model.fingerprint import patcher_digest
    from graft_pack.nodes.host.model.lora import apply_adapter

    gguf_models.real_pack()
    arch, kind = FAMILIES[name]
    with torch.inference_mode():
        weights = gguf_models.tensors(models.patcher(name).model.diffusion_model.state_dict(), kind)
        model = gguf_models.loaded(name, gguf_models.write(tmp_path / "base.gguf", arch, weights))
    before = denoised(model, name)
    with models.in_training(model, name, steps=6, learning_rate=2e-2, batch_size=2) as training:
        state = models.train(training, tmp_path)
        point = probe(name)
        output = models.trained_denoised(training, *point)
        adapter = training.plan.export(state.trainables, 0).adapter
    with models.in_training(gguf_models.plain(name, model), name) as training:
        assert training.plan.export(training.plan.trainables, 0).adapter.keys() == adapter.keys()
    patched, _ = apply_adapter(model, None, adapter, 1.0, 1.0)
    applied = denoised(patched, name)
    assert (output - before).norm() >= 1e-2 * before.norm()
    assert (applied - output).norm() <= 1e-3 * (output - before).norm()
    assert torch.equal(denoised(model, name), before)
    assert patcher_digest(patched) != patcher_digest(model)
    wide, _ = apply_adapter(gguf_models.plain(name, model), None, adapter, 1.0, 1.0)
    assert_alike(step(patched, name), step(wide, name))


def probe(name):
    x = torch.randn(1, *models.SIZES[name].latent, generator=torch.Generator().manual_seed(9))
    return x, 0.6, models.conditioning(name, 9)


def denoised(model, name):
    return models.denoised(model, *probe(name))
