"""Tests that the assembled checkpoint computes in the real host the same as the thin networks."""

import pytest
import torch
from safetensors.torch import load_file

from tests.toy import assemble, host, pretrain, text, thin, world

EXACT = 3e-4


@pytest.fixture(scope="module")
def thin_networks():
    """Return the shipped thin UNet and VAE."""
    unet = thin.ThinUNet(pretrain.WIDTH)
    unet.load_state_dict({k: v.float() for k, v in load_file(assemble.WEIGHTS / "unet.safetensors").items()})
    return unet.eval(), pretrain.load_vae(assemble.WEIGHTS / "vae.safetensors")


@pytest.fixture(scope="module")
def loaded(comfy, tiny_base):
    """Return the tiny base as the host loads it: model, clip, vae."""
    model, clip, vae = host.load(tiny_base, comfy.path)
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model, clip, vae


@pytest.mark.parametrize(
    "prompt", ["", "a large red circle on a blue background", "a large sks toy on a pink background"]
)
def test_contexts_are_the_hosts(loaded, prompt):
    ours = text.encode(text.build_clip(), torch.tensor([text.tokenize(prompt)]))
    assert (host.encode(loaded[1], prompt) - ours).abs().max() <= 1e-5


def test_tokens_are_the_hosts(loaded):
    concepts = [caption for name in world.CONCEPTS for _, caption in world.concept_pictures(name)]
    captions = [world.caption(world.Scene(*c)) for c in world.known_scenes() + world.held_out_scenes()]
    for caption in captions + concepts:
        (host_tokens,) = loaded[1].tokenize(caption)["l"]
        assert [token for token, _ in host_tokens] == text.tokenize(caption)


@torch.no_grad()
def test_unet_is_the_thin_one(loaded, thin_networks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, 8, 8, generator=generator)
    context = torch.randn(4, 77, 768, generator=generator)
    timesteps = torch.tensor([0.0, 300.0, 700.0, 999.0])
    full = loaded[0].model.diffusion_model(x, timesteps, context=context)
    assert full.dtype == torch.float32
    assert (full - thin_networks[0](x, timesteps, context)).abs().max() <= EXACT


@torch.no_grad()
def test_vae_is_the_thin_one(loaded, thin_networks):
    model, _, vae = loaded
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 64, 64, 3, generator=generator)
    latents = model.model.process_latent_in(vae.encode(pixels))
    assert (latents - thin_networks[1].encode(pixels.movedim(3, 1))).abs().max() <= EXACT
    decoded = vae.decode(model.model.process_latent_out(latents))
    ours = thin_networks[1].decode(latents).clamp(0, 1).movedim(1, 3)
    assert (decoded - ours).abs().max() <= EXACT


def test_schedule_is_the_hosts(loaded):
    sigmas = loaded[0].get_model_object("model_sampling").sigmas
    assert (1 / (1 + sigmas**2) - pretrain.schedule()).abs().max() <= 1e-6


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Write thin random weights into a folder and use a minimal text encoder, so that assembling is quick."""
    monkeypatch.setattr(text, "build_clip", lambda: {"text_model.final_layer_norm.weight": torch.ones(768)})
    pretrain.save_weights(tmp_path / "unet.safetensors", thin.ThinUNet(40).state_dict())
    pretrain.save_weights(tmp_path / "vae.safetensors", thin.ThinVAE().state_dict())
    return tmp_path


def test_same_weights_give_the_same_bytes_and_are_not_written_twice(small):
    first = assemble.assemble(small / "a.safetensors", small)
    second = assemble.assemble(small / "b.safetensors", small)
    assert first.read_bytes() == second.read_bytes()
    written = first.stat().st_mtime_ns
    assemble.assemble(first, small)
    assert first.stat().st_mtime_ns == written


def test_other_weights_and_broken_files_are_replaced(small):
    path = assemble.assemble(small / "a.safetensors", small)
    before = assemble.read_marker(path)
    pretrain.save_weights(small / "vae.safetensors", thin.ThinVAE().state_dict())
    assemble.assemble(path, small)
    assert assemble.read_marker(path) == assemble.compute_fingerprint(small) != before
    path.write_bytes(b"half a file")
    assemble.assemble(path, small)
    assert assemble.read_marker(path) == assemble.compute_fingerprint(small)


def test_a_failure_leaves_the_old_file(small, monkeypatch):
    path = assemble.assemble(small / "a.safetensors", small)
    before = path.read_bytes()
    pretrain.save_weights(small / "vae.safetensors", thin.ThinVAE().state_dict())
    monkeypatch.setattr(assemble, "save_file", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        assemble.assemble(path, small)
    assert path.read_bytes() == before
    assert [p.name for p in small.glob("a*")] == ["a.safetensors"]
