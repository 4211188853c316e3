"""Optimizer steps: after the backward for all parameters, or within it for each parameter as its gradient arrives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..errors import OutOfMemory, SettingsError
from ..lowrank.layers import cast_by_block
from ..memory.autograd import blocks_of
from ..memory.transfer import copies_in_queue
from ..optimizers.per_parameter import PerParameterOptimizer
from ..optimizers.registry import OPTIMIZERS
from ..optimizers.state import parameter_groups, restore_optimizer, state_of
from ..recipe.options import HALF
from ..steps.pending_step import PendingNumbers, StepLosses
from .oom_fallback import trees_of

if TYPE_CHECKING:
    from ..protocols import Group, Host
    from ..steps.plan import Plan

# Mean size of a trainable up to which one CPU thread is fastest: it is done before a second thread wakes up.
_SMALL = 1 << 16
# The spike check takes the median of the last _MEDIAN_OVER losses. With fewer than _LEAST_LOSSES it is off.
_MEDIAN_OVER = 100
_LEAST_LOSSES = 20


class ParameterUpdater:
    """Optimizer, loss scaler and gradient clipping for a plan's trainables.

    An optimizer step within the backward never holds the gradients of all weights at once (LOMO, Lv et al. 2023). The
    result is the same if a step is exactly one backward, the optimizer treats each parameter alone, and nothing is
    clipped: clipping needs the norm of all gradients.

    Attributes:
        step_in_progress: some trainables are updated by a step that is not done. They must not be saved then.
        optimizer: a torch optimizer, or a `PerParameterOptimizer`.
        in_backward: updates happen within the backward.
        masks: the device itself skips an update whose loss or gradient is not finite or whose loss spikes, so that the
            host may read them later.
    """

    def __init__(self, plan: Plan, host: Host):
        recipe = plan.recipe
        kind = OPTIMIZERS[recipe.optimizer]
        self.step_in_progress = False
        self._limit = recipe.max_grad_norm
        self._trainables = plan.trainables
        self._after_step = plan.after_step
        self._parameters = list(plan.trainables.values())
        numbers = sum(parameter.numel() for parameter in self._parameters)
        self._are_small = numbers <= _SMALL * len(self._parameters)
        self._scaler = _loss_scaler(host)
        if self._scaler.is_enabled() and plan.shards is not None:
            raise SettingsError(
                "The model computes in fp16, but this node trains all weights in shards.",
                "Set compute_dtype in Graft Memory Options to bf16 or fp32, or shard to off.",
                "options",
            )
        # With several processes, the gradient is known only after the all-reduce. FSDP2 sums shards in the backward.
        alone = host.group.world_size == 1
        self.in_backward = kind.per_parameter and not self._scaler.is_enabled() and _is_one_backward(plan, host.group)
        half = any(parameter.dtype.itemsize < 4 for parameter in self._parameters)
        groups = parameter_groups(plan.all_groups(), plan.trainables, recipe)
        if self.in_backward or half:
            # Each shard rounds with noise of its own.
            own = f"/{host.group.rank}" if plan.shards is not None else ""
            names = {parameter: name + own for name, parameter in plan.trainables.items()}
            self.optimizer = PerParameterOptimizer(kind, groups, names, recipe)
        else:
            self.optimizer = kind.make(groups, recipe)
        self.masks = self._can_mask(host)
        self._reducer = (
            host.group.reducer(self._in_forward_order(host), recipe.communication == HALF)
            if plan.shards is None
            else plan.shards.reducer()
        )
        self._sums = host.group.sum_numbers if plan.shards is not None else None
        self._norms: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._highest = math.inf
        self._rests = False
        self._hooks = []
        if not alone and recipe.compile == "off":
            # Compiled blocks take no hooks.
            self._hooks = cast_by_block(trees_of(plan, host), blocks_of)
        if self.in_backward and plan.shards is not None:
            self._hooks = plan.shards.step_in_backward(self._move)
        elif self.in_backward:
            self._hooks = [parameter.register_post_accumulate_grad_hook(self._move) for parameter in self._parameters]

    def _in_forward_order(self, host: Host) -> list[torch.nn.Parameter]:
        """Return the trainables with those of the denoiser last: it runs after the text encoder and its embeddings."""
        module = host.denoiser.module
        late = set() if module is None else {*module.parameters()}
        return sorted(self._parameters, key=lambda parameter: parameter in late)

    def _can_mask(self, host: Host) -> bool:
        """Report whether the optimizer takes a mask (torch's fused ones do), all on one device that can read later."""
        device = host.denoiser.device
        is_there = all(parameter.device == device for parameter in self._parameters)
        takes_mask = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return takes_mask and is_there and host.group.world_size == 1 and copies_in_queue(device)

    def begin(self, step: int, highest: float = math.inf) -> None:
        """Start a step of all processes, before its backward. A loss above `highest` updates nothing."""
        self._reducer.begin()
        self._norms = {}
        self._highest = highest
        if isinstance(self.optimizer, PerParameterOptimizer):
            self.optimizer.begin(step)

    def backward(self, loss: torch.Tensor, is_last: bool = False) -> None:
        """Run the backward: accumulate gradients, or update the parameters at once if `in_backward` is set.

        Args:
            is_last: no other backward of the step follows, so gradients may be sent to other processes meanwhile.
        """
        # A loss that is not finite or too high must not update anything. The loop rejects or skips the step later.
        if self.in_backward:
            value = float(loss.detach())
            if self._sums is not None:
                # Each process has one backward, in which all of them take part.
                (value,) = self._sums(value)
            if not math.isfinite(value) or value > self._highest:
                return
        with self._reducer.last_backward() if is_last else nullcontext():
            self._scaler.scale(loss).backward()

    def sum_gradients(self) -> None:
        """Sum the gradients over the processes, after the last backward; see `GradientReducer.finish`."""
        self._reducer.finish()

    def discard_gradients(self) -> None:
        """Discard the gradients of an unfinished step.

        Raises:
            OutOfMemory: the step has already updated some weights.
        """
        if self.step_in_progress:
            raise OutOfMemory(
                "Memory ran out in a step that had already updated some weights.",
                "Set checkpointing to on (Graft Memory Options), lower the dataset's resolution, or choose Adafactor. "
                "Then queue the graph again: it resumes from the last save.",
                "dataset",
            )
        self._norms = {}
        for parameter in self._parameters:
            parameter.grad = None

    def clip_gradients(self, losses: StepLosses, limit: float) -> PendingNumbers:
        """Clip the gradients to the recipe's `max_grad_norm` (0: no clip). Return the step's numbers.

        Args:
            limit: a loss above it is a spike.
        """
        # With fp16 loss scaling, an infinite gradient is normal: the scaler skips the step and lowers its factor.
        return PendingNumbers(losses, self._clip(), limit, self.masks, self._scaler.is_enabled())

    def _clip(self) -> torch.Tensor:
        """Return the norm of the gradient, or the norms of its parts if they were used within the backward."""
        if self.in_backward:
            parts = [self._norms[parameter] for parameter in self._parameters if parameter in self._norms]
            norms = torch.stack([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0)
            return norms if self._sums is None else self._norm_over_group(norms.norm()).reshape(1)
        self._scaler.unscale_(self.optimizer)
        limit = self._limit if self._limit > 0 else math.inf
        if self._sums is not None:
            return self._clip_shards(limit)
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit).reshape(1)

    def _clip_shards(self, limit: float) -> torch.Tensor:
        """Clip to the norm over all processes."""
        own = torch.nn.utils.get_total_norm([shard.grad for shard in self._parameters if shard.grad is not None])
        norm = self._norm_over_group(own)
        torch.nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return norm.reshape(1)

    def _norm_over_group(self, own: torch.Tensor) -> torch.Tensor:
        """Return the norm of all shards from that of this process's."""
        return torch.tensor(math.sqrt(self._sums(float(own) ** 2)[0]))

    def skip(self) -> None:
        """Discard the gradients of a step that updates nothing."""
        if self._scaler.is_enabled():
            # Otherwise it would refuse to unscale the next step's gradients.
            self._scaler._per_optimizer_states.clear()
        self.discard_gradients()

    def step(self, skip: torch.Tensor | None = None) -> None:
        """Update all trainables that were not updated within the backward. The step is in progress until `done`.

        Args:
            skip: 1.0 on the device to leave trainables, optimizer and loss scaler as they are; see `masks`.
        """
        self.step_in_progress = True
        if not self.in_backward:
            self._step_optimizer(skip)
        self._after_step()

    def _step_optimizer(self, skip: torch.Tensor | None) -> None:
        if skip is None:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        elif self._scaler.is_enabled():
            self._scaled_step(skip)
        else:
            self.optimizer.found_inf = skip
            self.optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None

    def _scaled_step(self, skip: torch.Tensor) -> None:
        scaler = self._scaler
        for found_inf in scaler._found_inf_per_device(self.optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, skip))
        state = scaler._scale, scaler._growth_tracker
        before = [value.clone() for value in state]
        scaler.step(self.optimizer)
        scaler.update()
        for value, old in zip(state, before, strict=True):
            value.copy_(torch.where(skip.bool(), old, value))

    def done(self) -> None:
        """Mark the step as done. Call it after everything else that belongs to the step, such as the EMA update."""
        self.step_in_progress = False

    def close(self) -> None:
        """Remove the gradient hooks."""
        self._reducer.close()
        for hook in self._hooks:
            hook.remove()

    def state_of(self) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]], dict[str, float]]:
        """Return the state of the optimizer's parameters by index, of its groups, and of the loss scaler."""
        state = (
            self.optimizer.state_of() if isinstance(self.optimizer, PerParameterOptimizer) else state_of(self.optimizer)
        )
        return *state, dict(self._scaler.state_dict())

    def restore(self, slots: dict[int, dict[str, Any]], groups: list[dict[str, Any]], scaler: dict[str, float]) -> None:
        """Restore what `state_of` returned."""
        if isinstance(self.optimizer, PerParameterOptimizer):
            self.optimizer.restore(slots, groups)
        else:
            restore_optimizer(self.optimizer, slots, groups)
        if self._scaler.is_enabled() and scaler:
            self._scaler.load_state_dict(scaler)

    @contextmanager
    def small_work(self, device: torch.device) -> Iterator[None]:
        """Use one CPU thread in the block if the trainables are on average small, as those of an adapter are."""
        threads = torch.get_num_threads()
        if device.type != "cpu" or threads == 1 or not self._are_small:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @contextmanager
    def updates_disabled(self) -> Iterator[None]:
        """Disable updates within the backward in the block: discard the gradients instead."""
        self._rests = True
        try:
            yield
        finally:
            self._rests = False

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the optimizer's state."""
        slots, _, _ = self.state_of()
        return [value for kept in slots.values() for value in kept.values() if torch.is_tensor(value)]

    def _move(self, parameter: torch.nn.Parameter) -> None:
        if self._rests:
            parameter.grad = None
            return
        assert parameter not in self._norms, "a parameter had a second backward in one step"
        self._norms[parameter] = parameter.grad.float().norm()
        self.step_in_progress = True
        self.optimizer.move(parameter)


def loss_limit(losses: Sequence[float], factor: float) -> float:
    """Return the loss above which a step is skipped: `factor` times the median of the last losses, or infinity."""
    if not factor or len(losses) < _LEAST_LOSSES:
        return math.inf
    return factor * statistics.median(losses[-_MEDIAN_OVER:])


def _loss_scaler(host: Host):
    """Return a dynamic loss scaler (Micikevicius et al. 2018), enabled only for fp16 compute."""
    half = getattr(host.denoiser, "compute_dtype", None) is torch.float16
    return torch.amp.GradScaler(host.denoiser.device.type, enabled=half)


def _is_one_backward(plan: Plan, group: Group) -> bool:
    """Return True if the plan asks for updates in the backward, and each step is one backward without clipping."""
    recipe = plan.recipe
    if plan.shards is not None:
        # Sharded weights compute pictures one at a time.
        whole = recipe.accumulation * recipe.batch_size <= group.world_size
    else:
        whole = group.world_size == 1 and recipe.accumulation == 1 and not 0 < recipe.micro_batch < recipe.batch_size
    clipped = recipe.max_grad_norm > 0
    return plan.in_backward and whole and not clipped and not any(item.has_prior_target for item in plan.train)
