"""The difference that an adapter in peft's form makes of a layer's weight, computed by peft's own layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..formats.peft_config import starts_at_weight
from ..formats.peft_format import PeftAdapter, place_of
from ..methods.oft import without_compile
from ..regex import Budget, PatternError, Patterns
from ..rng import generator

if TYPE_CHECKING:
    import torch
    from torch import nn

_LAYER = "layer"
# Settings of OFT that its formula depends on: their type and largest value.
_OFT = {
    "coft": (bool, 1),
    "eps": ((int, float), 1e9),
    "block_share": (bool, 1),
    "use_cayley_neumann": (bool, 1),
    "num_cayley_neumann_terms": (int, 100),
}
# Largest difference of random start values from the exact ones, relative to the adapter's own difference.
_MOST_DRIFT = 1e-3


@dataclass(frozen=True)
class PeftLayer:
    """A layer of an adapter in peft's form.

    Attributes:
        values: its tensors by peft's names, without `.weight`.
        is_by_input: whether its factors of IA3 are for inputs.
    """

    native: PeftAdapter
    place: str
    values: dict[str, torch.Tensor]
    is_by_input: bool


def layers_of(native: PeftAdapter, budget: Budget) -> dict[str, PeftLayer]:
    """Return the layers of an adapter by their paths.

    Args:
        budget: limit on the search for a pattern from the adapter's file.
    """
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in native.tensors.items():
        place = place_of(name)
        grouped.setdefault(place, {})[name[len(place) + 1 :].removesuffix(".weight")] = tensor
    by_input = _by_input(native, grouped, budget)
    return {place: PeftLayer(native, place, values, place in by_input) for place, values in grouped.items()}


def _by_input(native: PeftAdapter, grouped: dict[str, dict[str, torch.Tensor]], budget: Budget) -> set[str]:
    """Return the layers whose factors of IA3 are for inputs. Those of a matrix show it: [1, in], not [out, 1]."""
    factors = {place: values["ia3_l"] for place, values in grouped.items() if "ia3_l" in values}
    clear = {place for place, value in factors.items() if value.dim() == 2 and value.numel() > 1}
    by_input = {place for place in clear if factors[place].shape[0] == 1}
    names, others = native.config.get("feedforward_modules") or [], sorted(factors.keys() - clear)
    if others and isinstance(names, str):
        try:
            pattern = Patterns([names], whole=True, budget=budget)
            return by_input | {place for place in others if pattern.first(place) is not None}
        except PatternError as error:
            raise _unfit(others[0], f"its feedforward_modules {error.message}") from error
    ends = tuple(f".{name}" for name in names) if isinstance(names, list) else ()
    return by_input | {place for place in others if f".{place}".endswith(ends)}


def start_factors(layer: PeftLayer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (up, down) of the difference of a LoRA that starts at a part of the weight, as PiSSA and OLoRA do.

    peft subtracts the start values from the weight: W - s B0 A0 + s B A. The factors have twice the rank.

    Args:
        weight: [out, in] float32.
    """
    import torch

    with _outside_inference():
        init = layer.native.config["init_lora_weights"]
        starts = _start(layer, weight, init)
        a, b = (_tensor(layer, name, weight) for name in ("lora_A", "lora_B"))
        scale = layer.native.scales[layer.place]
        up, down = torch.cat([b, -starts[1]], dim=1) * scale, torch.cat([a, starts[0]])
        if "_niter_" in init:
            exact = _start(layer, weight, "pissa")
            drift = (starts[1] @ starts[0] - exact[1] @ exact[0]).norm() * scale
            if drift > _MOST_DRIFT * (up @ down).norm():
                raise _unfit(
                    layer.place,
                    f"peft drew its start values at random ({init}), and they cannot be computed again from the weight",
                )
        return up, down


def _start(layer: PeftLayer, weight: torch.Tensor, init: str) -> list[torch.Tensor]:
    """Return peft's start values (A0, B0) of a LoRA by a name of init_lora_weights."""
    config = {**layer.native.config, "init_lora_weights": init}
    wrapped = _injected(replace(layer, native=replace(layer.native, config=config)), weight)
    return [getattr(wrapped, name)["default"].weight.detach() for name in ("lora_A", "lora_B")]


@contextmanager
def _outside_inference() -> Iterator[None]:
    """Compute without gradients, but on ordinary tensors: peft's rotations refuse those of the inference mode."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        yield


def peft_difference(layer: PeftLayer, weight: torch.Tensor) -> torch.Tensor:
    """Return the difference [out, in, ...] of a DoRA, OFT, BOFT or IA3 layer.

    Args:
        weight: [out, in, ...] float32.

    Raises:
        ModelError: peft cannot compute it.
    """
    with _outside_inference():
        wrapped = _injected(layer, weight)
        for name, parameter in wrapped.named_parameters():
            stem, _, rest = name.partition(".default")
            if rest or name.endswith(".default"):
                value = _tensor(layer, stem, weight)
                if value.numel() != parameter.numel():
                    shapes = f"{list(value.shape)}, not {list(parameter.shape)}"
                    raise _unfit(layer.place, f"its {stem} has the shape {shapes}")
                parameter.data = value.clone().view(parameter.shape)
        wrapped.merge()
        return wrapped.get_base_layer().weight.detach() - weight


def bias_change(layer: PeftLayer, bias: torch.Tensor) -> torch.Tensor:
    """Return the difference [out] of a layer's bias: IA3 on outputs scales it, lora_bias adds to it."""
    if "ia3_l" in layer.values:
        return bias * (layer.values["ia3_l"].to(bias).flatten() - 1)
    return layer.values["lora_B.bias"].to(bias) * layer.native.scales[layer.place]


def changes_bias(layer: PeftLayer) -> bool:
    """Report whether a layer's tensors change its bias."""
    return "lora_B.bias" in layer.values or ("ia3_l" in layer.values and not layer.is_by_input)


def _tensor(layer: PeftLayer, stem: str, weight: torch.Tensor) -> torch.Tensor:
    if stem not in layer.values:
        raise _unfit(layer.place, f"it lacks {stem}")
    return layer.values[stem].to(weight)


def _injected(layer: PeftLayer, weight: torch.Tensor) -> nn.Module:
    import torch
    from peft import inject_adapter_in_model
    from torch import nn

    why = misfit(layer, tuple(weight.shape))
    if why:
        raise _unfit(layer.place, f"it has {why}")
    has_bias = "lora_B.bias" in layer.values
    outputs, inputs, *kernel = weight.shape
    holder = nn.Module()
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type != "cpu" else []):
        # peft's randomized SVD draws from torch's global generator.
        torch.manual_seed(generator("peft", 0, layer.place).initial_seed())
        if kernel:
            base = nn.Conv2d(inputs, outputs, kernel, bias=has_bias, device="meta")
        else:
            base = nn.Linear(inputs, outputs, bias=has_bias, device="meta")
        base.weight = nn.Parameter(weight.clone(), requires_grad=False)
        holder.add_module(_LAYER, base)
        with warnings.catch_warnings(), without_compile():
            warnings.simplefilter("ignore")
            try:
                inject_adapter_in_model(_config(layer), holder)
            except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
                raise _unfit(layer.place, f"peft reports: {error}") from error
    return holder.layer


def _config(layer: PeftLayer) -> Any:
    """Return peft's configuration of one layer. The file's own patterns are not used, because peft would run them."""
    import peft

    native, values, given = layer.native, layer.values, layer.native.config
    targets = {"target_modules": [_LAYER]}
    if native.method == "OFT":
        own = {name: given[name] for name in _OFT if name in given}
        odd = next((name for name, value in own.items() if not _is_usable(name, value)), None)
        if odd:
            raise _unfit(layer.place, f"its {odd} is {own[odd]!r:.40}")
        return peft.OFTConfig(r=0, oft_block_size=_block_size(values["oft_R"]), **own, **targets)
    if native.method == "BOFT":
        factor, _, size, _ = values["boft_R"].shape
        if factor > 1:
            raise _unfit(
                layer.place, f"it has {factor} butterfly factors, which peft computes only by a CUDA extension"
            )
        return peft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=1, **targets)
    if native.method == "IA3":
        by_input = [_LAYER] if layer.is_by_input else []
        return peft.IA3Config(feedforward_modules=by_input, **targets)
    rank = values["lora_A"].shape[0]
    alpha = native.scales[layer.place] * rank
    init = given.get("init_lora_weights", True) if starts_at_weight(given) else True
    return peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_dora=bool(given.get("use_dora")), init_lora_weights=init, **targets
    )


def _is_usable(name: str, value: Any) -> bool:
    kind, most = _OFT[name]
    return isinstance(value, kind) and 0 <= value <= most


def _unfit(place: str, why: str) -> ModelError:
    return ModelError(
        f"Graft cannot apply the adapter's layer {place[:200]}: {why}.", "Load it with peft itself.", "adapter"
    )


def misfit(layer: PeftLayer, shape: tuple[int, ...]) -> str:
    """Return the reason why a layer's tensors do not fit a weight of a shape [out, in, ...], empty if they do."""
    native, values = layer.native, layer.values
    outputs, inputs = shape[0], math.prod(shape[1:])
    weight = f"the layer {list(shape)}"
    if native.method == "OFT" and math.prod(shape[2:]) > 1:
        return f"OFT on a kernel, which peft merges with another effect than it trains, {weight}"
    if native.method == "OFT" and "oft_R" in values and values["oft_R"].dim() == 2:
        count, size = len(values["oft_R"]), _block_size(values["oft_R"])
        is_whole = inputs % size == 0 if native.config.get("block_share") else count * size == inputs
        return "" if is_whole else f"blocks for {count * size} inputs, {weight}"
    if native.method == "BOFT" and values.keys() >= {"boft_R", "boft_s"} and values["boft_R"].dim() == 4:
        _, count, size, _ = values["boft_R"].shape
        is_whole = count * size == inputs and values["boft_s"].numel() == outputs
        return "" if is_whole else f"blocks for {count * size} inputs, {weight}"
    if native.method == "IA3" and "ia3_l" in values:
        count = values["ia3_l"].numel()
        return "" if len(shape) > 1 and count in shape[:2] else f"{count} factors, {weight}"
    if values.keys() >= {"lora_A", "lora_B"} and values["lora_A"].dim() == len(shape):
        own = (values["lora_B"].shape[0], values["lora_A"][0].numel())
        return "" if own == (outputs, inputs) else f"the shape {list(own)}, {weight}"
    return f"tensors of another type ({', '.join(sorted(values))}), {weight}"


def _block_size(pairs: torch.Tensor) -> int:
    """Return the size b of OFT's blocks from their b (b - 1) / 2 numbers each."""
    return round((1 + math.sqrt(1 + 8 * pairs.shape[-1])) / 2)
