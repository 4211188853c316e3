"""Merging of two adapters by a weighted sum of their differences or by one of peft's methods; average of a run's saves.

The average weights saves by step with the power-function profile of post-hoc EMA (Karras et al. 2023).
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError, RunError, SettingsError
from ..formats.adapter import Adapter, load_adapter
from ..formats.keys import common_name, layer_keys, layouts
from ..formats.kohya import kohya_form, to_kohya
from ..formats.metadata import ARCHITECTURE, IDENTITY, MADE, VALIDATION_LOSS, derived
from ..rng import stream_seed
from ..runs.folders import Folders
from ..runs.run import Run
from ..runs.saves import list_saves
from ..text import is_below
from .difference import Difference, alike, check_size, common_rank, file_tensors, fitted, limited, on_one_naming
from .relative import Weights, differences

if TYPE_CHECKING:
    import torch

SUM, SVD = "weighted sum", "SVD"
TIES, DARE, DARE_TIES, PRUNE = "TIES", "DARE", "DARE + TIES", "magnitude prune"
METHODS = (SUM, SVD, TIES, DARE, DARE_TIES, PRUNE)
AVERAGE = "average of saves"
# Standard deviation of the steps of a uniform average, in parts of the last step.
WIDEST = 1 / math.sqrt(12)
WIDTH = 0.1
_INPUTS = ("adapter_a", "adapter_b")


@dataclass(frozen=True)
class Merging:
    """Options of a merge.

    Attributes:
        method: one of METHODS.
        rank: maximum rank of the result, 0 for the rank that loses nothing.
        density: fraction of the numbers that TIES, DARE and pruning keep, in 0..1.
        seed: for the numbers that DARE drops.
    """

    weights: tuple[float, float]
    method: str = SUM
    rank: int = 0
    density: float = 0.5
    seed: int = 0

    def __post_init__(self):
        if self.weights == (0.0, 0.0):
            raise SettingsError("Both weights are 0: nothing is left.", "Set weight_a or weight_b.", "weight_a")
        if self.method not in (SUM, SVD) and not 0 < self.density <= 1:
            raise SettingsError(
                f"density is {self.density:g}; it is the fraction to keep, above 0 and at most 1.",
                "Set 0.5, or 1 to keep all.",
                "density",
            )


def merge(
    a: dict[str, torch.Tensor],
    b: dict[str, torch.Tensor],
    how: Merging,
    device: str | torch.device = "cpu",
    tick: Callable[[int, int], None] = lambda done, total: None,
    weights: Weights | None = None,
) -> Adapter:
    """Merge two adapters. A layer that only one of them has comes from that one.

    Two LoRAs are added exactly by concatenating their factors. Everything else becomes full differences first, and is
    written in that form unless `rank` asks for factors.

    Args:
        device: computes the singular values.
        tick: called with (layers done, layers in total).
        weights: returns the layers' values in the model; None if no model is connected.

    Raises:
        ModelError: a layer's difference depends on the model's weights and no model is connected, or the adapters are
            for different models.
    """
    sources = [getattr(adapter, "metadata", {}) for adapter in (a, b)]
    _check_families(sources)
    if weights is None and _schemes_of([layer_keys(adapter)[0] for adapter in (a, b)]) is not None:
        a, b = _in_kohyas_names(a, b)
    given = [differences(adapter, input, weights) for adapter, input in zip((a, b), _INPUTS, strict=True)]
    if weights is not None and _schemes_of(given) is not None:
        given = on_one_naming(given, weights)
    _check_related(given)
    names = _names(given)
    merged_layers = {}
    for place, (common, held) in enumerate(names.items()):
        tick(place, len(names))
        parts = [(given[index][name].to(device), how.weights[index]) for index, name in held.items()]
        name = next(iter(held.values()))
        merged = _merged(name, parts, how, stream_seed("merge", how.seed, *common))
        if merged.shape is not None or merged.bias is not None:
            merged_layers[name] = merged
    tick(len(names), len(names))
    tensors = to_kohya({name: file_tensors(layer) for name, layer in merged_layers.items()}, str)
    origin = {"tool": "merge", "method": how.method, "weights": list(how.weights), "rank": how.rank}
    if how.method not in (SUM, SVD):
        origin.update(density=how.density, seed=how.seed)
    return Adapter(tensors, derived(origin, sources, common_rank(tensors)))


def _names(given: list[dict[str, Difference]]) -> dict[tuple[str, str], dict[int, str]]:
    """Return each layer's name in the adapters that have it, by its common name and the adapter's position."""
    names: dict[tuple[str, str], dict[int, str]] = {}
    for index, layers in enumerate(given):
        for name in layers:
            names.setdefault(common_name(name), {})[index] = name
    return names


def _check_families(sources: list[dict[str, str]]) -> None:
    kinds = [source.get(ARCHITECTURE, "").partition("/")[0] for source in sources]
    if all(kinds) and kinds[0] != kinds[1]:
        raise ModelError(
            f"adapter_a was made for {kinds[0]}, adapter_b for {kinds[1]}.",
            "Merge adapters of the same model family.",
            "adapter_b",
        )


def _schemes_of(given: Sequence[Collection[str]]) -> list[set[str]] | None:
    schemes = [layouts(layers) for layers in given]
    return schemes if all(schemes) and not schemes[0] & schemes[1] else None


def _in_kohyas_names(*adapters: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    renamed = [kohya_form(adapter, getattr(adapter, "metadata", {})) for adapter in adapters]
    schemes = set().union(*(layouts(layer_keys(tensors)[0]) for tensors in renamed))
    if len(schemes) > 1:
        return list(adapters)
    return [
        Adapter(tensors, getattr(adapter, "metadata", {})) for tensors, adapter in zip(renamed, adapters, strict=True)
    ]


def _check_related(given: list[dict[str, Difference]]) -> None:
    schemes = _schemes_of(given)
    if schemes is not None:
        raise ModelError(
            f"The adapters name their layers in different ways (adapter_a as {_listed(schemes[0])}, adapter_b as "
            f"{_listed(schemes[1])}): they are for different models, or Graft cannot match their layers.",
            "If both fit one model, connect it as model. Or apply them to it with Graft Apply Adapter, one after the "
            "other, and extract the difference with Graft Extract Adapter.",
            "adapter_b",
        )


def _listed(schemes: set[str]) -> str:
    return " and ".join(sorted(schemes))


def _merged(name: str, parts: list[tuple[Difference, float]], how: Merging, seed: int) -> Difference:
    parts = _of_one_shape(name, parts)
    bias = _mixed([(part.bias, weight) for part, weight in parts if part.bias is not None], how, seed)
    parts = [(part, weight) for part, weight in parts if part.shape is not None]
    if how.method in (SUM, SVD):
        parts = [(part, weight) for part, weight in parts if weight != 0]
    if not parts:
        return Difference(bias=bias)
    certain = any(part.certain for part, _ in parts)
    if how.method in (SUM, SVD) and all(part.up is not None for part, _ in parts):
        import torch

        up = torch.cat([part.up * weight for part, weight in parts], dim=1)
        result = Difference(up, torch.cat([part.down for part, _ in parts]), bias=bias, certain=certain)
    else:
        for part, _ in parts:
            check_size(part.shape, name, _INPUTS[0])
        whole = _mixed([(part.value(), weight) for part, weight in parts], how, seed)
        result = Difference(whole=whole, bias=bias, certain=certain)
    if how.method == SVD or how.rank:
        return limited(result, how.rank, 1.0, trim=how.method == SVD)
    return result


def _of_one_shape(name: str, parts: list[tuple[Difference, float]]) -> list[tuple[Difference, float]]:
    shapes = [part.shape for part, _ in parts if part.shape is not None]
    biases = [tuple(part.bias.shape) for part, _ in parts if part.bias is not None]
    for pair in (shapes, biases):
        if len(pair) == 2 and not alike(*pair):
            raise ModelError(
                f"The adapters are for different models: the layer {name} has the shape {list(pair[0])} in adapter_a "
                f"and {list(pair[1])} in adapter_b.",
                "Merge adapters of the same model.",
                "adapter_b",
            )
    # A flat difference takes the shape of the other.
    shape = max((part.shape for part, _ in parts if part.shape is not None and part.certain), key=len, default=None)
    if shape is None:
        return parts
    return [(part if part.shape is None else fitted(part, shape), weight) for part, weight in parts]


def _mixed(parts: list[tuple[torch.Tensor, float]], how: Merging, seed: int) -> torch.Tensor | None:
    """Merge tensors of one shape. Draws and choices run on the CPU, so that every machine gives the same result."""
    if not parts:
        return None
    import torch
    from peft.utils import merge_utils

    # peft elects signs before it multiplies by the weights, so a negative weight would vote for the wrong sign.
    tensors = [-tensor.cpu() if weight < 0 else tensor.cpu() for tensor, weight in parts]
    weights = torch.tensor([abs(weight) for _, weight in parts])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft warns that a density of 1 drops nothing.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        if how.method == TIES:
            mixed = merge_utils.ties(tensors, weights, how.density)
        elif how.method == DARE:
            mixed = merge_utils.dare_linear(tensors, weights, how.density)
        elif how.method == DARE_TIES:
            mixed = merge_utils.dare_ties(tensors, weights, how.density)
        elif how.method == PRUNE:
            mixed = merge_utils.magnitude_prune(tensors, weights, how.density)
        else:
            mixed = merge_utils.task_arithmetic(tensors, weights)
    return mixed.to(parts[0][0].device)


def exponent_of(width: float) -> float:
    """Return the exponent gamma of the profile t^gamma with a standard deviation of `width` times the last step.

    Args:
        width: above 0 and below WIDEST, where gamma is 0.
    """
    import numpy as np

    # width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma.
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def weights_of(steps: Sequence[int], width: float) -> list[float]:
    """Return the weights of two or more saves at steps, rising; their sum is 1. Saves close together share a weight."""
    exponent = exponent_of(width)
    # A save stands for the steps since the save before; saves before the first are not kept.
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    spans = [gaps[0], *gaps]
    powers = [span * (step / steps[-1]) ** exponent for step, span in zip(steps, spans, strict=True)]
    return [power / sum(powers) for power in powers]


def average_saves(folders: Folders, run: Run, last: int, width: float) -> Adapter:
    """Average the tensors of a run's kept adapters up to the step `last`, one file after another.

    Raises:
        RunError: the run has kept fewer than two of them, or a file is damaged or has other tensors than the last.
    """
    files = {
        step: path
        for step, paths in list_saves(folders, run).items()
        for path in paths
        if step <= last and not is_below(path, run.embeddings) and not is_below(path, folders.embeddings)
    }
    if len(files) < 2:
        raise RunError(
            f"The run {run.name} has kept {len(files)} saves up to step {last}: there is nothing to average.",
            "Train with a larger keep_last in Graft Run Options, such as 10.",
            "adapter_a",
        )
    steps = list(files)
    adapter = load_adapter(files[steps[-1]])
    averages = {name: tensor.float() for name, tensor in adapter.items()}
    for step, weight in zip(steps[:-1], weights_of(steps, width), strict=False):
        save = load_adapter(files[step])
        if {name: tensor.shape for name, tensor in save.items()} != {name: t.shape for name, t in averages.items()}:
            raise RunError(
                f"The save of step {step} of the run {run.name} has other layers than that of step {steps[-1]}.",
                "Remove it from the run's folder.",
                "adapter_a",
            )
        for name, tensor in save.items():
            # As a difference, which leaves equal values such as alpha as they are.
            averages[name] = averages[name] + weight * (tensor.float() - adapter[name].float())
    tensors = {name: average.to(adapter[name].dtype) for name, average in averages.items()}
    own = (IDENTITY, VALIDATION_LOSS, "modelspec.thumbnail")
    metadata = {name: value for name, value in adapter.metadata.items() if name not in own}
    metadata[MADE] = json.dumps({"tool": AVERAGE, "steps": steps, "width": width}, sort_keys=True)
    return Adapter(tensors, metadata, None, adapter.bundled)
