"""The difference that an adapter adds to a layer's weight, and the layer's names; low-rank approximation by SVD."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError
from ..formats.keys import ALPHA, BIAS, DORA, DOWN, MID, ON_INPUT, UP, WHOLE, layouts, shape_of
from ..formats.kohya import lora_tensors

if TYPE_CHECKING:
    import torch

# Singular values below this fraction of the largest are rounding errors.
_ROUNDING = 1e-6
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
# Tensors that change a weight relative to its value, so that the difference depends on the weight.
RELATIVE = {
    DORA: "DoRA magnitudes (dora_scale)",
    "oft_blocks": "rotations (oft_blocks)",
    ON_INPUT: "IA3 factors",
    "a1.weight": "GLoRA factors",
    "set_weight": "whole weights (set_weight)",
    "reshape_weight": "a change of the layer's shape (reshape_weight)",
}


# Upper bound of the numbers in a difference, 0.5 GB in float32 and several times that during the computation. All
# layers of known models are smaller, but a file of some kilobytes can ask for any size.
_MOST_NUMBERS = 2**27


def check_size(shape: Iterable[int], name: str = "", input: str = "adapter") -> None:
    """Refuse to multiply out a difference that is larger than any known layer.

    Raises:
        ModelError: it is too large.
    """
    shape = list(shape)
    numbers = math.prod(shape)
    if numbers > _MOST_NUMBERS:
        layer = f"layer {name[:200]}" if name else "layer"
        raise ModelError(
            f"The adapter's {layer} has the shape {shape}: its difference would take {numbers * 4 / 1e9:.1f} GB, more "
            f"than {_MOST_NUMBERS * 4 / 1e9:.1f} GB.",
            "Use an adapter with layers of a model's size; weighted sum and SVD keep the factors of a LoRA.",
            input,
        )


@dataclass(frozen=True)
class Difference:
    """A difference that is added to a layer, float32.

    Attributes:
        up, down: [out, r] and [r, in, ...]. Their product is the difference, scale included.
        whole: [out, in, ...], or [n] for a norm, instead of factors. Also None if only the bias changes.
        bias: [out] or None.
        certain: whether the shape is the layer's own. If False, it is a matrix [out, everything else].
    """

    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    whole: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    certain: bool = True

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Return the shape of the weight's difference, or None if there is none."""
        if self.up is not None:
            return (self.up.shape[0], *self.down.shape[1:])
        return None if self.whole is None else tuple(self.whole.shape)

    @property
    def rank(self) -> int | None:
        """Return the rank of the factors, or None if there are none."""
        return None if self.up is None else self.up.shape[1]

    def to(self, device) -> Difference:
        """Return a copy on a device."""
        parts = {name: getattr(self, name) for name in ("up", "down", "whole", "bias")}
        moved = {name: None if part is None else part.to(device) for name, part in parts.items()}
        return Difference(**moved, certain=self.certain)

    def value(self) -> torch.Tensor:
        """Return the full difference, in `shape`."""
        if self.up is None:
            return self.whole
        check_size(self.shape)
        return (self.up @ self.down.flatten(1)).view(self.shape)


def difference(name: str, tensors: dict[str, torch.Tensor], input: str, dtype: torch.dtype | None = None) -> Difference:
    """Return the difference of one layer.

    Args:
        tensors: by the end of their keys, in kohya's names.
        dtype: dtype of the computation, float32 by default.

    Raises:
        ModelError: the difference depends on the weight, or the tensors do not fit.
    """
    for end, what in RELATIVE.items():
        if end in tensors:
            raise ModelError(
                f"The layer {name} holds {what}: Graft cannot compute its difference without the model's weights.",
                "Connect the model that it was trained on as model. Or apply the adapters to it with Graft Apply "
                "Adapter, one after the other, and extract the difference with Graft Extract Adapter.",
                input,
            )
    import torch

    held = {end: tensor.to(dtype or torch.float32) for end, tensor in tensors.items()}
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
            f"The adapter's layer {name} is incomplete, or its tensors do not fit each other.",
            "Get another copy of the file.",
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
    a, b, c, d = (held[name] for name in _HADA)
    scale = float(held[ALPHA]) / b.shape[0] if ALPHA in held else 1.0
    if "hada_t1" in held:
        first, second = _tucker(held["hada_t1"], a, b), _tucker(held["hada_t2"], c, d)
        return Difference(whole=first * second * scale, bias=bias)
    # LoHa stores a convolution's factors as flat matrices.
    return Difference(whole=(a @ b) * (c @ d) * scale, bias=bias, certain=False)


def _tucker(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product [out, in, ...] of a core [i, j, ...], [i, out] and [j, in]."""
    import torch

    # The product is computed in two steps. The step between is bounded too.
    check_size((core.shape[0], right.shape[1], *core.shape[2:]))
    between = torch.einsum("i j ..., j r -> i r ...", core, right)
    return torch.einsum("i r ..., i p -> p r ...", between, left)


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
        second = left @ right if core is None else _tucker(core, left, right)
    # Readers ignore alpha beside two whole factors.
    scale = float(held[ALPHA]) / dim if ALPHA in held and dim is not None else 1.0
    first = first.view(*first.shape, *[1] * (second.dim() - 2))
    # kron cannot multiply by a transposed view, which the product with a core is.
    return Difference(whole=torch.kron(first, second.contiguous()) * scale, bias=bias, certain=second.dim() > 2)


def limited(given: Difference, rank: int, energy: float, trim: bool = False) -> Difference:
    """Return the best approximation within a rank and an energy, as factors. Norms and biases stay unchanged."""
    if given.shape is None or len(given.shape) < 2:
        return given
    if given.up is not None:
        up, down = refactor(given.up, given.down.flatten(1), rank, energy, trim)
    else:
        up, down = factor(given.whole.flatten(1), rank, energy, trim)
    return Difference(up, down.reshape(-1, *given.shape[1:]), bias=given.bias, certain=given.certain)


def file_tensors(given: Difference) -> dict[str, torch.Tensor]:
    """Return a layer's tensors in ComfyUI's file, by the part of the key after the layer's name."""
    if given.up is None and not given.certain:
        # Factors fit a convolution as well, whatever its kernel size.
        given = limited(given, 0, 1.0, trim=True)
    tensors = {} if given.bias is None else {BIAS: given.bias}
    if given.up is not None:
        up = given.up.view(*given.up.shape, *[1] * (given.down.dim() - 2))
        return {**lora_tensors(given.down, up, given.rank), **tensors}
    return tensors if given.whole is None else {WHOLE: given.whole, **tensors}


def common_rank(tensors: dict[str, torch.Tensor]) -> int | None:
    """Return the rank of all layers in kohya's file, None if ranks differ or a difference is not in factors."""
    ranks = {tensor.shape[0] for key, tensor in tensors.items() if key.endswith(f".{DOWN}")}
    is_whole = any(key.endswith((f".{WHOLE}", f".{BIAS}")) for key in tensors)
    return ranks.pop() if len(ranks) == 1 and not is_whole else None


def fitted(given: Difference, shape: tuple[int, ...]) -> Difference:
    """Return the difference in another shape with the same number of elements."""
    if given.shape == shape:
        return given
    if given.up is not None:
        return Difference(given.up, given.down.reshape(given.rank, *shape[1:]), bias=given.bias)
    return Difference(whole=given.whole.reshape(shape), bias=given.bias)


def alike(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return True if two shapes can belong to one layer: they are equal, or one of them is the flat form."""
    return a == b or (a[0] == b[0] and math.prod(a) == math.prod(b) and 2 in (len(a), len(b)))


def kept(values: torch.Tensor, rank: int, energy: float) -> int:
    """Return the number of singular values to keep, at least one.

    Args:
        values: [n], the largest first.
        rank: maximum number, 0 for all.
        energy: fraction of the sum of their squares to keep, in 0..1 (kohya's sv_fro is its root). 1 for all.
    """
    count = len(values)
    if energy < 1:
        squares = values.double().square().cumsum(0)
        count = int((squares < energy * squares[-1]).sum()) + 1
    return max(1, min(count, rank or count, len(values)))


def significant(values: torch.Tensor) -> int:
    """Return the number of singular values that exceed rounding errors, at least one."""
    return max(1, int((values > _ROUNDING * values[0]).sum()))


def factor(matrix: torch.Tensor, rank: int, energy: float, trim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors (up [out, k], down [k, in]) of a matrix [out, in] (Eckart and Young 1936).

    Both factors have the square roots of the singular values.

    Args:
        trim: whether to drop singular values that are only rounding errors too.
    """
    import torch

    u, s, v = torch.linalg.svd(matrix.float(), full_matrices=False)
    return _balanced(u, s, v, rank, energy, trim)


def refactor(
    up: torch.Tensor, down: torch.Tensor, rank: int, energy: float, trim: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for up @ down of [out, r] and [r, in], at the cost of the factors: no [out, in] is built."""
    import torch

    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return factor(up @ down, rank, energy, trim)
    # Double precision separates shared directions of two adapters from rounding errors.
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().t())
    u, s, v = torch.linalg.svd(upper @ lower.t())
    return _balanced(left @ u, s, v @ right.t(), rank, energy, trim)


def _balanced(u, s, v, rank: int, energy: float, trim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    count = kept(s, rank, energy)
    if trim:
        count = min(count, significant(s))
    root = s[:count].sqrt()
    return (u[:, :count] * root).float(), (root[:, None] * v[:count]).float()


@dataclass(frozen=True)
class WeightSlice:
    """The rows of a weight that a layer of an adapter changes.

    Attributes:
        key: of the weight in the model.
        rows: number of its rows.
        start: first row of the part, None for the whole weight.
        reorder: returns the difference in the weight's order of rows, None if it has that order.
    """

    key: str
    rows: int
    start: int | None
    reorder: Callable[[torch.Tensor], torch.Tensor] | None


class Places(Protocol):
    """The places of layers in a model, and the names that its weights have in adapters."""

    def place(self, name: str) -> WeightSlice | None:
        """Return the place of a layer by its name in an adapter, None if the model has none."""

    def names(self, key: str) -> list[str]:
        """Return the names of layers that are a whole weight."""


def on_one_naming(given: list[dict[str, Difference]], places: Places) -> list[dict[str, Difference]]:
    """Return the layers of adapters with the names of the first that changes whole weights only."""
    by_key = [_by_key(layers, places) for layers in given]
    whole = next((index for index, layers in enumerate(given) if _is_whole(layers, places)), 0)
    own = {place.key: name for name in given[whole] if (place := places.place(name)) is not None}
    sample = next(iter(own.values()), "")
    return [{_name(key, own, sample, places): layer for key, layer in layers.items()} for layers in by_key]


def _is_whole(layers: dict[str, Difference], places: Places) -> bool:
    slices = [places.place(name) for name in layers]
    return all(place is not None and place.start is None for place in slices)


def _name(key: str, own: dict[str, str], sample: str, places: Places) -> str:
    if key in own:
        return own[key]
    names = places.names(key) or [key]
    start, layout = sample[:5], layouts([sample])
    alike = (name for name in names if name.startswith(start) and layouts([name]) == layout)
    return next(alike, names[0])


def _by_key(layers: dict[str, Difference], places: Places) -> dict[str, Difference]:
    parts: dict[str, list[Difference]] = {}
    for name, layer in layers.items():
        place = places.place(name)
        parts.setdefault(name if place is None else place.key, []).append(
            layer if place is None else _in_whole(layer, place)
        )
    return {key: _summed(pieces) for key, pieces in parts.items()}


def _in_whole(layer: Difference, place: WeightSlice) -> Difference:
    def placed(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        if place.reorder is not None:
            tensor = place.reorder(tensor)
        if place.start is None:
            return tensor
        full = tensor.new_zeros(place.rows, *tensor.shape[1:])
        full[place.start : place.start + len(tensor)] = tensor
        return full

    return Difference(placed(layer.up), layer.down, placed(layer.whole), placed(layer.bias), layer.certain)


def _summed(layers: list[Difference]) -> Difference:
    import torch

    if len(layers) == 1:
        return layers[0]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    held = [layer for layer in layers if layer.shape is not None]
    if all(layer.up is not None for layer in held):
        up, down = torch.cat([layer.up for layer in held], 1), torch.cat([layer.down for layer in held])
        return Difference(up, down, bias=bias)
    return Difference(whole=torch.stack([layer.value() for layer in held]).sum(0), bias=bias)
