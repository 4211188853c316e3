"""Tests of several captions or pictures in one call of the host: each result equals its single encoding."""

import pytest
import torch

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")

CAPTIONS = [
    "a red dog",
    "",
    "a photo, (blue) sky and a [green] field: 1.5",
    "many words, " * 40,
    "picture 4, of many colours, square, seen from the front",
    "other words of the same number, " * 20,
    "words, many words, " * 20,
]


def text_of(name, layer=None):
    from graft_pack.nodes.host.model.text_encoder import ComfyText

    clip = models.text(name)
    if layer is not None:
        clip.clip_layer(layer)
    return ComfyText(clip)


def by_form(text, captions):
    found = {}
    for caption in captions:
        found.setdefault(text.form(caption), []).append(caption)
    return found


@pytest.mark.parametrize("layer", [None, -2], ids=["last layer", "clip skip"])
@pytest.mark.parametrize("name", models.TEXT)
def test_each_caption_is_encoded_as_it_is_alone(name, layer):
    text = text_of(name, layer)
    groups = by_form(text, CAPTIONS)
    assert None not in groups and max(map(len, groups.values())) >= 3
    # A fresh encoder: the choice of layer must not depend on earlier encodings.
    fresh = text_of(name, layer)
    for captions in groups.values():
        for caption, found in zip(captions, fresh.encode_all(captions), strict=True):
            expected = text.encode(caption)
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                assert tensor.shape == expected[key].shape and tensor.device.type == "cpu"
                assert models.distance(tensor, expected[key]) <= 1e-5, (caption, key)
                assert tensor.untyped_storage().nbytes() == tensor.nbytes, "what is kept does not hold the whole batch"


@pytest.mark.parametrize("name", models.TEXT)
def test_the_encoders_are_asked_once_for_all(name):
    text = text_of(name)
    for captions in by_form(text, CAPTIONS).values():
        calls = []
        for part in text.clip.cond_stage_model.children():
            part.transformer.register_forward_hook(lambda *given, calls=calls: calls.append(given[0]))
        text.encode_all(captions)
        assert len(calls) == len(set(map(id, calls)))


def test_what_stands_for_vectors_is_encoded_alone(comfy):
    import folder_paths
    from safetensors.torch import save_file

    (folder,) = folder_paths.get_folder_paths("embeddings")[:1]
    width = models.TEXT["SD1"]["clip_l"]["hidden_size"]
    comfy.base.joinpath("models", "embeddings").mkdir(parents=True, exist_ok=True)
    save_file({"clip_l": torch.zeros(2, width)}, f"{folder}/encoded-alone.safetensors")
    text = text_of("SD1")
    assert text.form("a photo of embedding:encoded-alone") is None
    assert text.form("a photo") is not None


@pytest.mark.parametrize("channels", [4, 16], ids=["SD1", "Flux"])
def test_each_picture_is_encoded_as_it_is_alone(channels, monkeypatch):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = models.kl_vae(channels)
    codec = ComfyCodec(vae)
    assert codec.pixels_at_once == 4 * 64 * 64
    pixels = torch.rand(3, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    alone = [codec.encode(one) for one in pixels.split(1)]
    whole = codec.encode(pixels)
    assert not any(tensor.is_inference() for tensor in whole)
    # A device with little memory encodes them one group after another.
    monkeypatch.setattr(vae, "memory_used_encode", lambda shape, dtype: 1e30)
    split = codec.encode(pixels)
    for found in (whole, split):
        for row, (mean, logvar) in enumerate(alone):
            assert models.distance(found[0][row], mean[0]) <= 1e-5
            assert models.distance(found[1][row], logvar[0]) <= 1e-5


def test_several_that_need_tiles_are_refused_and_one_is_not(monkeypatch):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = models.kl_vae(4)
    monkeypatch.setattr(vae, "encode", lambda given: vae.encode_tiled(given, tile_x=32, tile_y=32, overlap=8))
    pixels = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    with pytest.raises(RuntimeError, match="tiles"):
        ComfyCodec(vae).encode(pixels)
    mean, logvar = ComfyCodec(vae).encode(pixels[:1])
    assert mean.shape == (1, 4, 8, 8) and logvar is None
    assert not mean.is_inference()


def test_a_vae_of_videos_takes_one_picture_at_a_time():
    """The host reads a batch as the frames of one video."""
    from graft_pack.nodes.host.model.vae import ComfyCodec

    vae = models.kl_vae(4)
    vae.latent_dim = 3
    assert ComfyCodec(vae).pixels_at_once == 0
