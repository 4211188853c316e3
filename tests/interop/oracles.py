"""Adapters of other libraries on the tiny SD1: the file that each library writes, and its own network's output."""

from __future__ import annotations

import copy
import functools
import logging
import warnings
from dataclasses import dataclass
from unittest.mock import patch

import torch

from tests.support import diffusers_host, models

X = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
SIGMA = 2.0


@dataclass(frozen=True, repr=False)
class Oracle:
    """An adapter as its maker applies it.

    Attributes:
        path: the maker's file.
        output, base: the raw output of the maker's network with and without the adapter.
    """

    path: str
    output: torch.Tensor
    base: torch.Tensor

    def error(self, output: torch.Tensor) -> float:
        """Return the error of an output relative to the adapter's effect."""
        effect = (self.output - self.base).norm()
        assert effect > 1e-3 * self.base.norm()
        return float((output - self.output).norm() / effect)


def output_of(model) -> torch.Tensor:
    """Return the raw output of a MODEL."""
    denoised = models.denoised(model, X, SIGMA, models.conditioning("SD1", 9))
    return (X - denoised) / SIGMA


def network_output(network) -> torch.Tensor:
    """Return the raw output of a UNet of diffusers."""
    return diffusers_host.raw_output(network, X, SIGMA, models.conditioning("SD1", 9))


def randomize(parameters, spread: float = 0.2) -> None:
    """Add noise to parameters, so that every adapter has an effect."""
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=source) * spread)


@functools.cache
def _converted(model):
    network = diffusers_host.convert_sd1(model)
    return network, network_output(network)


def network_of(model):
    """Return the tiny SD1 as diffusers' UNet, free to change, and its raw output."""
    network, output = _converted(model)
    return copy.deepcopy(network), output


# Classes that sd-scripts trains with LyCORIS. LyCORIS' own list has a class that it would name twice in SD1.
_TARGETS = {
    "unet_target_module": ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"],
    "unet_target_name": ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"],
}


def lycoris(model, path, algo: str, dim: int = 4, alpha: float = 3.0, spread: float = 0.2, **options) -> Oracle:
    """Return an adapter of LyCORIS on all layers that its kohya network targets."""
    from lycoris import kohya

    logging.disable(logging.WARNING)
    network, base = network_of(model)
    with patch.dict(kohya.PRESET, full=_TARGETS):
        made = kohya.create_network(
            1.0, dim, alpha, None, [], network, algo=algo, conv_dim=dim, conv_alpha=alpha, **options
        )
    made.apply_to([], network, False, True)
    randomize([p for p in made.parameters() if p.requires_grad], spread)
    output = network_output(network)
    made.save_weights(str(path), torch.float32, {"ss_network_module": "lycoris.kohya"})
    logging.disable(logging.NOTSET)
    return Oracle(str(path), output, base)


def peft(model, folder, config, spread: float = 0.1) -> Oracle:
    """Return an adapter of peft, saved as a folder and loaded again by `PeftModel.from_pretrained`."""
    from peft import PeftModel, get_peft_model

    network, base = network_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        made = get_peft_model(network, config)
        randomize([p for p in made.parameters() if p.requires_grad], spread)
        made.save_pretrained(str(folder))
        loaded = PeftModel.from_pretrained(network_of(model)[0], str(folder))
    output = network_output(loaded.base_model.model)
    return Oracle(str(folder / "adapter_model.safetensors"), output, base)


@dataclass(frozen=True, repr=False)
class Family:
    """A tiny model of a family beside diffusers' network with its weights.

    Attributes:
        name: key in `PUBLISHED`.
        model: the MODEL.
    """

    name: str
    model: object

    @property
    def published(self):
        from tests.support.published import PUBLISHED

        return PUBLISHED[self.name]

    @functools.cached_property
    def point(self):
        """x, sigma and conditioning of the prediction to compare."""
        key = self.published.name
        x = torch.randn(1, *models.SIZES[key].latent, generator=torch.Generator().manual_seed(9))
        return x, 2.0 if self.name == "SDXL" else 0.6, models.conditioning(key, 9)

    @functools.cached_property
    def _network(self):
        # Converted once, before ComfyUI loads the model and patches its weights in place.
        return self.published.network(self.model)[0].requires_grad_(False)

    def network(self):
        """Return diffusers' network, free to change."""
        return copy.deepcopy(self._network)

    def network_output(self, network) -> torch.Tensor:
        """Return the raw output of diffusers' network."""
        x, sigma, conditioning = self.point
        with torch.no_grad():
            return self.published.run(network, x, torch.tensor([sigma]), [conditioning])

    def output(self, model) -> torch.Tensor:
        """Return the raw output of a MODEL."""
        x, sigma, conditioning = self.point
        return (x - models.denoised(model, x, sigma, conditioning)) / sigma

    def peft(self, folder, config, spread: float = 0.1) -> Oracle:
        """Return an adapter of peft, saved as a folder and loaded again."""
        from peft import PeftModel, get_peft_model

        base = self.network_output(self.network())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(5)
            made = get_peft_model(self.network(), config)
            randomize([p for p in made.parameters() if p.requires_grad], spread)
            made.save_pretrained(str(folder))
            loaded = PeftModel.from_pretrained(self.network(), str(folder))
        return Oracle(str(folder / "adapter_model.safetensors"), self.network_output(loaded.base_model.model), base)

    def lycoris(self, path, algo: str, spread: float = 0.2, **options) -> Oracle:
        """Return an adapter of LyCORIS as SimpleTuner writes it, for attention layers."""
        from lycoris import wrapper

        logging.disable(logging.WARNING)
        network = self.network()
        base = self.network_output(network)
        targets = {"target_module": ["Attention", "FluxAttention"], "target_name": []}
        with patch.dict(wrapper.PRESET, full=targets):
            made = wrapper.create_lycoris(network, 1.0, linear_dim=4, linear_alpha=3.0, algo=algo, **options)
        made.apply_to()
        randomize([p for p in made.parameters() if p.requires_grad], spread)
        output = self.network_output(network)
        made.save_weights(str(path), torch.float32, {})
        logging.disable(logging.NOTSET)
        return Oracle(str(path), output, base)
