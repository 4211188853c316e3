"""Differences that depend on a layer's own weight, by the formulas of the adapters' makers.

Sources: LyCORIS 4.1 (lycoris/functional), sd-scripts (networks/oft.py), OneTrainer (modules/module/LoRAModule.py),
ai-toolkit (toolkit/models/DoRA.py), and peft itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ModelError
from ..formats.convert import host_places
from ..formats.keys import ALPHA, BIAS, DORA, IA3, ON_INPUT, is_text, misfit_of_layer, split
from ..formats.kohya import has_host_magnitudes
from ..formats.peft_config import starts_at_weight
from ..regex import Budget
from .difference import RELATIVE, Difference, Places, difference
from .foreign import kind_of

if TYPE_CHECKING:
    import torch

    from ..formats.peft_format import PeftAdapter

_ROTATION, _RESCALE, _GLORA, _SET = "oft_blocks", "rescale", "a1.weight", "set_weight"
_PLAIN = (DORA, BIAS)


@dataclass(frozen=True)
class Change:
    """The change that an adapter makes of a layer, as functions of the layer's float32 values.

    Attributes:
        weight: returns the difference of a weight [out, in, ...].
        bias: returns the difference of a bias [out]; None if the bias stays.
        factors: returns the difference as (up [out, r], down [r, in]); None if its rank is not low.
        misfit: returns the reason why a weight of a shape does not fit, empty if it does; None if it is not known.
    """

    weight: Callable[[torch.Tensor], torch.Tensor]
    bias: Callable[[torch.Tensor], torch.Tensor] | None = None
    factors: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    misfit: Callable[[tuple[int, ...]], str] | None = None


class Weights(Places, Protocol):
    """The values of a model's layers by their names in adapters."""

    def __call__(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Return a layer's weight and its bias (None without one), float32; None if the model has no such layer."""


def layer_names(adapter: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of an adapter's layers, also of one that only peft's form can hold."""
    native = getattr(adapter, "native", None) if not len(adapter) else None
    return list(split(adapter)[0] if native is None else host_places(native))


def relative_changes(adapter: Mapping[str, torch.Tensor]) -> dict[str, Change]:
    """Return the changes of the layers whose difference depends on their weight, by the layer's name."""
    return _changes(adapter, lambda name, held: bool(RELATIVE.keys() & held.keys()))


def own_changes(adapter: Mapping[str, torch.Tensor]) -> dict[str, Change]:
    """Return the changes of the layers to which ComfyUI applies another formula than the maker's, or none."""
    is_for_host = has_host_magnitudes(adapter)
    return _changes(adapter, lambda name, held: _differs(name, held, is_for_host))


def _changes(adapter: Mapping[str, torch.Tensor], is_meant: Callable[[str, dict], bool]) -> dict[str, Change]:
    native = getattr(adapter, "native", None) if not len(adapter) else None
    if native is not None:
        return _peft_changes(native)
    is_for_host = has_host_magnitudes(adapter)
    return {
        name: Change(functools.partial(changed_by, name, held, is_for_host=is_for_host))
        for name, held in split(adapter)[0].items()
        if is_meant(name, held)
    }


def _peft_changes(native: PeftAdapter) -> dict[str, Change]:
    # ComfyUI's start must not wait for the import of all adapter types.
    from . import peft_weight

    budget = Budget()
    layers = {id(part): peft_weight.layers_of(part, budget) for part in native.by_component().values()}
    changes = {}
    for name, (part, place) in host_places(native).items():
        layer = layers[id(part)][place]
        changes[name] = Change(
            functools.partial(peft_weight.peft_difference, layer),
            functools.partial(peft_weight.bias_change, layer) if peft_weight.changes_bias(layer) else None,
            functools.partial(peft_weight.start_factors, layer) if starts_at_weight(part.config) else None,
            functools.partial(peft_weight.misfit, layer),
        )
    return changes


def _differs(name: str, held: dict[str, torch.Tensor], is_for_host: bool) -> bool:
    if _ROTATION in held:
        is_limited = float(held.get(ALPHA, 0)) > 0 and not _is_of_host(name, is_for_host)
        return _RESCALE in held or held[_ROTATION].dim() == 4 or is_limited
    return ON_INPUT in held or "lokr_t2" in held or (DORA in held and not is_for_host)


def _is_of_host(name: str, is_for_host: bool) -> bool:
    """Report whether ComfyUI's own training wrote a layer: it names layers in the model's own way."""
    return is_for_host or name.startswith("diffusion_model.")


def differences(
    adapter: Mapping[str, torch.Tensor], input: str, weights: Weights | None = None
) -> dict[str, Difference]:
    """Return the difference of each layer of an adapter, by the layer's name.

    Args:
        weights: returns the layers' values in the model; None if no model is connected.

    Raises:
        ModelError: a difference depends on the model's weights and these are unknown, or a key is unknown.
    """
    relative = relative_changes(adapter) if weights is not None else {}
    if not adapter and not relative:
        native = getattr(adapter, "native", None)
        raise ModelError(
            "The adapter is empty." if native is None else f"{native.method} in peft's form needs the model's weights.",
            "Connect a trained adapter." if native is None else "Connect the model it was trained on as model.",
            input,
        )
    layers, others = split(adapter)
    if others:
        kind = kind_of(others)
        raise ModelError(
            f"The adapter has unknown keys, such as {others[0]} (number of such keys: {len(others)})"
            + (f": it is {kind.name}." if kind else "."),
            kind.cure
            if kind
            else "Use a file without them, or apply the adapters with Graft Apply Adapter and extract the difference "
            "with Graft Extract Adapter.",
            input,
        )
    by_layer = {}
    for name in layers or relative:
        held = layers.get(name, {})
        if name not in relative:
            by_layer[name] = difference(name, held, input)
            continue
        values, socket = weights(name), "clip" if is_text(name) else "model"
        why = "" if values is None else misfit_of_layer(held, tuple(values[0].shape))
        if why or values is None:
            raise ModelError(
                f"What is connected does not fit the adapter, which changes its layer {name[:200]} relative to its "
                f"weight: that layer {'is missing' if values is None else f'has {why}'}.",
                f"Connect the {socket} that the adapter was trained on.",
                socket,
            )
        by_layer[name] = _relative(relative[name], held, *values)
    return by_layer


def _relative(
    change: Change, held: dict[str, torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None
) -> Difference:
    added = held.get(BIAS)
    if change.bias is not None and bias is not None:
        added = change.bias(bias)
    added = None if added is None else added.float().to(weight.device)
    if change.factors is not None:
        return Difference(*change.factors(weight), bias=added)
    return Difference(whole=change.weight(weight), bias=added)


def changed_by(
    name: str, held: dict[str, torch.Tensor], weight: torch.Tensor, is_for_host: bool = False
) -> torch.Tensor:
    """Return the difference of a weight by the maker's formula.

    Args:
        held: tensors of the layer by kohya's key suffix.
        weight: [out, in, ...], float32 or float64.
        is_for_host: whether magnitudes of outputs and the limits of rotations are for ComfyUI's formulas: it divides by
            the norm of the weight without the difference, and limits the norm of rotations to alpha itself.
    """
    held = {end: tensor.to(weight) for end, tensor in held.items()}
    if _SET in held:
        return held[_SET] - weight
    if ON_INPUT in held:
        ends = (1, -1) if held[ON_INPUT] else (-1, 1)
        return weight * held[IA3].flatten().view(*ends, *[1] * (weight.dim() - 2))
    if _ROTATION in held:
        changed = _rotated(held, weight, 1 if _is_of_host(name, is_for_host) else len(weight))
    elif _GLORA in held:
        changed = _glora(held, weight)
    else:
        plain = {end: tensor for end, tensor in held.items() if end not in _PLAIN}
        changed = difference(name, plain, "adapter", weight.dtype).value().view(weight.shape)
    if DORA not in held:
        return changed
    return _decomposed(held[DORA], weight, changed, is_for_host) - weight


def _decomposed(
    magnitude: torch.Tensor, weight: torch.Tensor, changed: torch.Tensor, is_for_host: bool
) -> torch.Tensor:
    """Return m (W + D) / |W + D|, with the norms of rows or, if the magnitudes are [1, in, ...], of inputs."""
    import torch

    total = weight + changed
    by_output = magnitude.shape[0] == weight.shape[0]
    normed = weight if by_output and is_for_host else total
    axes = [axis for axis in range(weight.dim()) if axis != (0 if by_output else 1)]
    norm = normed.square().sum(axes, keepdim=True).sqrt() + torch.finfo(torch.float32).eps
    return total * (magnitude / norm)


def _rotated(held: dict[str, torch.Tensor], weight: torch.Tensor, unit: int) -> torch.Tensor:
    """Return the difference by OFT [blocks, b, b] or BOFT [steps, blocks, b, b], which rotate a layer's outputs.

    Args:
        unit: factor of the constraint in alpha, which limits the norm of the skew-symmetric matrices. LyCORIS' is the
            number of outputs.
    """
    import torch

    blocks = held[_ROTATION]
    skew = blocks - blocks.transpose(-1, -2)
    limit = float(held.get(ALPHA, 0)) * unit
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    identity = torch.eye(skew.shape[-1]).to(skew)
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    size, rest = rotation.shape[-1], weight.shape[1:]
    if blocks.dim() == 3:
        turned = torch.einsum("k n m, k n ... -> k m ...", rotation, weight.view(-1, size, *rest)).reshape(weight.shape)
    else:
        turned = weight
        for step, rotations in enumerate(rotation):
            distance = 2**step * (size // 2)
            turned = turned.unflatten(0, (-1, 2, distance)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            turned = torch.einsum("b i j, b j ... -> b i ...", rotations, turned).flatten(0, 1)
            turned = turned.unflatten(0, (-1, distance, 2)).transpose(1, 2).flatten(0, 2)
    if _RESCALE in held:
        turned = turned * held[_RESCALE].view(-1, *[1] * len(rest))
    return turned - weight


def _glora(held: dict[str, torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """Return W A + B of GLoRA, in the factors' present order or in that of LyCORIS 1."""
    import torch

    a1, a2, b1, b2 = (held[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    is_old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    is_new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if is_old and not (is_new and not (a2.shape[0] == weight.shape[0] == weight.shape[1])):
        flat = weight.flatten(1)
        return _scaled(held, (b2 @ b1 + flat @ a2 @ a1).view(weight.shape), a1.shape[0])
    by_input = torch.einsum("o i ..., i j -> o j ...", weight, a1 @ a2)
    return _scaled(held, by_input + (b1 @ b2).view(weight.shape), a2.shape[0])


def _scaled(held: dict[str, torch.Tensor], value: torch.Tensor, rank: int) -> torch.Tensor:
    return value * (float(held[ALPHA]) / rank) if ALPHA in held else value
