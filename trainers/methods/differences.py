"""Differences of norm layers and of biases, trained beside an adapter: `train_norm` and `train_bias`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..formats.keys import BIAS, WHOLE

if TYPE_CHECKING:
    import torch
    from torch import nn

# The weight of Flux's norms. The host finds it by its own name alone.
BARE = "scale"
# Names of the trainables by those of the frozen parameters. Each has its parameter's shape, and is zero at the start.
STEMS = {"weight": WHOLE, BARE: f"{WHOLE}_{BARE}", "bias": BIAS}
_STRENGTH = "difference_strength"


def list_norms(module: nn.Module, paths: Iterable[str]) -> list[str]:
    """List the norms whose parent or the parent's parent lies in a numbered block and holds one of the layers.

    LyCORIS trains the norms inside the modules that it targets, such as a transformer or a residual block.
    """
    holders = set()
    for path in paths:
        parts = path.split(".")
        first = next((place for place, part in enumerate(parts, 1) if part.isdigit()), len(parts))
        holders.update(".".join(parts[:end]) for end in range(first, len(parts)))
    norms = (path for path, layer in module.named_modules() if is_norm(layer))
    return [path for path in norms if not holders.isdisjoint((path.rsplit(".", 1)[0], path.rsplit(".", 2)[0]))]


def is_norm(layer: nn.Module) -> bool:
    """Report whether a module is a norm with a weight of its own."""
    return "Norm" in type(layer).__name__ and any(layer._parameters.get(name) is not None for name in ("weight", BARE))


def add(layer: nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    """Add the differences of frozen parameters, by their names, to a layer."""
    import torch
    from torch import nn

    for name, tensor in frozen.items():
        value = nn.Parameter(torch.zeros(tensor.shape, device=tensor.device))
        setattr(layer, STEMS[name], nn.ParameterDict({"default": value}))
    setattr(layer, _STRENGTH, 1.0)


def add_to_norm(path: str, layer: nn.Module) -> None:
    """Train the differences of a norm's parameters. Its forward computes with the sums, rounded as the host does.

    Raises:
        ModelError: the parameters have a form that cannot be added to.
    """
    import torch

    frozen = {name: layer._parameters[name] for name in STEMS if layer._parameters.get(name) is not None}
    for name, tensor in frozen.items():
        if type(tensor.data) is not torch.Tensor or not tensor.is_floating_point():
            raise ModelError(f"{path}.{name} is quantized.", "Leave train_norm out of adapter_args.", "model")
    add(layer, frozen)
    inner = layer.forward

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not getattr(layer, _STRENGTH):
            return inner(x, *args, **kwargs)
        own = {name: layer._parameters[name] for name in frozen}
        try:
            for name, weight in own.items():
                exact = weight if weight.element_size() > 4 else weight.float()
                # Eight bits would lose a small difference.
                dtype = weight.dtype if weight.element_size() > 1 else x.dtype
                layer._parameters[name] = (exact + _difference(layer, STEMS[name])).to(dtype)
            return inner(x, *args, **kwargs)
        finally:
            layer._parameters.update(own)

    layer.forward = forward


def with_bias(layer: nn.Module, inner: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    """Return a forward of peft's layer that adds the difference of the bias to the output of another forward."""
    ones = [1] * len(getattr(layer.get_base_layer(), "kernel_size", ()))

    def forward(x: torch.Tensor) -> torch.Tensor:
        out = inner(x)
        return out + _difference(layer, BIAS).view(-1, *ones).to(out.dtype)

    return forward


def _difference(layer: nn.Module, stem: str) -> torch.Tensor:
    return getattr(layer, stem)["default"] * getattr(layer, _STRENGTH)


@contextmanager
def scaled(module: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the differences in a module by a factor within the block. 0 turns those of norms off, bit for bit."""
    before = [(layer, getattr(layer, _STRENGTH)) for layer in module.modules() if hasattr(layer, _STRENGTH)]
    try:
        for layer, strength in before:
            setattr(layer, _STRENGTH, strength * factor)
        yield
    finally:
        for layer, strength in before:
            setattr(layer, _STRENGTH, strength)


def place_of(path: str, stems: Iterable[str]) -> str:
    """Return the path of a layer, or of the bare parameter that has a difference."""
    return f"{path}.{BARE}" if STEMS[BARE] in stems else path
