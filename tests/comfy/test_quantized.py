"""Tests of adapters on the host's mixed-precision Linear, which stores 8-bit weights and passes gradients through."""

import json

import pytest
import torch
from graft_pack.trainers.errors import ModelError

from tests.support import models, networks

pytestmark = pytest.mark.usefixtures("comfy")


def quantized(name):
    """Return (MODEL with fp8 Linears, MODEL of the values that they stand for), as the host loads such files."""
    import comfy.ops

    if not hasattr(comfy.ops, "mixed_precision_ops"):
        pytest.skip("this ComfyUI has no mixed precision")
    plain = models.patcher(name)
    network = plain.model.diffusion_model
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    chosen = [
        path
        for path, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear) and ("blocks" in path or "attn" in path)
    ]
    layers = {}
    for path in chosen:
        weight = weights[f"{path}.weight"]
        scale = weight.abs().max() / 448.0
        low = (weight / scale).to(torch.float8_e4m3fn)
        weights[f"{path}.weight"], weights[f"{path}.weight_scale"] = low, scale
        layers[path] = {"format": "float8_e4m3fn"}
        with torch.no_grad():
            network.get_submodule(path).weight.copy_(low.float() * scale)
    config = networks.SIZES[name].build()
    config.set_inference_dtype(torch.float32, torch.float32)
    if hasattr(config, "quant_config"):
        config.quant_config = {"mixed_ops": True}
        for path, told in layers.items():
            weights[f"{path}.comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    else:
        config.layer_quant_config = layers
    model = config.get_model({}, "", device="cpu")
    missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [key for key in missing if not key.endswith(".weight")]
    return models.patched(model), plain, chosen


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoKr"])
@pytest.mark.parametrize("name", ["SD1", "Flux"])
def test_an_adapter_is_trained_as_on_the_numbers_the_weights_stand_for(name, method):
    with torch.inference_mode():
        *pair, chosen = quantized(name)
    if method == "DoRA" and not hasattr(pair[0].model.model_config, "quant_config"):
        refused = pytest.raises(ModelError, match="DoRA reads the base's weights")
        with refused, models.in_training(pair[0], name, targets="all linear", method=method):
            pass
        return
    found = []
    fields = {"spread": 0.1, "targets": "all linear", "method": method}
    for model in pair:
        with models.in_training(model, name, **fields) as training:
            found.append((training.losses().detach(), models.joined(training.gradients()), training.plan.trainables))
    (low, low_gradients, names), (plain, gradients, others) = found
    assert names.keys() == others.keys()
    assert any(key.startswith(chosen[0]) for key in names)
    assert torch.allclose(low, plain, rtol=1e-5)
    assert models.distance(low_gradients, gradients) <= 1e-5
