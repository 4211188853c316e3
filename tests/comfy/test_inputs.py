"""Tests of wrong connections that a user may make, and of unusual but valid ones."""

import pytest
import torch
from graft_pack.trainers.errors import ModelError, SettingsError

from tests.support import models

pytestmark = pytest.mark.usefixtures("comfy")


def test_a_vae_of_another_family_is_named():
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    denoiser = ComfyDenoiser(models.patcher("SD1"), None, models.SmallVae())
    fitting = models.conditioning("SD1").tensors
    denoiser.check_inputs(torch.zeros(1, 4, 8, 8), fitting)
    with pytest.raises(ModelError, match="16 channels.*takes 4.*Connect the VAE") as caught:
        denoiser.check_inputs(torch.zeros(1, 16, 8, 8), fitting)
    assert caught.value.input == "vae"


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_text_encoder_of_another_family_is_named(family):
    from graft_pack.nodes.host.model.denoiser import ComfyDenoiser

    denoiser = ComfyDenoiser(models.patcher(family), None, models.SmallVae())
    latent = torch.zeros(1, *models.FAMILIES[family].latent)
    denoiser.check_inputs(latent, models.conditioning(family).tensors)
    with pytest.raises(ModelError, match="2048 numbers per token.*takes 48.*Connect the text encoder") as caught:
        denoiser.check_inputs(latent, {"cross_attn": torch.zeros(1, 77, 2048)})
    assert caught.value.input == "clip"


def test_an_inpainting_model_predicts_as_it_does_without_a_mask():
    import comfy.model_patcher

    config = models.FAMILIES["SD1"].build()
    config.unet_config["in_channels"] = 9
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    models.randomize(model.diffusion_model, 0)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with models.in_training(model, "SD1", spread=0.1) as training:
        assert all(torch.isfinite(gradient).all() for gradient in training.gradients())
        raw = training.denoiser.predict(x, torch.ones(1), [models.conditioning("SD1")])
    assert raw.shape == x.shape


def test_a_model_that_does_more_around_its_network_is_refused():
    model = models.patcher("SD1")

    class Wrapping(type(model.model)):
        def _apply_model(self, *args, **kwargs):
            return super()._apply_model(*args, **kwargs)

    model.model.__class__ = Wrapping
    with pytest.raises(ModelError, match="more around its network"), models.in_training(model, "SD1"):
        pass


@pytest.mark.parametrize(
    "count, nccl, said", [(2, True, ""), (3, True, "sees 2 GPUs here"), (2, False, "without NCCL")]
)
def test_processes_that_cannot_train_together_are_refused_before_they_start(count, nccl, said, monkeypatch):
    """The count is also known on an older PyTorch, which has no `torch.accelerator`."""
    import comfy.model_management
    from graft_pack.nodes.host.jobs import launcher

    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(comfy.model_management, "is_nvidia", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    monkeypatch.delattr(torch, "accelerator", raising=False)
    if not said:
        launcher.check_count(count)
        return
    with pytest.raises(SettingsError, match=said) as caught:
        launcher.check_count(count)
    assert caught.value.input == "options"
