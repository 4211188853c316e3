"""What a layer of an adapter adds to its weight: two factors, or the whole of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..formats.keys import ALPHA, BIAS, DORA, DOWN, MID, UP, WHOLE, shape_of, split
from ..formats.kohya import lora_tensors
from . import svd

if TYPE_CHECKING:
    import torch

_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# What says how a weight is to be changed, and not by how much.
_RELATIVE = {
    DORA: "DoRA magnitudes (dora_scale)",
    "oft_blocks": "rotations (oft_blocks)",
    "a1.weight": "GLoRA factors",
    "set_weight": "whole weights (set_weight)",
    "reshape_weight": "a change of the layer's shape (reshape_weight)",
}


# Numbers of a difference that is multiplied out, 0.5 GB in float32 and several times that at work: all layers of the
# models there are have fewer, and a file of some kilobytes can ask for any number.
_MOST_NUMBERS = 2**27


def check_size(shape: Iterable[int], name: str = "", input: str = "adapter") -> None:
    """Refuse to multiply out a difference that no layer has.

    Raises:
        ModelError: naming the layer and the size.
    """
    shape = list(shape)
    numbers = math.prod(shape)
    if numbers > _MOST_NUMBERS:
        layer = f"layer {name[:200]}" if name else "layer"
        raise ModelError(
            f"The adapter's {layer} is {shape}: multiplied out it would take {numbers * 4 / 1e9:.1f} GB, and at most "
            f"{_MOST_NUMBERS * 4 / 1e9:.1f} GB are taken.",
            "Use an adapter whose layers have the size of a model's; weighted sum and SVD leave a LoRA in factors.",
            input,
        )


@dataclass(frozen=True)
class Difference:
    """What is added to a layer, float32.

    Attributes:
        up, down: [out, r] and [r, in, ...]; their product is the difference, the scale in it.
        whole: [out, in, ...], or [n] of a norm, in place of factors; None too where only the bias changes.
        bias: [out] or None.
        certain: whether the shape is the layer's own; else it is a matrix [out, all the rest].
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    certain: bool = True

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight's difference, None where there is none."""
        if self.up is not None:
            return (self.up.shape[0], *self.down.shape[1:])
        return None if self.whole is None else tuple(self.whole.shape)

    @property
    def rank(self) -> int | None:
        """Of the factors."""
        return None if self.up is None else self.up.shape[1]

    def to(self, device) -> Difference:
        """The same on a device."""
        parts = {name: getattr(self, name) for name in ("up", "down", "whole", "bias")}
        moved = {name: None if part is None else part.to(device) for name, part in parts.items()}
        return Difference(**moved, certain=self.certain)

    def value(self) -> torch.Tensor:
        """The whole of it, in `shape`."""
        if self.up is None:
            return self.whole
        check_size(self.shape)
        return (self.up @ self.down.flatten(1)).view(self.shape)


def differences(adapter: dict[str, torch.Tensor], input: str) -> dict[str, Difference]:
    """By layer's name, what an adapter adds.

    Args:
        input: of the node, for errors.

    Raises:
        ModelError: it cannot be told without the model's weights, or a key is not known.
    """
    if not adapter:
        raise ModelError(
            "The adapter is empty, or nothing without the model's weights.",
            "Connect one that was trained, or its kohya file.",
            input,
        )
    layers, others = split(adapter)
    if others:
        raise ModelError(
            f"It is not known what the adapter's {others[0]} means ({len(others)} such keys).",
            "Save the adapter as 'kohya', or take the file of another layout.",
            input,
        )
    return {name: difference(name, tensors, input) for name, tensors in layers.items()}


def difference(name: str, tensors: dict[str, torch.Tensor], input: str) -> Difference:
    """What one layer adds.

    Args:
        tensors: by what their keys end with, in kohya's words.

    Raises:
        ModelError: naming the layer.
    """
    for end, what in _RELATIVE.items():
        if end in tensors:
            raise ModelError(
                f"The layer {name} holds {what}, whose difference is not known without the model's weights.",
                "Put the adapters on the model with Graft Apply Adapter, one after the other, and take the difference "
                "with Graft Extract Adapter.",
                input,
            )
    held = {end: tensor.float() for end, tensor in tensors.items()}
    bias = held.get(BIAS)
    try:
        if UP in held:
            return Difference(*_factors(held), bias=bias)
        check_size(shape_of(held) or (), name, input)
        if _HADA[0] in held:
            return _hadamard(held, bias)
        if any(end.startswith("lokr_") for end in held):
            return _kronecker(held, bias)
        if not held.keys() <= {WHOLE, BIAS, ALPHA}:
            raise KeyError(UP)
    except (KeyError, RuntimeError) as error:
        raise ModelError(
            f"The adapter's layer {name} is not whole, or its parts do not fit each other.",
            "Take another copy of the file.",
            input,
        ) from error
    return Difference(whole=held.get(WHOLE), bias=bias)


def _factors(held) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = held[UP].flatten(1), held[DOWN]
    scale = float(held[ALPHA]) / down.shape[0] if ALPHA in held else 1.0
    if MID in held:
        import torch

        check_size((len(held[MID]), down[0].numel(), *held[MID].shape[2:]))
        down = torch.einsum("o m ..., m i -> o i ...", held[MID], down.flatten(1))
    if up.shape[1] != down.shape[0]:
        raise KeyError(UP)
    return up * scale, down


def _hadamard(held, bias) -> Difference:
    import torch

    a, b, c, d = (held[name] for name in _HADA)
    scale = float(held[ALPHA]) / b.shape[0] if ALPHA in held else 1.0
    if "hada_t1" in held:
        first, second = (
            torch.einsum("i j ..., j r, i p -> p r ...", held[core], right, left)
            for core, left, right in (("hada_t1", a, b), ("hada_t2", c, d))
        )
        return Difference(whole=first * second * scale, bias=bias)
    # A convolution's factors are flat.
    return Difference(whole=(a @ b) * (c @ d) * scale, bias=bias, certain=False)


def _kronecker(held, bias) -> Difference:
    import torch

    first, second, dim = held.get("lokr_w1"), held.get("lokr_w2"), None
    if first is None:
        dim = held["lokr_w1_b"].shape[0]
        first = held["lokr_w1_a"] @ held["lokr_w1_b"]
    if second is None:
        left, right = held["lokr_w2_a"], held["lokr_w2_b"]
        dim = right.shape[0]
        core = held.get("lokr_t2")
        second = left @ right if core is None else torch.einsum("i j ..., j r, i p -> p r ...", core, right, left)
    # Readers ignore alpha beside two whole factors.
    scale = float(held[ALPHA]) / dim if ALPHA in held and dim is not None else 1.0
    first = first.view(*first.shape, *[1] * (second.dim() - 2))
    return Difference(whole=torch.kron(first, second) * scale, bias=bias, certain=second.dim() > 2)


def limited(given: Difference, rank: int, energy: float, trim: bool = False) -> Difference:
    """The best of a rank or an energy, as factors; norms and biases as they are."""
    if given.shape is None or len(given.shape) < 2:
        return given
    if given.up is not None:
        up, down = svd.refactor(given.up, given.down.flatten(1), rank, energy, trim)
    else:
        up, down = svd.factor(given.whole.flatten(1), rank, energy, trim)
    return Difference(up, down.reshape(-1, *given.shape[1:]), bias=given.bias, certain=given.certain)


def file_tensors(given: Difference) -> dict[str, torch.Tensor]:
    """A layer's tensors in the host's file, by what follows its name."""
    if given.up is None and not given.certain:
        # As factors it fits a convolution too, whatever its kernel.
        given = limited(given, 0, 1.0, trim=True)
    found = {} if given.bias is None else {BIAS: given.bias}
    if given.up is not None:
        up = given.up.view(*given.up.shape, *[1] * (given.down.dim() - 2))
        return {**lora_tensors(given.down, up, given.rank), **found}
    return found if given.whole is None else {WHOLE: given.whole, **found}


def fitted(given: Difference, shape: tuple[int, ...]) -> Difference:
    """The same in another shape of as many numbers."""
    if given.shape == shape:
        return given
    if given.up is not None:
        return Difference(given.up, given.down.reshape(given.rank, *shape[1:]), bias=given.bias)
    return Difference(whole=given.whole.reshape(shape), bias=given.bias)


def alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether two shapes are one layer's: the same, or one of them flat."""
    return a == b or (a[0] == b[0] and math.prod(a) == math.prod(b) and 2 in (len(a), len(b)))
