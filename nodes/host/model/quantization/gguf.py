"""Training through the layers of the ComfyUI-GGUF pack, whose weights are packed into blocks of a few bits.

This module never imports the pack. It knows the pack's tensors by their attributes `tensor_type` and `tensor_shape`,
and the pack's layers by their method `is_ggml_quantized`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import comfy.lora
import torch
from torch import nn

from .....trainers.errors import ModelError, needing
from .....trainers.lowrank.quantized import store_quantized

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

_PLAIN = ("None", "F32", "F16")
# Types that the pack's layers dequantize on the device. The gguf library dequantizes all others, on the CPU.
_ON_DEVICE = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
_ON_DEVICE |= {"BF16", "IQ4_NL", "IQ4_XS"}
_KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)


class _Packing(NamedTuple):
    """The form of a weight in the pack's tensor.

    Attributes:
        type: a member of the gguf library's GGMLQuantizationType, or None.
        shape: shape of the values.
        patches: (ComfyUI's patches, the weight's key), which the pack adds to the values at each use.
    """

    type: Any
    shape: tuple[int, ...]
    patches: tuple[tuple[list, str], ...]

    @property
    def type_name(self) -> str:
        return getattr(self.type, "name", str(self.type))

    @property
    def is_quantized(self) -> bool:
        """Report whether the stored numbers are not the values."""
        return self.type_name not in _PLAIN


def is_gguf(model: ModelPatcher) -> bool:
    """Report whether the pack loaded a MODEL, or a CLIP's patcher."""
    return any(hasattr(weight, "tensor_type") for weight in model.model.parameters())


def key_patches(model: ModelPatcher) -> dict[str, list]:
    """Return `model.get_key_patches()`. It fails on a GGUF model, whose state dict names a weight that there is not."""
    if not is_gguf(model):
        return model.get_key_patches()
    patches = {}
    for key, weight in model.model.named_parameters():
        kept = model.backup.get(key)
        patches[key] = [(weight if kept is None else kept.weight, _unchanged), *model.patches.get(key, ())]
    return patches


def _unchanged(weight: torch.Tensor, **options) -> torch.Tensor:
    return weight


def is_packed(weight: torch.Tensor) -> bool:
    """Report whether a tensor is one of the pack's whose numbers are not its values."""
    return hasattr(weight, "tensor_type") and _packing_of(weight).is_quantized


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """Return the values of one of the pack's tensors, without patches, float32; any other tensor unchanged."""
    if not is_packed(weight):
        return weight
    packing = _packing_of(weight)
    return _by_library(_bytes_of(weight), packing.type).view(packing.shape)


def as_plain_layers(tree: nn.Module, input: str = "model") -> None:
    """Turn the pack's layers in a private tree into layers whose parameters are plain tensors over the same memory.

    A quantized weight becomes the tensor of its bytes, so it moves between devices as it is. A quantized vector, such
    as a bias, is dequantized here: it has few numbers.

    Raises:
        ModelError: a weight is missing or damaged, or its type or layer is unknown.
        SettingsError: the package gguf is missing.
    """
    plain: dict[int, nn.Parameter] = {}
    for path, layer in list(tree.named_modules()):
        packings = {
            name: _packing_of(tensor) for name, tensor in layer._parameters.items() if hasattr(tensor, "tensor_type")
        }
        for name, packing in packings.items():
            weight = layer._parameters[name]
            if id(weight) not in plain:
                numbers = _plain(weight, packing, f"{path}.{name}", input)
                plain[id(weight)] = nn.Parameter(numbers, requires_grad=False)
            layer._parameters[name] = plain[id(weight)]
        if not hasattr(layer, "is_ggml_quantized"):
            continue
        for name in vars(layer).keys() & {"weight", "bias"}:
            # The pack sets None without registering a parameter, as torch's classes do.
            layer._parameters[name] = vars(layer).pop(name)
        packing = packings.get("weight")
        _check_shape(path, layer, packing, input)
        if packing is not None and packing.is_quantized and len(packing.shape) > 1:
            if not isinstance(layer, _KINDS):
                raise _damaged(f"{path}.weight", f"a {type(layer).__name__} cannot be quantized", input)
            store_quantized(
                layer,
                [layer.weight],
                functools.partial(_values, type(layer), packing),
                torch.float32,
                torch.Size(packing.shape),
                functools.partial(_rows, type(layer), packing),
            )
        else:
            # ComfyUI's class, which the pack's class extends: training computes it in fewer operations.
            layer.__class__ = next(kind for kind in type(layer).__mro__ if kind.__module__ == "comfy.ops")


def _packing_of(weight: torch.Tensor) -> _Packing:
    return _Packing(weight.tensor_type, tuple(weight.tensor_shape), tuple(getattr(weight, "patches", ())))


def _bytes_of(weight: torch.Tensor) -> torch.Tensor:
    """Return a plain tensor over the same memory: an inference tensor could not be saved for the backward."""
    flat = weight.as_subclass(torch.Tensor)
    with torch.inference_mode(False):
        whole = torch.empty(0, dtype=flat.dtype, device=flat.device)
        return whole.set_(flat.untyped_storage(), flat.storage_offset(), flat.shape, flat.stride())


def _plain(weight: torch.Tensor, packing: _Packing, name: str, input: str) -> torch.Tensor:
    numbers = _bytes_of(weight)
    if not packing.is_quantized:
        return numbers
    _check_type(packing, name, input)
    import gguf

    values_per_block, block_size = gguf.GGML_QUANT_SIZES[packing.type]
    expected = prod(packing.shape) // values_per_block * block_size
    if numbers.nbytes != expected or prod(packing.shape) % values_per_block:
        raise _damaged(name, f"it has {numbers.nbytes} bytes instead of {expected}", input)
    return numbers if len(packing.shape) > 1 else _by_library(numbers, packing.type).view(packing.shape)


def _check_type(packing: _Packing, name: str, input: str) -> None:
    import numpy as np

    with needing("gguf", "Training a GGUF model", "or load another file of the model", input):
        import gguf
    try:
        _, block_size = gguf.GGML_QUANT_SIZES[packing.type]
        gguf.quants.dequantize(np.zeros((1, block_size), np.uint8), packing.type)
    except (KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{name} has the GGUF type {packing.type_name}, which the package gguf cannot dequantize ({error}).",
            "Update that package, or load a file of another type, such as Q8_0 or Q4_K.",
            input,
        ) from error


def _check_shape(path: str, layer: nn.Module, packing: _Packing | None, input: str) -> None:
    if isinstance(layer, nn.Linear):
        wanted = (layer.out_features, layer.in_features)
    elif isinstance(layer, nn.Conv2d):
        wanted = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    else:
        return
    weight = layer.weight
    # The pack puts zeros in the place of a missing weight.
    if weight is None or packing is None and not weight.any():
        raise _damaged(f"{path}.weight", "the file lacks it", input)
    shape = tuple(weight.shape) if packing is None else packing.shape
    if shape != wanted:
        raise _damaged(f"{path}.weight", f"it has the shape {list(shape)} instead of {list(wanted)}", input)


def _damaged(name: str, how: str, input: str) -> ModelError:
    return ModelError(
        f"{name} of the GGUF model cannot be read: {how}.",
        "Download the file again, or load another file of the model.",
        input,
    )


def _by_library(stored: torch.Tensor, type: Any) -> torch.Tensor:
    import gguf

    rows = stored.detach().cpu().view(torch.uint8)
    _, block_size = gguf.GGML_QUANT_SIZES[type]
    values = gguf.quants.dequantize(rows.reshape(-1, block_size).numpy(), type)
    return torch.from_numpy(values).to(stored.device)


def _values(kind: type, packing: _Packing, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Return a weight's values from its bytes, patches included; `kind` is the pack's class of the layer."""
    (stored,) = parts
    if packing.type_name in _ON_DEVICE and hasattr(kind, "get_weight"):
        # The pack's own values, which draw the pictures: it computes them in 16 bits.
        stored.tensor_type, stored.tensor_shape = packing.type, torch.Size(packing.shape)
        # The pack keeps the settings that the method reads on the class.
        values = kind.get_weight(kind, stored, dtype)
    else:
        values = _by_library(stored, packing.type).to(dtype)
    values = values.view(packing.shape)
    for patches, key in packing.patches:
        values = comfy.lora.calculate_weight(patches, values, key)
    return values


def _rows(
    kind: type, packing: _Packing, parts: Sequence[torch.Tensor], rows: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return rows of a weight as `_values` does, without dequantizing the others if it has no patches."""
    import gguf

    count, *width = packing.shape
    if packing.patches or prod(width) % gguf.GGML_QUANT_SIZES[packing.type][0]:
        return _values(kind, packing, parts, dtype)[rows]
    stored = parts[0].reshape(count, -1)[rows]
    return _values(kind, packing._replace(shape=(len(rows), *width)), [stored], dtype)
