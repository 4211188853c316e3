"""GGUF files and MODELs of tiny networks, with the layers of the ComfyUI-GGUF pack or with layers like them.

GRAFT_GGUF_PACK names the folder of the pack, whose loader reads the files. Without it, `like_the_pack` gives tensors
and layers with the same attributes, which dequantize by the gguf library.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from . import models, networks

VARIABLE = "GRAFT_GGUF_PACK"
# The types that the gguf library dequantizes: those that it quantizes too, and the others with the positions of a
# block's 16-bit scales.
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "TQ1_0", "TQ2_0", "MXFP4")
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_S": (0,),
    "IQ1_M": (54,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
TYPES = (*QUANTIZED, *SCALES)


def type_of(name):
    """Return the gguf library's type of that name."""
    import gguf

    return gguf.GGMLQuantizationType[name]


def packed(values, name):
    """Return the bytes of a weight, [rows, bytes] uint8; random ones for a type that the library cannot quantize."""
    import gguf

    if name in QUANTIZED:
        return gguf.quants.quantize(values.float().numpy(), type_of(name)).view(np.uint8)
    per_block, size = gguf.GGML_QUANT_SIZES[type_of(name)]
    rows, columns = values.shape
    blocks = np.random.default_rng(values.numel()).integers(0, 256, (rows, columns // per_block, size), dtype=np.uint8)
    for place in SCALES[name]:
        # Halves near 0.0005 or -0.0005, so that the values are about those of a network's weights.
        blocks[..., place + 1] = blocks[..., place + 1] & 0x83 | 0x10
    return blocks.reshape(rows, -1)


def tensors(weights, name, block=""):
    """Return (values, type) by key: the matrices of a block in a type if they fit, all other weights in 32 bits."""
    import gguf

    per_block, _ = gguf.GGML_QUANT_SIZES[type_of(name)]
    found = {}
    for key, value in weights.items():
        value = value.clone().float()
        is_packed = key.endswith(".weight") and value.dim() == 2 and value.shape[1] % per_block == 0
        is_packed &= block in key
        found[key] = (packed(value, name), type_of(name)) if is_packed else (value.numpy(), type_of("F32"))
    return found


def write(path, arch, weights):
    """Write a GGUF file of the result of `tensors`."""
    import gguf

    writer = gguf.GGUFWriter(str(path), arch)
    for key, (numbers, kind) in weights.items():
        writer.add_tensor(key, numbers, raw_dtype=kind if numbers.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def real_pack():
    """Return the pack's modules `loader`, `ops` and `nodes`; skip the test if none is named."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder of the ComfyUI-GGUF pack")
    name = "comfyui_gguf"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, Path(folder) / "__init__.py", submodule_search_locations=[folder]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return SimpleNamespace(**{part: sys.modules[f"{name}.{part}"] for part in ("loader", "ops", "nodes")})


def model_of(name, weights, operations):
    """Return the MODEL of a tiny family with weights as the pack reads them, in the pack's layers."""
    config = networks.SIZES[name].build()
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    model = config.get_model({}, "", device="cpu")
    model.load_model_weights(weights, "")
    return models.patched(model)


def loaded(name, path):
    """Return the MODEL that the pack makes of a file. Its own loader node would not detect most tiny networks."""
    pack = real_pack()
    return pack.nodes.GGUFModelPatcher.clone(model_of(name, pack.loader.gguf_sd_loader(str(path)), pack.ops.GGMLOps))


def alike(name, weights):
    """Return the MODEL of the result of `tensors` in layers like the pack's."""
    network = networks.SIZES[name].build().get_model({}, "", device="meta").diffusion_model
    return model_of(name, read(weights, network), like_the_pack().Operations)


def read(weights, network):
    """Return the result of `tensors` in tensors like the pack's, as its loader returns a file."""
    make, shapes = like_the_pack().Tensor, {key: value.shape for key, value in network.state_dict().items()}
    return {
        key: make(torch.from_numpy(numbers), tensor_type=kind, tensor_shape=shapes[key])
        for key, (numbers, kind) in weights.items()
    }


def plain(name, model):
    """Return the MODEL of the values that the layers of a GGUF MODEL compute with."""
    found = models.patcher(name)
    wide = dict(found.model.diffusion_model.named_parameters())
    with torch.no_grad():
        for path, layer in model.model.diffusion_model.named_modules():
            for key, value in layer.named_parameters(prefix=path, recurse=False):
                known = hasattr(layer, "get_weight")
                wide[key].copy_(layer.get_weight(value, torch.float32).view(wide[key].shape) if known else value)
    return found


@functools.cache
def like_the_pack():
    """Return `Tensor` and `Operations` with the attributes of the pack's GGMLTensor and GGMLOps."""
    import comfy.lora
    import comfy.ops
    import gguf

    class Tensor(torch.Tensor):
        def __new__(cls, data, **fields):
            return super().__new__(cls, data)

        def __init__(self, data, tensor_type, tensor_shape, patches=()):
            self.tensor_type, self.tensor_shape, self.patches = tensor_type, tensor_shape, list(patches)

        def to(self, *args, **kwargs):
            new = super().to(*args, **kwargs)
            # A part of such a tensor has no attributes.
            new.tensor_type, new.tensor_shape = getattr(self, "tensor_type", None), self.shape
            new.patches = list(getattr(self, "patches", ()))
            return new

        def clone(self, *args, **kwargs):
            return self

        def detach(self, *args, **kwargs):
            return self

        @property
        def shape(self):
            return self.tensor_shape if hasattr(self, "tensor_shape") else self.size()

    class Layer(torch.nn.Module):
        comfy_cast_weights = True

        def is_ggml_quantized(self):
            return any(getattr(one, "tensor_type", None) not in (None, 0, 1) for one in (self.weight, self.bias))

        def _load_from_state_dict(self, weights, prefix, *args):
            for name in ("weight", "bias"):
                if weights.get(prefix + name) is not None:
                    setattr(self, name, torch.nn.Parameter(weights[prefix + name], requires_grad=False))

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            for name, value in self.named_parameters(recurse=False):
                destination[prefix + name] = torch.zeros_like(value, device="meta")

        def get_weight(self, weight, dtype):
            values = weight.as_subclass(torch.Tensor)
            if weight.tensor_type > 1:
                values = torch.from_numpy(gguf.quants.dequantize(values.numpy(), weight.tensor_type))
            values = values.view(weight.tensor_shape).to(dtype)
            for patches, key in getattr(weight, "patches", ()):
                values = comfy.lora.calculate_weight(patches, values.clone(), key)
            return values

    class Operations(comfy.ops.manual_cast):
        class Linear(Layer, comfy.ops.manual_cast.Linear):
            def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
                torch.nn.Module.__init__(self)
                self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

            def forward_comfy_cast_weights(self, x):
                if not self.is_ggml_quantized():
                    return super().forward_comfy_cast_weights(x)
                bias = None if self.bias is None else self.get_weight(self.bias, x.dtype)
                return torch.nn.functional.linear(x, self.get_weight(self.weight, x.dtype), bias)

        class Conv2d(Layer, comfy.ops.manual_cast.Conv2d):
            pass

        class Embedding(Layer, comfy.ops.manual_cast.Embedding):
            pass

        class LayerNorm(Layer, comfy.ops.manual_cast.LayerNorm):
            pass

    return SimpleNamespace(Tensor=Tensor, Operations=Operations)
