"""Saves of a run: restore the live tensors from the last save, and capture them in the next one."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..errors import GraftError
from ..runs.checkpoint import State
from ..runs.reports import early_stop_of
from ..runs.run import STOPPED, Run
from ..runs.saves import read_best, save_best
from .updater import ParameterUpdater, loss_limit

if TYPE_CHECKING:
    from ..protocols import Host
    from ..steps.plan import Plan

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves of one run, of the weights, the constants, the optimizer and the moving average.

    Attributes:
        saved_step: the step of the last save.
    """

    def __init__(self, plan: Plan, run: Run, host: Host, updater: ParameterUpdater, average):
        self._plan = plan
        self._run = run
        self._host = host
        self._updater = updater
        self._average = average
        self.saved_step = 0

    def restore(self, state: State) -> None:
        """Load the state into the live tensors and free the state's own. At step 0 only start the moving average.

        Raises:
            GraftError: the state has other trainables than this run, or the state of another optimizer.
        """
        self.saved_step = state.step
        plan, shards = self._plan, self._plan.shards
        if state.step == 0:
            if plan.recipe.ema_decay:
                self._average.start(list(plan.trainables.values()))
            return
        if not (
            _have_equal_shapes(state.trainables, plan.values()) and _have_equal_shapes(state.constants, plan.constants)
        ):
            raise GraftError(
                f"The saved state of step {state.step} has other layers than this model.",
                "Start the run over (on_existing in Graft Run Options).",
            )
        with torch.no_grad():
            for name, parameter in plan.trainables.items():
                value = state.trainables.pop(name)
                parameter.copy_(value if shards is None else shards.local(name, value))
            for name, tensor in plan.constants.items():
                tensor.copy_(state.constants[name])
        try:
            self._restore_optimizer(state)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise GraftError(
                f"The saved state of step {state.step} does not fit this optimizer ({error!r:.200}).",
                "Start the run over.",
            ) from error

    def _restore_optimizer(self, state: State) -> None:
        recipe, shards = self._plan.recipe, self._plan.shards
        if shards is not None:
            for name, slots in self._by_name(state.optimizer):
                slots.update({slot: shards.local(name, value) for slot, value in slots.items()})
            state.ema = {name: shards.local(name, value) for name, value in state.ema.items()}
        self._updater.restore(state.optimizer, state.groups, state.scaler)
        state.optimizer = {}
        if recipe.ema_decay:
            averages = [state.ema.pop(name).to(live.device) for name, live in self._plan.trainables.items()]
            self._average.go_on(averages, _ema_updates(state, recipe.loss_spike_factor))

    def save(self, state: State) -> None:
        """Write the state and the files of its step. Processes other than the main one write nothing."""
        with self._captured(state) as is_main:
            if is_main:
                products = self._plan.export(state.ema or state.trainables, state.step)
                path = self._run.save(state, products, self._plan.recipe.keep_last)
        self.saved_step = state.step
        if is_main:
            self._host.report("saved", {"step": state.step, "path": path})

    @contextmanager
    def _captured(self, state: State) -> Iterator[bool]:
        """Capture the live tensors. Yield True in the main process, which writes them; others serve their shards."""
        shards, group = self._plan.shards, self._host.group
        if shards is not None or group.is_main:
            self._capture(state)
        with nullcontext(group.is_main) if shards is None else group.main_process_only() as is_main:
            yield is_main
        if shards is not None:
            # The result is exported from weights or averages. The optimizer is not needed for it.
            shards.withdraw(kept=len(state.ema))

    def save_best(self, state: State) -> dict[str, Any] | None:
        """Keep the files of this step as the best ones if no kept step has a lower validation loss.

        Returns:
            The logged event; None if an earlier step remains the best, or in other processes than the main one.
        """
        captured = State()
        with self._captured(captured) as is_main:
            if not is_main:
                return None
            step, loss = state.validation[-1]
            kept_step, kept_loss = read_best(self._run) or (0, math.inf)
            # A resumed run has forgotten the event of a step that it repeats, so it writes that step again.
            if not loss < kept_loss and step != kept_step:
                return None
            save_best(self._run, self._plan.export(captured.ema or captured.trainables, step), step, loss)
        event = {"event": "best", "step": step, "loss": loss}
        self._run.log(event)
        return event

    def save_after_error(self, state: State, has_ended: bool) -> None:
        """Save before an error ends the run. Log a failure to save, so that the user sees the first error.

        If the step has updated only some of the weights, keep the last save: such weights belong to no step. Also keep
        it if the trained weights are sharded: no process waits to serve its shards.

        Args:
            has_ended: an early stop was due after this step, so the run must not go on when it is resumed.
        """
        cannot = self._plan.shards is not None or self._updater.step_in_progress
        if state.step <= self.saved_step or cannot or not self._host.group.is_main:
            return
        try:
            self.save(state)
            if has_ended and state.step < self._plan.recipe.steps:
                self._run.note_halt(STOPPED, state.step, self._plan.recipe.steps)
                self._run.log(early_stop_of(state))
        except Exception:
            log.exception("Graft: cannot save the progress after an error.")

    def _capture(self, state: State) -> None:
        """Put the live tensors into the state. They are not copied: full fine-tuning has no memory for a copy."""
        plan = self._plan
        state.trainables, state.ema = plan.values(), self._averages()
        state.constants = {name: tensor.detach() for name, tensor in plan.constants.items()}
        state.optimizer, state.groups, state.scaler = self._updater.state_of()
        if plan.recipe.ema_decay:
            state.ema_updates = self._average.updates
        if plan.shards is not None:
            self._publish(state)

    def _publish(self, state: State) -> None:
        """Replace the shards of averages and optimizer by whole tensors. All processes publish the same ones."""
        shards = self._plan.shards
        rows = [(name, state.ema, name) for name in state.ema]
        for name, slots in self._by_name(state.optimizer):
            rows += [(name, slots, slot) for slot, value in slots.items() if shards.is_shard(name, value)]
        wholes = shards.publish([(name, held[key]) for name, held, key in rows])
        for (_, held, key), whole in zip(rows, wholes, strict=True):
            held[key] = whole

    def _by_name(self, slots: dict[int, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (name of the trainable, its optimizer state)."""
        names = [name for group in self._plan.all_groups() for name in group.names]
        return ((names[place], kept) for place, kept in slots.items())

    def _averages(self) -> dict[str, torch.Tensor]:
        average = self._average
        return {} if average is None else dict(zip(self._plan.trainables, average.shadow_params, strict=True))


def _ema_updates(state: State, factor: float) -> int:
    """Return the number of updates of the moving average. Recount it for states of earlier versions, which lack it."""
    if state.ema_updates is not None:
        return state.ema_updates
    losses = state.losses
    skipped = (loss_limit(losses[:place], factor) < loss for place, loss in enumerate(losses))
    return state.step - (sum(skipped) if factor else 0)


def _have_equal_shapes(saved: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> bool:
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (saved, live)]
    return shapes[0] == shapes[1]
