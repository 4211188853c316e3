"""Gradient check: autograd's directional derivatives against finite differences."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from ..rng import generator

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

# A larger relative error of the derivative stops the run.
BAR = 0.05
# Correct gradients differ from the finite difference by at most 1.2e-4 in fp32 on a CPU. BAR itself is too loose: an
# error perpendicular to the gradient, 5 % of its length, changes the derivative along it by only 5 % of 5 %.
TOLERANCE = BAR**2
# Half-precision trainables round the finite difference itself.
TOLERANCE_HALF = 0.8 * BAR
# Largest relative difference between the losses with and without autograd recording. A larger one means that an
# in-place operation had no effect.
TOLERANCE_RECORDED = 1e-3
_STEP = 0.1
_SHORTER = (_STEP / 8, _STEP / 40)
_LONGEST = 64 * _STEP
_ROUNDING = 16 * torch.finfo(torch.float32).eps
# Try longer steps first if rounding may exceed this share of the derivative.
_EXCUSED = 0.15 * BAR
# Skip a shorter step if rounding may exceed this share of the derivative. The bound is about ten times the rounding
# that is observed.
_DROWNED = 0.5

# Parts of PyTorch's messages for a missing gradient, to tell it from lack of memory or a shape mismatch.
_NO_GRADIENT = (
    "inplace operation",
    "no autograd formula",
    "support automatic differentiation",
    "does not require grad",
)
# A trainable's block: its path up to the first number.
_BLOCK = re.compile(r"^.*?\.\d+(?=\.)")


def gradients_of(loss: torch.Tensor, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """Return autograd's gradients, zeros for parameters that the loss does not use."""
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]


def slope_of(parameters: list[nn.Parameter], gradients: list[torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    """Return autograd's derivative along a direction of length one, and the direction.

    The direction is half random, half the gradient's. Among many parameters, a purely random direction has almost no
    slope, and the difference would vanish in the loss's rounding.
    """
    source = generator("direction", 0)
    noise = [torch.randn(p.shape, generator=source, dtype=torch.float32).to(p) for p in parameters]
    directions = _unit([a + b for a, b in zip(_unit(noise), _unit(gradients), strict=True)])
    return sum(float((_exact(g) * _exact(d)).sum()) for g, d in zip(gradients, directions, strict=True)), directions


def slope_error(
    loss: Callable[[], torch.Tensor], parameters: list[nn.Parameter], slope: float, directions: list, step: float
) -> tuple[float, float]:
    """Compare a slope with a Richardson-refined central difference.

    Args:
        loss: returns the scalar loss; called four times without gradients.
        parameters: the parameters to vary, at the point to check.
        step: length of the longer difference; the refinement also uses half of it.

    Returns:
        (relative error, finite difference).
    """
    coarse = _central(loss, parameters, directions, step)
    fine = _central(loss, parameters, directions, step / 2)
    reference = (4 * fine - coarse) / 3
    return abs(slope - reference) / max(abs(reference), 1e-12), reference


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to float64, on the CPU because not every device supports it."""
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
    """Check the gradient before step 1, at small random changes of the trainables: of all of them, then per block.

    The trainables' values are restored afterwards.

    Args:
        loss: returns the loss of one batch, the same at every call, in float32 or better.
        tolerance: largest relative error.

    Returns:
        The relative error over all trainables.

    Raises:
        ModelError: the model has no gradient, or its error is above the tolerance. The error names the wrong blocks.
    """
    try:
        with _without_tf32(), _shifted(list(trainables.values())):
            return _check(loss, trainables, tolerance)
    except RuntimeError as broken:
        if not any(part in str(broken) for part in _NO_GRADIENT):
            raise
        raise ModelError(
            "This model has no gradient: it overwrites values that the backward pass needs, "
            f"or runs an operation without a backward ({str(broken).splitlines()[0]}).",
            "Graft cannot train it yet. Please report the model's name.",
            "model",
        ) from broken


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Turn off TF32 within the block: it rounds more than the loss differences that are compared."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


@contextmanager
def _shifted(parameters: list[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    source = generator("check", 0)
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(torch.randn(parameter.shape, generator=source).to(parameter) * 0.02)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _check(loss: Callable, trainables: dict[str, nn.Parameter], tolerance: float) -> float:
    parameters = list(trainables.values())
    recorded = loss()
    gradients = dict(zip(trainables, gradients_of(recorded, parameters), strict=True))
    value = float(recorded.detach())
    with torch.no_grad():
        apart = abs(float(loss()) - value) / max(abs(value), 1e-12)
    if not apart <= TOLERANCE_RECORDED:
        raise ModelError(
            f"This model computes something else while torch records gradients: its loss differs by {apart:.1%}.",
            "Training it would not learn what the pictures show. Please report the model's name.",
            "model",
        )
    error, wrong = _compare(loss, parameters, list(gradients.values()), tolerance, value)
    log.info("Graft: gradient check, relative error %.2e", error)
    blocks = _by_block(trainables)
    off = {}
    for block, names in blocks.items():
        inside = [trainables[name] for name in names]
        share, is_off = _compare(loss, inside, [gradients[name] for name in names], tolerance, value, quick=True)
        if is_off:
            off[block] = share
    log.info("Graft: gradient check, block by block: %d of %d blocks are wrong", len(off), len(blocks))
    if off or wrong:
        worst = sorted(off, key=off.get, reverse=True)[:3]
        where = "".join(f", {off[block]:.1%} in {block}" for block in worst)
        more = f" and {len(off) - 3} blocks more" if len(off) > 3 else ""
        raise ModelError(
            f"The gradient through this model is wrong: {error:.1%} off the finite difference{where}{more}.",
            "Training it would not learn what the pictures show. Please report the model's name.",
            "model",
        )
    return error


def _compare(
    loss: Callable, parameters: list, gradients: list, tolerance: float, value: float, quick: bool = False
) -> tuple[float, bool]:
    """Return (relative error of the derivative against the finite difference, whether it is too large).

    An error above BAR never passes, unless the loss depends so little on the parameters that even the longest step
    shows only rounding.

    Args:
        value: the loss, which determines the rounding of the difference.
        quick: try half the evaluations first; for most blocks they suffice.
    """
    slope, directions = slope_of(parameters, gradients)
    noise = _ROUNDING * abs(value)
    first = _STEP
    while noise / first > _EXCUSED * abs(slope) and first < _LONGEST:
        first *= 4

    def passes(difference: float, step: float) -> bool:
        # A step shorter than _STEP gets no larger allowance: a wrong gradient is wrong at every step length.
        allowed = tolerance * abs(difference) + noise / max(step, _STEP)
        if noise / first <= BAR * abs(difference):
            allowed = min(allowed, BAR * abs(difference))
        return abs(slope - difference) <= allowed

    if quick and passes(_central(loss, parameters, directions, first / 2), first):
        return 0.0, False
    # Try shorter steps last, for a loss that is far from linear.
    longer = [_STEP * 4**power for power in range(3, 0, -1)]
    share = math.inf
    shorter = [step for step in _SHORTER if noise / step <= _DROWNED * abs(slope)]
    for step in (*(step for step in longer if step <= first), _STEP, *shorter):
        share, difference = slope_error(loss, parameters, slope, directions, step)
        if passes(difference, step):
            return share, False
    return share, True


def _by_block(trainables: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """Group the trainables' names by block. Names outside any block form the block "the rest"."""
    by_block: dict[str, list[str]] = {}
    for name in trainables:
        match = _BLOCK.match(name)
        by_block.setdefault(match.group(0) if match else "the rest", []).append(name)
    return by_block
