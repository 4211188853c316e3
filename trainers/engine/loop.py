"""The training loop. Read `train` from top to bottom."""

from __future__ import annotations

import itertools
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..distributed.group import report_idle
from ..optimizers import OPTIMIZERS, ScheduleShape, lr_factor
from ..optimizers.ema import MovingAverage, averaged
from ..preprocessing.prefetch import Prefetcher
from ..protocols import Command
from ..recipe.options import STOPS_FALLING
from ..runs.checkpoint import State
from ..runs.reports import has_stopped_falling, report_early_stop, report_pictures, report_spike
from ..runs.run import STOPPED, Run
from ..steps.pending_step import PendingStep, StepNumbers
from ..steps.plan import Plan, Window
from ..steps.step import accuracy_of, fetch_batch, fixed_losses, sample_losses
from .accumulation import accumulate_gradients
from .checkpointer import Checkpointer
from .oom_fallback import OOMFallback
from .preflight import report_estimate, share_inputs, warn_of_rate
from .previews import preview
from .updater import ParameterUpdater, loss_limit

if TYPE_CHECKING:
    from ..protocols import Host

log = logging.getLogger(__name__)

_PICTURES_EVERY = 50  # steps between reports of the loss by picture


def train(plan: Plan, run: Run, host: Host, state: State) -> State:
    """Train from `state` to the recipe's last step, or until the user stops. Save the progress before an error leaves.

    Args:
        state: the state to resume from; step 0 for a new run.

    Returns:
        The final state, which is also saved.

    Raises:
        NumbersError: a loss or gradient is not finite. The error names the pictures of the batch.
        PeerLostError: another process of the group has ended.
        Any exception that `host.report` raises to interrupt.
    """
    trainer = _Trainer(plan, run, host, state)
    try:
        trainer.report_before_start()
        for step in range(state.step + 1, plan.recipe.steps + 1):
            trainer.begin_step()
            trainer.forward_backward()
            # The step before: its numbers arrive while the device computes this one.
            trainer.complete_step()
            trainer.update()
            if trainer.must_complete(step):
                trainer.complete_step()
            trainer.preview(step)

            command = _next_command(host, trainer.has_learned_enough(step))
            if command is not None:
                trainer.complete_step()
            trainer.save_if_due(step, command)
            if command is Command.STOP:
                break
        trainer.finish()
    except BaseException:
        # Not `Exception`: some ComfyUI versions interrupt with another BaseException.
        trainer.save_after_error()
        raise
    finally:
        trainer.close()
    return state


class _Trainer:
    """The named steps of the training loop, and all that lives as long as it does."""

    def __init__(self, plan: Plan, run: Run, host: Host, state: State):
        recipe, group = plan.recipe, host.group
        self._plan, self._run, self._host, self._state = plan, run, host, state
        self._parameters = list(plan.trainables.values())
        self._optimizer = OPTIMIZERS[recipe.optimizer]
        self._updater = ParameterUpdater(plan, host)
        self._oom = OOMFallback(plan, run, host, self._updater.in_backward)
        self._average = self._optimizer.average(self._updater.optimizer, self._parameters)
        if recipe.ema_decay:
            self._average = MovingAverage(recipe.ema_decay, in_place=plan.shards is not None)
        self._checkpointer = Checkpointer(plan, run, host, self._updater, self._average)
        report_idle(group, recipe.batch_size * recipe.accumulation)
        group.all_reduce()
        if plan.shards is None:
            group.broadcast([*self._parameters, *plan.constants.values()])
        self._checkpointer.restore(state)
        share_inputs(plan, host, state.batches)
        self._lr_factor = lr_factor(recipe.schedule, ScheduleShape.of(recipe))
        self._batches = plan.batches(state.batches)
        self._upcoming = self._take_batches(state.step)
        self._prefetcher = Prefetcher(partial(fetch_batch, plan, host), plan.prefetch)
        self._step: PendingStep | None = None
        # The step whose numbers the host has not read, and the time at which it read the last ones.
        self._pending: PendingStep | None = None
        self._completed = 0.0

    def report_before_start(self) -> None:
        """Warn of an unsuitable learning rate, estimate memory and time, and sample the first previews."""
        recipe, step = self._plan.recipe, self._state.step
        warn_of_rate(self._optimizer.mistaken_rate(recipe.learning_rate), self._plan, self._run, self._host, step)
        report_estimate(self._oom.plan, self._run, self._host, self._updater, self._state)
        self._host.report_phase("training")
        if step == 0 and recipe.preview_every:
            preview(self._plan, self._run, self._host, step)

    def begin_step(self) -> None:
        """Take the batches of the next step, one per gradient accumulation, and set its learning rates."""
        started = time.perf_counter()
        lr_scale, learning_rate = self._set_learning_rates(self._upcoming.step)
        self._step = PendingStep(self._next_window(), lr_scale, learning_rate, started)

    def _set_learning_rates(self, step: int) -> tuple[float, float]:
        """Set the rates of step `step` (from 0). Return the schedule's factor, and the effective rate for the log.

        Freeze the groups that have reached their last step, to save their backward. A frozen group stays frozen even if
        a resumed run has more steps, and so a later end for the group: the other trainables have adapted to it since.
        """
        plan, state = self._plan, self._state
        scale = self._lr_factor(step)
        for param_group, group in zip(self._updater.optimizer.param_groups, plan.all_groups(), strict=True):
            param_group["lr"] = group.learning_rate * scale
            if group.until is not None:
                was_over = set(group.names) <= set(state.frozen)
                is_over = step >= group.until or was_over
                if is_over and not was_over:
                    # The step before still trained this group.
                    self.complete_step()
                for name in group.names:
                    plan.trainables[name].requires_grad_(not is_over)
                if is_over:
                    state.frozen = sorted({*state.frozen, *group.names})
        return scale, self._optimizer.effective_rate(self._updater.optimizer, plan.recipe.learning_rate * scale)

    def _next_window(self) -> Window:
        """Return the upcoming batches. Prefetch those of the step after them."""
        window = self._upcoming
        self._upcoming = self._take_batches(window.step + 1)
        rows = (*window.rows, *self._upcoming.rows)
        self._prefetcher.set_upcoming([batch for batch in rows if batch.members])
        return window

    def _take_batches(self, step: int) -> Window:
        count = self._plan.recipe.accumulation if step < self._plan.recipe.steps else 0
        return Window.of(step, list(itertools.islice(self._batches, count)), self._host.group)

    def forward_backward(self) -> None:
        """Compute the losses and gradients of the step, and sum them over the processes.

        After an out-of-memory error the fallback repeats the step with less memory. The sum comes before any process
        updates: if one fails, none of them takes the step.
        """
        updater, window = self._updater, self._step.window
        updater.begin(window.step, self._loss_limit())
        losses = self._oom.run(
            accumulate_gradients,
            self._discard_gradients,
            window.step + 1,
            self._host,
            window,
            updater,
            self._prefetcher.get,
        )
        updater.sum_gradients()
        self._step.losses = losses.over_group(self._host.group)

    def _loss_limit(self) -> float:
        return loss_limit(self._state.losses, self._plan.recipe.loss_spike_factor)

    def _discard_gradients(self) -> None:
        # The fallbacks report events of this step: those of the step before come first.
        self.complete_step()
        self._updater.discard_gradients()

    def update(self) -> None:
        """Clip the gradient and update the parameters and their moving average, unless the loss spikes.

        The step is pending until `complete_step`. If the device masks updates, nothing waits for its numbers here.

        Raises:
            NumbersError: the loss or the gradient is not finite.
        """
        step, updater = self._step, self._updater
        with updater.small_work(self._host.denoiser.device):
            step.numbers = updater.clip_gradients(step.losses, self._loss_limit())
            skip = step.numbers.skip
            if skip is None and step.checked().is_spike:
                updater.skip()
            else:
                updater.step(skip)
                self._plan.renormalize(step.lr_scale if skip is None else step.lr_scale * (1 - skip))
                if self._average is not None:
                    self._average.step(self._parameters, skip)
        self._pending = step

    def must_complete(self, step: int) -> bool:
        """Report whether a step cannot be pending during the next one, because something follows it or it is read."""
        recipe = self._plan.recipe
        previews = bool(recipe.preview_prompts) and _is_due(step, recipe.preview_every, recipe.steps)
        saves = _is_due(step, recipe.save_every, recipe.steps)
        return not self._updater.masks or previews or saves or self._must_validate(step)

    def _must_validate(self, step: int) -> bool:
        recipe = self._plan.recipe
        return bool(self._plan.validation) and _is_due(step, recipe.validate_every, recipe.steps)

    def complete_step(self) -> None:
        """Read the numbers of the pending step, and log and report them. Do nothing if no step is pending.

        Raises:
            NumbersError: the loss or the gradient is not finite. The device has skipped the update.
        """
        step = self._pending
        if step is None:
            return
        numbers = step.numbers.read()
        # Not earlier: after an interrupt of the read, `save_after_error` reads again.
        self._pending = None
        if self._updater.masks and self._average is not None and (numbers.is_spike or numbers.is_refused):
            self._average.uncount()
        if numbers.is_refused:
            # The device has masked the update, so the weights belong to the step before.
            self._updater.done()
        step.checked()
        self._advance(step, numbers)
        event = self._step_event(step, numbers)
        self._run.log(event)
        if numbers.is_spike:
            report_spike(self._run, self._host, event["step"], event["loss"], step.numbers.limit, step.losses.names)
        # Validate before `host.report`, which may interrupt: a resumed run would not validate this step again.
        self._validate()
        if _is_due(event["step"], _PICTURES_EVERY, event["steps"]) and self._plan.recipe.learns_pictures:
            report_pictures(self._run, self._host, self._state)
        self._host.report("step", event)

    def _advance(self, step: PendingStep, numbers: StepNumbers) -> None:
        state = self._state
        state.step += 1
        state.batches += len(step.window.batches)
        state.losses.append(numbers.loss)
        pictures = self._plan.picture_names(step.window)
        state.loss_by_picture.add(pictures, step.losses.t, numbers.native, state.loss_by_timestep)
        state.loss_by_timestep.add(state.step, step.losses.t, numbers.native)
        self._updater.done()

    def _step_event(self, step: PendingStep, numbers: StepNumbers) -> dict[str, Any]:
        now, before = time.perf_counter(), self._completed
        self._completed = now
        return {
            "event": "step",
            "step": self._state.step,
            "steps": self._plan.recipe.steps,
            "epoch": step.window.epoch,
            "loss": numbers.loss,
            "lr": step.learning_rate,
            "grad_norm": 0.0 if numbers.is_spike else numbers.norm,
            # A pending step ends when the device has computed it, and begins where the step before ended.
            "seconds": now - max(step.started, before),
            **accuracy_of(self._plan, numbers.native),
        }

    def _validate(self) -> None:
        """Measure the validation loss if it is due. If the recipe asks for it, keep the files of the lowest."""
        group, state = self._host.group, self._state
        if not self._must_validate(state.step):
            return
        with averaged(self._average, self._parameters), group.main_process_only() as is_main:
            if is_main:
                losses = self._oom.run(_validation_losses, group.reset_after_failure, state.step, self._host)
        events = []
        if group.is_main:
            loss, accuracy = float(losses.mean()), accuracy_of(self._plan, losses.flatten().tolist())
            state.validation.append((state.step, loss))
            events.append({"event": "validation", "step": state.step, "loss": loss, **accuracy})
            self._run.log(events[0])
        if self._plan.recipe.keep_best == "on":
            events += filter(None, [self._checkpointer.save_best(state)])
        for event in events:
            self._host.report(event["event"], event)

    def has_learned_enough(self, step: int) -> bool:
        """Report whether the run ends after this step because its validation loss has stopped falling."""
        recipe, state = self._plan.recipe, self._state
        return recipe.stop_when == STOPS_FALLING and has_stopped_falling(state.validation, step, recipe.patience)

    def preview(self, step: int) -> None:
        """Sample previews after a step if they are due."""
        recipe = self._plan.recipe
        if _is_due(step, recipe.preview_every, recipe.steps):
            with averaged(self._average, self._parameters):
                preview(self._plan, self._run, self._host, step)

    def save_if_due(self, step: int, command: Command | None) -> None:
        """Save every `save_every` steps, or when the user asks for it. `finish` saves the last step."""
        recipe = self._plan.recipe
        if (step % recipe.save_every == 0 or command is Command.SAVE) and step < recipe.steps:
            self._checkpointer.save(self._state)

    def finish(self) -> None:
        """Save the last step, and tell the host if the user stopped the run."""
        run, host, state, steps = self._run, self._host, self._state, self._plan.recipe.steps
        if self._checkpointer.saved_step != state.step or not run.states():
            self._checkpointer.save(state)
        if state.step < steps:
            run.note_halt(STOPPED, state.step, steps)
            if self.has_learned_enough(state.step):
                report_early_stop(run, host, state)
            host.report("stopped", {"step": state.step, "steps": steps})
        # Wait until the main process has written its files.
        host.group.all_reduce()

    def save_after_error(self) -> None:
        """Save what was trained, unless the last save has it already. Only log errors: the user sees the first one."""
        try:
            self.complete_step()
        except BaseException:
            log.exception("Graft: cannot complete the last step after an error.")
        self._checkpointer.save_after_error(self._state, self.has_learned_enough(self._state.step))

    def close(self) -> None:
        """End the prefetching thread, and remove the gradient hooks."""
        self._prefetcher.close()
        self._updater.close()


def _next_command(host: Host, ends: bool) -> Command | None:
    """Return the user's command, which the main process receives and shares with all processes.

    Args:
        ends: the main process stops the run, whatever the user asks for.
    """
    kinds = [None, *Command]
    command = (Command.STOP if ends else host.next_command()) if host.group.is_main else None
    return kinds[round(host.group.all_reduce(kinds.index(command)))]


def _validation_losses(plan: Plan, host: Host) -> torch.Tensor:
    return fixed_losses(plan.validation, plan.recipe, host, sample_losses(plan))


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
