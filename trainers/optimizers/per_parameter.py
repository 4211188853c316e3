"""An optimizer that updates each parameter as soon as its gradient is ready, and its rounding to bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..rng import stream_seed
from .state import restore_optimizer, state_of

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe
    from .registry import Optimizer


def round_stochastically(values: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Round float32 values up or down to bfloat16, with the probability that keeps the mean exact (Gupta et al. 2015).

    A bfloat16 is the upper half of a float32. The function adds a random lower half, keeps the carry and clears the
    lower half.

    Args:
        values: finite, float32, of any shape.
        source: generator on the device of the values.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=source)
    noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    return noise.view(torch.float32).to(torch.bfloat16)


class PerParameterOptimizer:
    """One optimizer instance per parameter, behind the interface that the loop and torch's gradient scaler use.

    A half-precision parameter is converted to float32, updated and rounded back stochastically. Its optimizer state is
    always float32.

    Attributes:
        param_groups: as `parameter_groups` makes them. Their learning rates are those of the next step.
    """

    def __init__(self, kind: Optimizer, groups: list[dict], names: dict[torch.nn.Parameter, str], recipe: Recipe):
        self.param_groups = groups
        self._seed = recipe.seed
        self._step = 0
        self._names = names
        self._groups = {parameter: group for group in groups for parameter in group["params"]}
        self._held = {parameter: _held(parameter) for parameter in self._groups}
        self._own = {
            parameter: kind.make([{**group, "params": [self._held[parameter]]}], recipe)
            for parameter, group in self._groups.items()
        }

    def begin(self, step: int) -> None:
        """Set the number of the coming step, which seeds the rounding."""
        self._step = step

    def step(self) -> None:
        """Update all parameters that have a gradient."""
        for parameter in self._own:
            if parameter.grad is not None:
                self.move(parameter)

    @torch.no_grad()
    def move(self, parameter: torch.nn.Parameter) -> None:
        """Update one parameter and discard its gradient."""
        own, held = self._own[parameter], self._held[parameter]
        own.param_groups[0]["lr"] = self._groups[parameter]["lr"]
        if held is parameter:
            own.step()
        else:
            held.data = parameter.detach().float()
            held.grad = parameter.grad.float()
            own.step()
            seed = stream_seed("rounding", self._seed, self._step, self._names[parameter])
            source = torch.Generator(parameter.device).manual_seed(seed)
            parameter.copy_(round_stochastically(held.detach(), source))
            held.grad = None
            held.data = _nothing(parameter)
        parameter.grad = None

    def state_of(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
        """Return the state in the form of `state_of` for a single optimizer. A run can continue with either."""
        slots, groups = {}, []
        for place, own in enumerate(self._own.values()):
            mine, _ = state_of(own)
            if 0 in mine:
                slots[place] = mine[0]
        for group in self.param_groups:
            # The group's numbers depend on rates and steps alone, so all members have the same.
            groups.append(state_of(self._own[group["params"][0]])[1][0])
        return slots, groups

    def restore(self, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Restore a state from `state_of`, of this class or of a single optimizer."""
        numbers = {id(group): kept for group, kept in zip(self.param_groups, groups, strict=False)}
        for place, (parameter, own) in enumerate(self._own.items()):
            kept = numbers.get(id(self._groups[parameter]))
            restore_optimizer(own, {0: slots[place]} if place in slots else {}, [] if kept is None else [kept])


def _held(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Return the tensor that the optimizer updates: the parameter, or a float32 that is empty between updates."""
    if parameter.dtype.itemsize >= 4:
        return parameter
    return torch.nn.Parameter(_nothing(parameter))


def _nothing(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=parameter.device)
