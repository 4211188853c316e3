"""Quantization of a base's linear weights: fp8 and int8 with a scale per row, nf4 with one per 64 numbers.

nf4 is the format of QLoRA (Dettmers et al. 2023), int8 that of LLM.int8() without outliers (Dettmers et al. 2022), both
as bitsandbytes computes them. Plain PyTorch gives a run the same base on every device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from ..lowrank.quantized import Dequantize, store_quantized
from ..recipe.options import FP8, INT8, NF4
from .autograd import blocks_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

# Quantiles of the normal distribution, from the paper's appendix E.
_QUANTILES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_BLOCK = 64
# Numbers to quantize at once: bounds the memory for them in fp32.
_AT_ONCE = 1 << 22
_FP8_DTYPE = torch.float8_e4m3fn


class _Format(NamedTuple):
    """A format of quantized weights.

    Attributes:
        largest: the number that a group's largest number becomes.
        block: numbers in a group, which has one scale; 0 for a row.
        encode: returns the codes of numbers up to `largest`, [groups, width] float32.
        decode: returns the numbers of codes, exact in a dtype or else in float32.
    """

    largest: float
    block: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, torch.dtype], Tensor]


def linears_of(tree: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers of a tree's blocks, which hold nearly all weights of a transformer."""
    layers = dict.fromkeys(layer for block in blocks_of(tree) for layer in block.modules())
    yield from (layer for layer in layers if isinstance(layer, nn.Linear))


def saved_by_nf4(block: nn.Module, frozen: Collection[int]) -> tuple[int, int]:
    """Return (bytes that nf4 saves in a block, bytes for its largest weight while a product has it dequantized).

    Args:
        frozen: ids of the weights that count.
    """
    saved = largest = 0
    for layer in block.modules():
        parts = [part for name, part in layer._parameters.items() if name != "bias" and id(part) in frozen]
        if parts and isinstance(layer, nn.Linear):
            # More than one part, or packed bytes, if the weight is quantized.
            count = layer.weight.numel()
            saved += sum(part.nbytes for part in parts) - -(-count // _BLOCK) * (_BLOCK // 2 + 4)
            # The numbers in float32, and beside them the codes as indices or the weight in 16 bits.
            largest = max(largest, 6 * count)
    return saved, largest


def quantize_linears(tree: nn.Module, name: str, device: torch.device) -> None:
    """Quantize the linear weights of a private tree's blocks, one layer after the other.

    Args:
        name: FP8, INT8 or NF4.
        device: device that computes. The quantized weights lie where the weights lay.
    """
    for layer in linears_of(tree):
        weight = layer.weight
        parts, dequantize = quantize(weight.detach(), name, device)
        # PyTorch does not compute in fp8.
        dtype = torch.float32 if weight.itemsize == 1 else weight.dtype
        store_quantized(layer, [part.to(weight.device) for part in parts], dequantize, dtype)


def quantize(weight: Tensor, name: str, device: torch.device) -> tuple[list[Tensor], Dequantize]:
    """Return the codes and the scales of a weight [out, in] on a device, and the function that dequantizes them."""
    form = _FORMATS[name]
    groups = weight
    if form.block:
        groups = weight.reshape(-1)
        if missing := -groups.numel() % form.block:
            groups = functional.pad(groups, (0, missing))
        groups = groups.view(-1, form.block)
    pieces = groups.split(max(1, _AT_ONCE // groups.shape[1]))
    coded = [_quantized(piece.to(device, torch.float32), form) for piece in pieces]
    parts = [torch.cat(part) for part in zip(*coded, strict=True)]
    return parts, functools.partial(_dequantized, form, weight.shape)


def _quantized(groups: Tensor, form: _Format) -> tuple[Tensor, Tensor]:
    """Return (codes, scales [groups, 1])."""
    scales = groups.abs().amax(1, keepdim=True) / form.largest
    return form.encode(groups / torch.where(scales > 0, scales, 1.0)), scales


def _dequantized(form: _Format, shape: torch.Size, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    codes, scales = parts
    # Computed in the scales' float32, and rounded once.
    return form.decode(codes, dtype).mul_(scales).to(dtype).view(-1)[: shape.numel()].view(shape)


def _encode_nf4(numbers: Tensor) -> Tensor:
    """Return two codes per byte, the first in the higher bits."""
    table = torch.tensor(_QUANTILES, device=numbers.device)
    codes = torch.bucketize(numbers, (table[1:] + table[:-1]) / 2, out_int32=True).to(torch.uint8)
    return codes[:, 0::2] << 4 | codes[:, 1::2]


def _decode_nf4(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.embedding(codes.int(), _pairs(codes.device)).view(-1, _BLOCK)


@functools.lru_cache(maxsize=8)
def _pairs(device: torch.device) -> Tensor:
    """Return the two numbers of each byte, [256, 2]."""
    with torch.inference_mode(False):
        table = torch.tensor(_QUANTILES)
        byte = torch.arange(256)
        return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).to(device)


def _encode_fp8(numbers: Tensor) -> Tensor:
    return numbers.to(_FP8_DTYPE)


def _decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype)


def _encode_int8(numbers: Tensor) -> Tensor:
    return numbers.round().to(torch.int8)


_FORMATS = {
    FP8: _Format(torch.finfo(_FP8_DTYPE).max, 0, _encode_fp8, _decode),
    INT8: _Format(127.0, 0, _encode_int8, _decode),
    NF4: _Format(1.0, _BLOCK, _encode_nf4, _decode_nf4),
}
