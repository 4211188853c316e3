"""From gradients to a step: after the backward for all at once, or within it for each as soon as it is there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OutOfMemory
from ..optimizers.groups import parameter_groups
from ..optimizers.per_parameter import PerParameterOptimizer
from ..optimizers.registry import OPTIMIZERS
from ..optimizers.state import restore_optimizer, state_of

if TYPE_CHECKING:
    from ..protocols import Host
    from .plan import Plan

# Mean numbers of a trainable: up to here a CPU has done with it before a second thread has woken up.
_SMALL = 1 << 16


class ParameterUpdater:
    """Moves a plan's trainables.

    Within the backward the gradients of all weights never lie beside one another. It comes to the same where a step is
    exactly one backward, nothing is clipped, which needs the norm of all of them, and the optimiser takes each by
    itself (Lv et al. 2023, LOMO).

    Attributes:
        moving: whether some trainables have moved by a step that is not done: they belong to no step, and are not to be
            saved.
        optimiser: one of torch's kind, or `Apart`.
        in_backward: whether moves happen within the backward.
    """

    def __init__(self, plan: Plan, host: Host):
        recipe = plan.recipe
        kind = OPTIMIZERS[recipe.optimizer]
        self.step_in_progress = False
        self._limit = recipe.max_grad_norm
        self._trainables = plan.trainables
        self._parameters = list(plan.trainables.values())
        self._scaler = _loss_scaler(host)
        # With others the gradient is known only when all have come to their end.
        alone = host.group.world_size == 1
        self.in_backward = alone and kind.apart and not self._scaler.is_enabled() and _is_one_backward(plan)
        half = any(parameter.dtype.itemsize < 4 for parameter in self._parameters)
        groups = parameter_groups(plan.all_groups(), plan.trainables, recipe)
        if self.in_backward or half:
            names = {parameter: name for name, parameter in plan.trainables.items()}
            self.optimizer = PerParameterOptimizer(kind, groups, names, recipe)
        else:
            self.optimizer = kind.make(groups, recipe)
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._highest = math.inf
        self._rests = False
        self._hooks = []
        if self.in_backward:
            self._hooks = [one.register_post_accumulate_grad_hook(self._move) for one in self._parameters]

    def begin(self, step: int, highest: float = math.inf) -> None:
        """Called before a step's gradients; by a loss above the highest nothing is moved."""
        self._norms = {}
        self._highest = highest
        if isinstance(self.optimizer, PerParameterOptimizer):
            self.optimizer.begin(step)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates gradients, or moves by them at once."""
        # By a loss that is no number, or too high, nothing may be moved, and the loop will refuse it.
        if self.in_backward:
            value = float(loss.detach())
            if not math.isfinite(value) or value > self._highest:
                return
        self._scaler.scale(loss).backward()

    def discard_gradients(self) -> None:
        """Lets go of the gradients of a step that could not be computed to its end.

        Raises:
            OutOfMemory: some weights have moved by it already.
        """
        if self.step_in_progress:
            raise OutOfMemory(
                "Memory ran out in the midst of a step, when some weights had moved already.",
                "It goes on from the last save: set checkpointing to on (Graft Memory Options), lower the dataset's "
                "resolution, or choose Adafactor, and queue the graph again.",
                "dataset",
            )
        self._norms = {}
        for parameter in self._parameters:
            parameter.grad = None

    def norm(self) -> float:
        """The norm of the whole gradient, which is clipped to the recipe's limit (0: not at all)."""
        if self.in_backward:
            parts = [self._norms[one] for one in self._parameters if one in self._norms]
            return float(torch.stack([part.cpu() for part in parts]).double().norm()) if parts else 0.0
        self._scaler.unscale_(self.optimizer)
        limit = self._limit if self._limit > 0 else math.inf
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))

    def should_abort(self, loss: float, norm: float) -> bool:
        """Whether a step is not to be made, or what was moved of it not to be kept.

        Under fp16 loss scaling an infinite gradient is ordinary: the scaler skips that step and lowers its factor.
        """
        return not (math.isfinite(loss) and (math.isfinite(norm) or self._scaler.is_enabled()))

    def step(self) -> None:
        """Moves all that has not moved yet; the step is under way until `done`."""
        self.step_in_progress = True
        if self.in_backward:
            return
        self._scaler.step(self.optimizer)
        self._scaler.update()
        for parameter in self._parameters:
            parameter.grad = None

    def done(self) -> None:
        """The step is over, whatever else belonged to it included."""
        self.step_in_progress = False

    def close(self) -> None:
        """Leaves the trainables as they are."""
        for hook in self._hooks:
            hook.remove()

    def state_of(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
        """Of the optimiser's parameters by place, of its groups, and of the loss scaling."""
        found = (
            self.optimizer.state_of() if isinstance(self.optimizer, PerParameterOptimizer) else state_of(self.optimizer)
        )
        return *found, dict(self._scaler.state_dict())

    def restore(self, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]], scaler: dict[str, float]) -> None:
        """Takes what `state_of` found."""
        if isinstance(self.optimizer, PerParameterOptimizer):
            self.optimizer.restore(slots, groups)
        else:
            restore_optimizer(self.optimizer, slots, groups)
        if self._scaler.is_enabled() and scaler:
            self._scaler.load_state_dict(scaler)

    @contextmanager
    def small_work(self, device: torch.device) -> Iterator[None]:
        """One thread on a CPU where the trainables are many and small, as an adapter's are."""
        threads = torch.get_num_threads()
        numbers = sum(parameter.numel() for parameter in self._parameters)
        if device.type != "cpu" or threads == 1 or numbers > _SMALL * len(self._parameters):
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def updates_disabled(self) -> Iterator[None]:
        """Within it gradients that would move something are let go of instead."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def tensors(self) -> list[torch.Tensor]:
        """What the optimiser keeps so far."""
        slots, _, _ = self.state_of()
        return [value for kept in slots.values() for value in kept.values() if torch.is_tensor(value)]

    def _move(self, parameter: torch.nn.Parameter) -> None:
        if self._rests:
            parameter.grad = None
            return
        assert parameter not in self._norms, "a second backward in a step of one"
        self._norms[parameter] = parameter.grad.float().norm()
        self.step_in_progress = True
        self.optimizer.move(parameter)


def _loss_scaler(host: Host):
    """Dynamic loss scaling for fp16 compute (Micikevicius et al. 2018), idle otherwise."""
    half = getattr(host.denoiser, "compute_dtype", None) is torch.float16
    return torch.amp.GradScaler(host.denoiser.device.type, enabled=half)


def _is_one_backward(plan: Plan) -> bool:
    """Whether it is wanted, and each step is one backward without clipping."""
    recipe = plan.recipe
    whole = recipe.accumulation == 1 and not 0 < recipe.micro_batch < recipe.batch_size
    clipped = recipe.max_grad_norm > 0
    return plan.in_backward and whole and not clipped and not any(item.anchored for item in plan.train)
