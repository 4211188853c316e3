"""Tests of Graft Compare with a video model: each cell plays what core's own nodes draw."""

import numpy as np
import pytest
import torch
from graft_pack.trainers.errors import SettingsError
from PIL import Image

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")
SIDE, STEPS, SEED = 64, 2, 5


def request(frames, strengths="0, 1"):
    from graft_pack.nodes.host.actions.compare import CompareRequest

    return CompareRequest("a dog", strengths, "", "", STEPS, 1.0, "euler", "simple", SIDE, SEED, frames)


@pytest.fixture(scope="module")
def parts(comfy):
    """Return (MODEL, CLIP, VAE, adapter) of a tiny Wan; the text encoder is Flux's, of the same width."""
    with torch.inference_mode():
        model, clip, vae = models.patcher("WAN21_T2V"), models.text("Flux"), models.wan_vae()
    with models.in_training(model, "WAN21_T2V", spread=0.1) as training:
        adapter = training.plan.export(training.plan.trainables, 0).adapter
    return model, clip, vae, adapter


def drawn_by_core(model, clip, vae, frames):
    """Return the frames [T, H, W, 3] of core's sampler."""
    import nodes

    positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in ("a dog", ""))
    latent = {"samples": torch.zeros(1, 16, (frames - 1) // 4 + 1, SIDE // 8, SIDE // 8)}
    (sampled,) = nodes.common_ksampler(model, SEED, STEPS, 1.0, "euler", "simple", positive, negative, latent)
    return nodes.VAEDecode().decode(vae, sampled)[0]


@torch.inference_mode()
def test_each_cell_plays_what_core_draws(parts):
    from graft_pack.nodes.host.actions.compare import compare
    from graft_pack.nodes.host.model.lora import apply_adapter

    *base, adapter = parts
    model, clip, vae = base
    image, pictures = compare(model, clip, vae, request(10), {"adapter": adapter}, "1")
    assert len(image) == 9 and len(pictures) == 2 * 9
    wanted = [drawn_by_core(given, clip, vae, 9) for given in (model, apply_adapter(model, None, adapter, 1.0, 0.0)[0])]
    assert (wanted[0] - wanted[1]).abs().max() > 0.05
    assert (pictures - torch.cat(wanted)).abs().max() <= 2 / 255
    for number, sheet in enumerate(image):
        for place, clip_frames in enumerate(pictures.split(9)):
            right = -(2 - place) * (SIDE + 4)
            cell = sheet[-SIDE - 4 : -4, right : right + SIDE]
            assert torch.equal(cell, clip_frames[number])


@torch.inference_mode()
def test_the_preview_moves(parts, comfy):
    import folder_paths
    from graft_pack.nodes.compare import _preview

    shown = _preview(torch.rand(5, 16, 24, 3), None).as_dict()
    assert shown["animated"] == (True,)
    (file,) = shown["images"]
    image = Image.open(f"{folder_paths.get_temp_directory()}/{file['filename']}")
    assert (image.format, image.n_frames, image.size) == ("WEBP", 5, (24, 16))
    assert np.asarray(image.convert("RGB")).shape == (16, 24, 3)


@torch.inference_mode()
def test_a_model_of_stills_draws_no_clips(parts):
    from graft_pack.nodes.host.actions.compare import compare

    *_, vae, adapter = parts
    model, clip = models.patcher("Flux"), models.text("Flux")
    with pytest.raises(SettingsError, match="frames is 9, but this model or its VAE makes stills"):
        compare(model, clip, vae, request(9), {"adapter": adapter}, "1")
