"""Whether the gradient that training would use is right: a directional derivative against finite differences."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .errors import ModelError
from .objective.noise import generator

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# Exact gradients miss the difference by 1e-4 at most in fp32 on a CPU; wrong ones on a tiny Flux were 0.3 % to
# 1.8 % off, which 5 % let pass. Half precision rounds the difference itself.
TOLERANCE = 5e-3
TOLERANCE_HALF = 0.05

# What PyTorch says where it has no gradient, and not for lack of memory or for shapes that do not fit.
_NO_GRADIENT = (
    "inplace operation",
    "no autograd formula",
    "support automatic differentiation",
    "does not require grad",
)


def directional_error(
    loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], step: float = 1e-2, seed: int = 0
) -> tuple[float, float]:
    """Compares autograd with a Richardson-refined central difference along one direction.

    The direction is half random, half the gradient's own: a random one alone has next to no slope among many
    parameters, and the difference would drown in the rounding of the loss.

    Args:
        loss: gives the scalar loss; called once with and four times without gradients.
        parameters: those that are varied, at the point of interest.
        step: length of the longest difference; the refinement uses half of it too.

    Returns:
        (relative error, finite difference).
    """
    source = generator("direction", seed)
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    noise = [torch.randn(p.shape, generator=source, dtype=torch.float32).to(p) for p in parameters]
    directions = [a + b for a, b in zip(_unit(noise), _unit(gradients), strict=True)]
    directions = _unit(directions)
    exact = sum(float((_exact(g) * _exact(d)).sum()) for g, d in zip(gradients, directions, strict=True))
    coarse = _central(loss, parameters, directions, step)
    fine = _central(loss, parameters, directions, step / 2)
    reference = (4 * fine - coarse) / 3
    return abs(exact - reference) / max(abs(reference), 1e-12), reference


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU since not every device has it."""
    return tensor.detach().to("cpu").double()


def _unit(tensors: list) -> list:
    length = sum(float((_exact(tensor) ** 2).sum()) for tensor in tensors) ** 0.5
    return [tensor / max(length, 1e-30) for tensor in tensors]


def _central(loss: Callable, parameters: list, directions: list, step: float) -> float:
    values = []
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for sign in (1.0, -1.0):
            for parameter, value, direction in zip(parameters, kept, directions, strict=True):
                parameter.copy_(value + sign * step * direction)
            values.append(float(_exact(loss())))
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)
    return (values[0] - values[1]) / (2 * step)


def check_gradient(
    loss: Callable[[], torch.Tensor], trainables: dict[str, nn.Parameter], tolerance: float = TOLERANCE
) -> float:
    """The self-check before step 1, at a small non-zero adapter; puts the trainables back.

    Returns:
        The relative error.

    Raises:
        ModelError: it is above the tolerance.
    """
    parameters = list(trainables.values())
    kept = [parameter.detach().clone() for parameter in parameters]
    source = generator("check", 0)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter) * 0.02)
        error, reference = directional_error(loss, parameters, step=0.1)
    except RuntimeError as broken:
        if any(part in str(broken) for part in _NO_GRADIENT):
            raise ModelError(
                "No gradient can be had through this model: it changes what it has computed before it is needed again, "
                f"or runs an operation without a backward ({str(broken).splitlines()[0]}).",
                "It cannot be trained yet. Please report the model's name.",
                "model",
            ) from broken
        raise
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    log.info("Graft: gradient check, relative error %.2e at derivative %.3e", error, reference)
    if not error <= tolerance:
        raise ModelError(
            f"The gradient through this model is wrong: {error:.1%} off the finite difference.",
            "Training it would not learn what the pictures show. Please report the model's name.",
            "model",
        )
    return error
