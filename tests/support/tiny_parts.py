"""A custom node of the test's server: tiny text encoders and VAEs of the host's own classes.

The host's loaders know the published sizes of most transformers alone. Here they also know the tiny networks, by the
names and shapes of their weights.
"""

import importlib.util
import sys
from pathlib import Path

import comfy.model_detection
import comfy.sd
import torch
from comfy.ldm.wan.vae import WanVAE

FAMILIES = ("Flux", "SD3", "Lumina 2", "ZImage", "QwenImage")


def _tests():
    """Return the module `tests.support.models`. The folder above `tests` must not be on sys.path."""
    if "tests" not in sys.modules:
        folder = Path(__file__).resolve().parents[1]
        spec = importlib.util.spec_from_file_location(
            "tests", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules["tests"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["tests"])
    return importlib.import_module("tests.support.models")


def _shapes(weights):
    return {key: tuple(value.shape) for key, value in weights.items()}


def _detect(known):
    def detect(state_dict, unet_key_prefix, *args, **kwargs):
        for name in FAMILIES if not unet_key_prefix else ():
            config = _tests().SIZES[name].build()
            config.set_inference_dtype(torch.float32, None)
            network = config.get_model({}, "", device="meta").diffusion_model
            if _shapes(network.state_dict()).items() >= _shapes(state_dict).items():
                return _tests().SIZES[name].build()
        return known(state_dict, unet_key_prefix, *args, **kwargs)

    return detect


comfy.model_detection.model_config_from_unet = _detect(comfy.model_detection.model_config_from_unet)


class TinyParts:
    """Node that returns a text encoder and a VAE with random weights for a tiny network."""

    RETURN_TYPES = ("CLIP", "VAE")
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": (FAMILIES,)}}

    def make(self, family):
        models = _tests()
        clip = models.text(family if family in (*models.TEXT, *models.SEEING) else "Flux")
        if family != "QwenImage":
            return clip, models.kl_vae(16)
        network = WanVAE(
            dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, temperal_downsample=[False, True, True]
        )
        models.randomize(network, 0)
        return clip, comfy.sd.VAE(sd=network.state_dict(), dtype=torch.float32)


NODE_CLASS_MAPPINGS = {"TinyParts": TinyParts}
