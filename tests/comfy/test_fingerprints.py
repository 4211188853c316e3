"""Tests of base fingerprints: every weight value counts, each is read once, and earlier versions' are recognized."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

# The fingerprints of the tiny base by versions that sampled 32 values of each weight. Newer hosts hold its text encoder
# in another dtype.
SAMPLED = {
    "model": ["cb9fab38c84a4630d355b8adcaaec304b2c00533bc8b6b0472acbd1c3782ed36"],
    "clip": [
        "813560a95057c0b64bc8aab779c0f2c4c09537a2c324981461cc8a0216927303|None|[]",
        "2652603958d94dd6651fc6e925ce7ac72760b2ce8879b030e5a4aa7e74beb47a|None|[]",
    ],
    "vae": ["e4a84adcab7f015a4a1c1a85f6644068aba881f6dabafa71380b87f31e31f148|torch.float32"],
}


def load(path):
    """Return a checkpoint's model, text encoder and VAE, as the host's node loads them."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]


def fingerprints(base, earlier=False):
    from graft_pack.nodes.host.model.fingerprint import patcher_digest, sampled_patcher_digest
    from graft_pack.nodes.host.model.text_encoder import ComfyText
    from graft_pack.nodes.host.model.vae import ComfyCodec

    model, clip, vae = base
    name = "earlier_fingerprint" if earlier else "fingerprint"
    return {
        "model": (sampled_patcher_digest if earlier else patcher_digest)(model),
        "clip": getattr(ComfyText(clip), name)(),
        "vae": getattr(ComfyCodec(vae), name)(),
    }


@pytest.fixture
def reads(monkeypatch):
    """Return the list of sizes of tensors that are read whole from now on."""
    from graft_pack.nodes.host.model import fingerprint

    found = []
    compute = fingerprint._compute

    def counted(tensor):
        found.append(tensor.numel())
        return compute(tensor)

    monkeypatch.setattr(fingerprint, "_compute", counted)
    return found


def test_earlier_fingerprints_are_those_of_earlier_versions(tiny_base):
    found = fingerprints(load(tiny_base), earlier=True)
    assert all(found[part] in known for part, known in SAMPLED.items())


def test_the_same_file_has_the_same_fingerprints(tiny_base, tmp_path):
    first = fingerprints(load(tiny_base))
    copy = shutil.copy(tiny_base, tmp_path / "copy.safetensors")
    assert fingerprints(load(copy)) == first


@pytest.mark.parametrize(
    "part, ending",
    [
        ("clip", "token_embedding.weight"),
        ("model", "attn2.to_k.weight"),
        ("model", "out.2.bias"),
        ("vae", "taesd_decoder.12.weight"),
    ],
)
def test_any_number_of_a_weight_counts(tiny_base, tmp_path, part, ending):
    """A checkpoint replaced under its name, changed at a value that no sample covers."""
    tensors = load_file(tiny_base)
    name = next(name for name in tensors if name.endswith(ending))
    flat = tensors[name].reshape(-1)
    step = max(1, flat.numel() // 32)
    sampled = range(0, flat.numel(), step)[:32]
    place = next((place for place in reversed(range(flat.numel())) if place not in sampled), flat.numel() - 1)
    flat[place] += 0.25
    changed = tmp_path / "changed.safetensors"
    save_file(tensors, changed)
    before, after = fingerprints(load(tiny_base)), fingerprints(load(changed))
    assert [key for key in before if before[key] != after[key]] == [part]


def test_weights_are_read_once(tiny_base, reads):
    base = load(tiny_base)
    first = fingerprints(base)
    assert len(reads) > 100
    reads.clear()
    assert fingerprints(base) == first
    assert reads == []


def test_weights_that_the_host_moves_and_patches_are_not_read_again(reads):
    """Training copies inference tensors, and a loaded clone's patches are in the weights in place."""
    import comfy.model_management
    from graft_pack.nodes.host.model.fingerprint import patcher_digest
    from graft_pack.trainers.memory.autograd import own_weights

    with torch.inference_mode():
        model = models.patcher("SD1")
    patched = model.clone()
    state = model.model.state_dict()
    name = next(name for name in state if name.endswith("attn2.to_k.weight"))
    patched.add_patches({name: (torch.ones_like(state[name]),)}, 0.5)
    digests = patcher_digest(model), patcher_digest(patched)
    reads.clear()
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert (patcher_digest(model), patcher_digest(patched)) == digests
    comfy.model_management.unload_all_models()
    with torch.inference_mode(False):
        own_weights(model.model)
    assert (patcher_digest(model), patcher_digest(patched)) == digests
    assert sum(reads) < 10_000, "the sampling's own tables alone"


@pytest.mark.parametrize("way", ["in place", "another tensor", "rows swapped"])
def test_weights_that_are_changed_in_a_running_server_count(way):
    from graft_pack.nodes.host.model.fingerprint import module_digest

    module = torch.nn.Linear(300, 40)
    before = module_digest(module)
    with torch.no_grad():
        if way == "in place":
            module.weight[3, 5] += 1
        elif way == "another tensor":
            changed = module.weight.detach().clone()
            changed[3, 5] += 1
            module.weight = torch.nn.Parameter(changed)
        else:
            module.weight.copy_(module.weight.flip(0))
    assert module_digest(module) != before


def test_memory_that_is_given_anew_is_not_taken_for_the_old_tensor():
    from graft_pack.nodes.host.model.fingerprint import tensor_checksum

    found = set()
    for number in range(50):
        found.add(tensor_checksum(torch.full((1000,), float(number))))
    assert len(found) == 50


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "bool", "int64", "complex64"]
)
def test_every_kind_of_number_is_read(dtype):
    from graft_pack.nodes.host.model.fingerprint import tensor_checksum

    ones, others = torch.ones(3, 5), torch.ones(3, 5)
    others[2, 4] = 0
    kind = getattr(torch, dtype)
    assert tensor_checksum(ones.to(kind)) == tensor_checksum(torch.ones(3, 5).to(kind))
    assert tensor_checksum(ones.to(kind)) != tensor_checksum(others.to(kind))
    turned = torch.arange(15.0).reshape(3, 5).T
    assert tensor_checksum(turned) == tensor_checksum(turned.contiguous())


def test_a_tensor_without_numbers_has_a_checksum():
    from graft_pack.nodes.host.model.fingerprint import tensor_checksum

    shapes = [torch.zeros(0), torch.zeros(2, 0), torch.zeros(3, device="meta"), torch.tensor(0.0)]
    assert len({tensor_checksum(one) for one in shapes}) == 4


class Holding(torch.Tensor):
    """A quantized tensor as the host has it: integers with a scale."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], {}

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(str(function))


def test_quantized_tensors_count_with_numbers_and_scale():
    from graft_pack.nodes.host.model.fingerprint import tensor_checksum

    numbers = torch.zeros(4, 4, dtype=torch.int8)
    others = numbers.clone()
    others[3, 1] = 1
    made = [
        Holding(numbers, torch.tensor(1.0)),
        Holding(others, torch.tensor(1.0)),
        Holding(numbers, torch.tensor(2.0)),
    ]
    assert len({tensor_checksum(one) for one in made}) == 3
    assert tensor_checksum(Holding(numbers.clone(), torch.tensor(1.0))) == tensor_checksum(made[0])


def test_a_lora_upstream_counts_with_all_its_numbers(tiny_base):
    import comfy.sd
    from graft_pack.nodes.host.model.fingerprint import patcher_digest, sampled_patcher_digest

    model, clip, _ = load(tiny_base)
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    path = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    out, width = model.model.state_dict()[path].shape
    source = torch.Generator().manual_seed(1)
    lora = {
        f"{key}.lora_up.weight": torch.randn(out, 4, generator=source),
        f"{key}.lora_down.weight": torch.randn(4, width, generator=source),
    }
    other = {name: tensor.clone() for name, tensor in lora.items()}
    other[f"{key}.lora_down.weight"].view(-1)[1] += 1
    made = [comfy.sd.load_lora_for_models(model, clip, one, 1.0, 1.0)[0] for one in (lora, other)]
    assert sampled_patcher_digest(made[0]) == sampled_patcher_digest(made[1])
    assert patcher_digest(made[0]) != patcher_digest(made[1])
    assert os.path.exists(tiny_base)
