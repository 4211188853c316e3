"""Tests of clips with the host's own video VAEs: lengths, latents equal to the host's, tiles in time."""

import pytest
import torch

from tests.support import models
from tests.support.videos import write_video

pytestmark = pytest.mark.usefixtures("comfy")


def frames_of(count, seed=1):
    return torch.rand(count, 16, 24, 3, generator=torch.Generator().manual_seed(seed))


def host_latent(vae, pixels):
    with torch.inference_mode():
        return vae.encode(pixels).float().cpu()


@pytest.fixture(scope="module")
def wan(comfy):
    return models.wan_vae()


@pytest.mark.parametrize("count", [1, 5, 9])
def test_latents_of_a_clip_are_the_hosts(wan, count):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    pixels = frames_of(count)
    mean, spread = ComfyCodec(wan).encode_clip(pixels)
    assert mean.shape == (1, 16, 1 + (count - 1) // 4, 2, 3) and mean.dtype == torch.float32
    assert torch.equal(mean, host_latent(wan, pixels)) and not mean.is_inference()
    assert spread is None


# Lengths that ComfyUI's EmptyLatentVideo nodes offer: 1 and then steps of 4, 6 and 8.
LENGTHS = {
    4: {1: 1, 2: 1, 4: 1, 5: 5, 20: 17, 81: 81},
    6: {1: 1, 6: 1, 7: 7, 20: 19},
    8: {1: 1, 8: 1, 9: 9, 20: 17, 97: 97},
}


@pytest.mark.parametrize("step", LENGTHS)
def test_lengths_are_snapped_to_what_the_vae_takes(wan, step, monkeypatch):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    monkeypatch.setattr(wan, "downscale_ratio", (lambda count: max(0, (count + step - 1) // step), 8, 8))
    monkeypatch.setattr(wan, "upscale_ratio", (lambda count: max(0, count * step - (step - 1)), 8, 8))
    codec = ComfyCodec(wan)
    assert {count: codec.snap_frames(count) for count in LENGTHS[step]} == LENGTHS[step]


def test_the_hosts_own_ratios_are_read(wan):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    assert [ComfyCodec(wan).snap_frames(count) for count in (1, 16, 17, 20)] == [1, 13, 17, 17]


def test_a_vae_of_stills_takes_no_clip(wan, monkeypatch):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    assert ComfyCodec(models.kl_vae(4)).snap_frames(9) == 0
    monkeypatch.setattr(wan, "not_video", True)
    assert ComfyCodec(wan).snap_frames(9) == 0


def test_what_does_not_fit_is_encoded_in_tiles_of_few_frames(wan, monkeypatch):
    from graft_pack.nodes.host.model.vae import ComfyCodec

    pixels, real = frames_of(33), wan.first_stage_model.encode
    lengths = []

    def small(given):
        lengths.append(given.shape[2])
        if given.shape[2] > 17:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(given)

    monkeypatch.setattr(wan.first_stage_model, "encode", small)
    mean, _ = ComfyCodec(wan).encode_clip(pixels)
    assert mean.shape == (1, 16, 9, 2, 3) and mean.isfinite().all()
    assert max(length for length in lengths if length != 33) <= 17
    with pytest.raises(RuntimeError, match="another"):
        monkeypatch.setattr(wan.first_stage_model, "encode", lambda given: raise_(RuntimeError("another error")))
        ComfyCodec(wan).encode_clip(pixels)


def raise_(error):
    raise error


def test_a_folder_of_clips_and_stills_trains_on_the_hosts_latents(wan, tmp_path):
    """The latents of a run's cache equal the host's own encoding of the same frames."""
    import numpy as np
    from graft_pack.nodes.host.model.vae import ComfyCodec
    from graft_pack.trainers.data.scan import ScanOptions, scan_folder
    from graft_pack.trainers.preprocessing.cache import Cache
    from graft_pack.trainers.preprocessing.crops import crop_examples
    from graft_pack.trainers.preprocessing.encode import LatentCache
    from graft_pack.trainers.protocols import Geometry

    write_video(tmp_path / "a.mp4", 20, size=(32, 24))
    dataset = scan_folder(str(tmp_path), "sks", 24, 1, None, ScanOptions(frames=7, pieces="whole"))
    codec = ComfyCodec(wan)
    (row,), _ = crop_examples(dataset, {0: Geometry(24, 8)}, codec.snap_frames)
    assert [crop.piece for crop in row.crops] == [(start, 5) for start in (0, 5, 10, 15)]
    latents = LatentCache(Cache(str(tmp_path / "cache")), codec)
    assert latents.fill([(row.example, row.all_crops())], lambda name: None) == [None]
    for crop in row.crops:
        (left, top), (width, height) = crop.offset, crop.bucket
        frames = [np.asarray(frame) for frame in row.example.source.frames(*crop.piece)]
        assert crop.scaled == frames[0].shape[1::-1], "cropped, not scaled"
        pixels = np.array(frames)[:, top : top + height, left : left + width]
        expected = host_latent(wan, torch.from_numpy(pixels.astype(np.float32) / 255))
        assert torch.equal(latents.get(latents.key(row.example, crop))["mean"], expected)


def test_a_node_splits_batches_into_clips(comfy):
    from graft_pack.nodes.dataset import GraftDatasetFromImages

    images = [torch.rand(11, 24, 32, 3), torch.rand(6, 24, 32, 3)]
    given = {"captions": ["a dog"], "trigger": [""], "resolution": [64]}
    (split,) = GraftDatasetFromImages.execute(images, **given, clips=[2]).result
    assert [row.clip.count for row in split.examples] == [5, 5, 3, 3]
    (stills,) = GraftDatasetFromImages.execute(images, **given).result
    assert len(stills.examples) == 17 and stills.examples[0].clip is None
