"""Adapters of limited rank: extracted from two models, as the difference of each weight, or resized."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import ModelError, SettingsError
from ..formats.adapter import Adapter
from ..formats.keys import BIAS, WHOLE, split
from ..formats.kohya import to_kohya
from ..formats.metadata import derived
from ..text import join_first
from .difference import RELATIVE, Difference, common_rank, file_tensors, limited
from .relative import Weights, differences

if TYPE_CHECKING:
    import torch

LOW, FULL, NONE = "low-rank", "whole", "leave out"
CONV = (LOW, FULL, NONE)
REST = (FULL, NONE)
_LISTED = 5


@dataclass(frozen=True)
class Extraction:
    """Options of an extraction.

    Attributes:
        rank: maximum rank per layer, 0 for no limit.
        energy: fraction of the squared singular values that each layer keeps, in 0..1.
        conv: one of CONV, for convolutions with a kernel.
        rest: one of REST, for norms, biases and everything else that is not a matrix.
    """

    rank: int
    energy: float
    conv: str = LOW
    rest: str = FULL

    def __post_init__(self):
        check(self.energy)


@dataclass
class Tally:
    """Counts for the report. `total` and `held` are sums of squared norms of differences."""

    layers: int = 0
    unchanged: int = 0
    total: float = 0.0
    held: float = 0.0
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Weight:
    """A weight that both models have.

    Attributes:
        name: the layer's name in the file.
        end: WHOLE for the layer's weight, BIAS for its bias, empty if an adapter cannot hold it.
        change: tuned minus base, float32 on any device.
    """

    name: str
    end: str
    change: torch.Tensor


def extract(weights: Iterable[Weight], how: Extraction, metadata: list[dict[str, str]]) -> tuple[Adapter, str]:
    """Return (adapter, report) from an iterator of weights.

    Raises:
        ModelError: all weights are equal, or the options exclude everything that differs.
    """
    tally = Tally()
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for weight in weights:
        for end, tensor in _kept(weight, how, tally).items():
            layers.setdefault(weight.name, {})[end] = tensor.cpu()
    if not layers:
        _refuse(tally)
    tensors = to_kohya(layers, str)
    origin = {"tool": "extract", "rank": how.rank, "energy": how.energy, "conv": how.conv, "rest": how.rest}
    return Adapter(tensors, derived(origin, metadata, common_rank(tensors))), _report(tally, tensors)


def _refuse(tally: Tally) -> None:
    if not tally.left_out:
        raise ModelError(
            "The two models have the same weights: there is nothing to extract.",
            "Connect the trained model, or the model with the adapter, as model_tuned.",
            "model_tuned",
        )
    raise ModelError(
        f"The options leave out all differences, such as {tally.left_out[0]}.",
        "Set conv to 'low-rank' or norms_and_biases to 'whole'.",
        "norms_and_biases",
    )


def _kept(weight: Weight, how: Extraction, tally: Tally) -> dict[str, torch.Tensor]:
    change = weight.change
    square = float(change.double().square().sum())
    if square == 0:
        tally.unchanged += 1
        return {}
    if not math.isfinite(square):
        raise ModelError(
            f"The difference of {weight.name} is not finite.", "One of the models is damaged.", "model_tuned"
        )
    tally.total += square
    matrix = weight.end == WHOLE and change.dim() >= 2
    kernel = matrix and math.prod(change.shape[2:]) > 1
    wanted = how.conv if kernel else LOW if matrix else how.rest
    if wanted == NONE or not weight.end:
        tally.left_out.append(f"{weight.name}{' (bias)' if weight.end == BIAS else ''}")
        return {}
    tally.layers += 1
    if wanted == FULL:
        tally.held += square
        return {weight.end: change}
    low = _low(change, how)
    tally.held += square if low.up is None else square - float((change - low.value()).double().square().sum())
    return file_tensors(low)


def _low(change: torch.Tensor, how: Extraction) -> Difference:
    whole = Difference(whole=change)
    full = min(change.shape[0], change[0].numel())
    if how.energy == 1 and (how.rank == 0 or how.rank >= full):
        return whole
    low = limited(whole, how.rank, how.energy)
    return whole if low.rank * (change.shape[0] + change[0].numel()) >= change.numel() else low


def _report(tally: Tally, tensors: dict[str, torch.Tensor]) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    kept = tally.held / tally.total
    lines = [
        f"Weights that differ: {tally.layers + len(tally.left_out)}; the same in both: {tally.unchanged}",
        f"Kept: {kept:.4%} of the squared difference, {size / 1e6:.1f} MB",
    ]
    if tally.left_out:
        lines.append(f"Differences left out: {join_first(tally.left_out, _LISTED)}")
    return "\n".join(lines)


def resize(
    adapter: dict[str, torch.Tensor],
    rank: int,
    energy: float,
    device: str | torch.device = "cpu",
    tick: Callable[[int, int], None] = lambda done, total: None,
    weights: Weights | None = None,
) -> Adapter:
    """Turn every layer into a LoRA of limited rank. Layers that are small enough stay unchanged.

    Args:
        rank: maximum rank, 0 for no limit.
        energy: fraction of the squared singular values that each layer keeps, in 0..1 (kohya's sv_fro is its root).
        device: computes the singular values.
        tick: called with (layers done, layers in total).
        weights: returns the layers' values in the model; None if no model is connected.

    Raises:
        ModelError: a layer's difference depends on the model's weights, and no model is connected.
    """
    check(energy)
    given = differences(adapter, "adapter", weights)
    layers, _ = split(adapter)
    resized = {}
    for place, (name, change) in enumerate(given.items()):
        tick(place, len(given))
        if not _is_small(change, rank, energy):
            resized[name] = file_tensors(limited(change.to(device), rank, energy))
        elif name in layers and not RELATIVE.keys() & layers[name].keys():
            resized[name] = layers[name]
        else:
            resized[name] = file_tensors(change)
    tick(len(given), len(given))
    tensors = to_kohya(resized, str)
    ranks = {tensors[key].shape[0] for key in tensors if key.endswith(".lora_down.weight")}
    origin = {"tool": "resize", "rank": rank, "energy": energy}
    common = ranks.pop() if len(ranks) == 1 else None
    return Adapter(tensors, derived(origin, [getattr(adapter, "metadata", {})], common))


def check(energy: float) -> None:
    """Refuse an energy outside 0 < energy <= 1.

    Raises:
        SettingsError: naming the input.
    """
    if not 0 < energy <= 1:
        raise SettingsError(
            f"energy is {energy:g}; it is the fraction to keep, above 0 and at most 1.",
            "Set 1 to keep all that the rank allows, or 0.95.",
            "energy",
        )


def _is_small(given: Difference, rank: int, energy: float) -> bool:
    if given.shape is None or len(given.shape) < 2:
        return True
    fits = given.rank is not None and given.rank <= rank
    return energy == 1 and (rank == 0 or fits)
