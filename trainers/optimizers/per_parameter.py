"""An optimiser that moves every parameter by an instance of its own, when its gradient is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..rng import stream_seed
from .state import restore_optimizer, state_of
from .stochastic_rounding import round_stochastically

if TYPE_CHECKING:
    from ..recipe.recipe import Recipe
    from .registry import Optimizer


class PerParameterOptimizer:
    """What the loop and torch's gradient scaler ask of an optimiser, over one instance for each parameter.

    A parameter in half precision is raised to float32, moved there and rounded back stochastically; what its optimiser
    keeps of it is float32 throughout.

    Attributes:
        param_groups: as `parameter_groups` makes them; their rates are those of the next step.
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
        """Called before the moves of a step: rounding is drawn from its number."""
        self._step = step

    def step(self) -> None:
        """Moves all that have a gradient."""
        for parameter in self._own:
            if parameter.grad is not None:
                self.move(parameter)

    @torch.no_grad()
    def move(self, parameter: torch.nn.Parameter) -> None:
        """Moves one, and forgets its gradient."""
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
        """As `state_of` of one optimiser for all: a run may go on with either."""
        slots, groups = {}, []
        for place, own in enumerate(self._own.values()):
            mine, _ = state_of(own)
            if 0 in mine:
                slots[place] = mine[0]
        for group in self.param_groups:
            # A group's numbers follow from rates and steps, which its members share.
            groups.append(state_of(self._own[group["params"][0]])[1][0])
        return slots, groups

    def restore(self, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Takes what `state_of` found, or that of one optimiser for all."""
        numbers = {id(group): kept for group, kept in zip(self.param_groups, groups, strict=False)}
        for place, (parameter, own) in enumerate(self._own.items()):
            kept = numbers.get(id(self._groups[parameter]))
            restore_optimizer(own, {0: slots[place]} if place in slots else {}, [] if kept is None else [kept])


def _held(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What a parameter's own optimiser moves: itself, or a float32 that holds its values for the move alone."""
    if parameter.dtype.itemsize >= 4:
        return parameter
    return torch.nn.Parameter(_nothing(parameter))


def _nothing(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=parameter.device)
