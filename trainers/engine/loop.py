"""The training loop. Read `train` from top to bottom."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..distributed.group import report_idle
from ..errors import NumbersError
from ..methods.dropout import dropping_out
from ..optimizers import OPTIMIZERS, lr_factor
from ..optimizers.ema import MovingAverage, averaged
from ..preprocessing.prefetch import Prefetcher
from ..protocols import Command
from ..runs.checkpoint import State
from ..runs.loss_by_timestep import times_of
from ..runs.run import STOPPED, Run
from .checkpointer import Checkpointer
from .estimate import estimate, say
from .oom_fallback import OOMFallback, trees_of
from .plan import Plan, Window
from .preflight import share_inputs
from .previews import preview
from .step import fixed_losses, forward_passes, loss_terms
from .updater import ParameterUpdater, loss_limit

if TYPE_CHECKING:
    from ..preprocessing.items import Sample
    from ..preprocessing.prefetch import Batch
    from ..protocols import Host

log = logging.getLogger(__name__)


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
        while state.step < plan.recipe.steps:
            started = time.perf_counter()
            lr_scale, learning_rate = trainer.set_learning_rates()
            window = trainer.next_window()

            limit = loss_limit(state.losses, plan.recipe.loss_spike_factor)
            losses = trainer.forward_backward(window, limit)
            is_spike = limit < losses.mean < math.inf
            grad_norm = trainer.skip_update() if is_spike else trainer.update(losses, lr_scale)
            trainer.advance(window, losses)

            event = {
                "event": "step",
                "step": state.step,
                "steps": plan.recipe.steps,
                "epoch": window.epoch,
                "loss": losses.mean,
                "lr": learning_rate,
                "grad_norm": grad_norm,
                "seconds": time.perf_counter() - started,
            }
            run.log(event)
            if is_spike:
                _report_spike(run, host, state.step, losses, limit)
            # Validate before `host.report`, which may interrupt: a resumed run would not validate this step again.
            trainer.validate()
            host.report("step", event)
            trainer.preview()

            command = _next_command(host)
            trainer.save_if_due(command)
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


@dataclass(frozen=True)
class StepLosses:
    """Losses of one optimizer step.

    Attributes:
        mean: over all samples of the window, each times its factor. Before the sum over the processes, it is this
            process's part of the sum.
        names: of all samples in the window.
        t, native: timestep and native loss of each of this process's samples; after `gather`, of all samples.
    """

    mean: float
    names: list[str]
    t: list[float]
    native: list[float]


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
            self._average = MovingAverage(recipe.ema_decay)
        self._checkpointer = Checkpointer(plan, run, host, self._updater, self._average)
        report_idle(group, recipe.batch_size * recipe.accumulation)
        group.all_reduce()
        group.broadcast([*self._parameters, *plan.constants.values()])
        self._checkpointer.restore(state)
        share_inputs(plan, host, state.batches)
        self._lr_factor = lr_factor(recipe.schedule, recipe.warmup_steps, recipe.steps, recipe.num_cycles, recipe.power)
        self._batches = plan.batches(state.batches)
        self._upcoming = self._take_batches(state.step)
        self._prefetcher = Prefetcher(plan.samples, plan.prefetch)

    def report_before_start(self) -> None:
        """Warn of an unsuitable learning rate, estimate memory and time, and sample the first previews."""
        recipe, step = self._plan.recipe, self._state.step
        _warn_of_rate(self._optimizer.mistaken_rate(recipe.learning_rate), self._plan, self._run, self._host, step)
        self._estimate()
        self._host.report_phase("training")
        if step == 0 and recipe.preview_every:
            preview(self._plan, self._run, self._host, step)

    def _estimate(self) -> None:
        """Report the memory and time that the remaining steps will take."""
        state = self._state
        steps = self._plan.recipe.steps - state.step
        estimated = estimate(self._oom.plan, self._host, self._updater, state.batches, steps)
        if estimated is None:
            return
        log.log(logging.INFO if estimated.fits else logging.WARNING, "Graft: %s.", say(estimated, steps))
        event = {"event": "estimate", "step": state.step, **asdict(estimated), "fits": estimated.fits}
        self._run.log(event)
        self._host.report("estimate", event)

    def set_learning_rates(self) -> tuple[float, float]:
        """Set the step's learning rates. Return the schedule's factor, and the effective rate for the log.

        Freeze the groups that have reached their last step, to save their backward. A frozen group stays frozen even if
        a resumed run has more steps, and so a later end for the group: the other trainables have adapted to it since.
        """
        plan, state = self._plan, self._state
        scale = self._lr_factor(state.step)
        for param_group, group in zip(self._updater.optimizer.param_groups, plan.all_groups(), strict=True):
            param_group["lr"] = group.learning_rate * scale
            if group.until is not None:
                is_over = state.step >= group.until or set(group.names) <= set(state.frozen)
                for name in group.names:
                    plan.trainables[name].requires_grad_(not is_over)
                if is_over:
                    state.frozen = sorted({*state.frozen, *group.names})
        return scale, self._optimizer.effective_rate(self._updater.optimizer, plan.recipe.learning_rate * scale)

    def next_window(self) -> Window:
        """Take the batches of this step, one per gradient accumulation. Prefetch those of the next step."""
        window = self._upcoming
        self._upcoming = self._take_batches(window.step + 1)
        rows = (*window.rows, *self._upcoming.rows)
        self._prefetcher.set_upcoming([members for _, members in rows if members])
        return window

    def _take_batches(self, step: int) -> Window:
        count = self._plan.recipe.accumulation if step < self._plan.recipe.steps else 0
        return Window.of(step, list(itertools.islice(self._batches, count)), self._host.group)

    def forward_backward(self, window: Window, limit: float) -> StepLosses:
        """Compute the losses and gradients of a window, and sum them over the processes.

        After an out-of-memory error the fallback repeats the step with less memory. The sum comes before any process
        updates: if one fails, none of them takes the step.
        """
        group, updater = self._host.group, self._updater
        updater.begin(window.step, limit)
        losses = self._oom.run(
            accumulate_gradients,
            updater.discard_gradients,
            window.step + 1,
            self._host,
            window,
            updater,
            self._prefetcher.get,
        )
        losses = replace(
            losses,
            mean=group.all_reduce(losses.mean),
            t=group.gather(losses.t, window.size),
            native=group.gather(losses.native, window.size),
        )
        group.all_reduce_gradients(self._parameters)
        return losses

    def skip_update(self) -> float:
        """Discard the gradients of a step whose loss spikes. Return 0, its gradient norm in the log."""
        self._updater.discard_gradients()
        return 0.0

    def update(self, losses: StepLosses, lr_scale: float) -> float:
        """Clip the gradient and update the parameters and their moving average. Return the gradient's norm.

        Raises:
            NumbersError: the loss or the gradient is not finite.
        """
        with self._updater.small_work(self._host.denoiser.device):
            norm = self._updater.norm()
            if self._updater.should_abort(losses.mean, norm):
                raise _not_finite(losses, self._state.step)
            self._updater.step()
            self._plan.renormalize(lr_scale)
            if self._average is not None:
                self._average.step(self._parameters)
        return norm

    def advance(self, window: Window, losses: StepLosses) -> None:
        """Advance the state by a step."""
        state = self._state
        state.step += 1
        state.batches += len(window.batches)
        state.losses.append(losses.mean)
        state.loss_by_timestep.add(state.step, losses.t, losses.native)
        self._updater.done()

    def validate(self) -> None:
        """Measure the validation loss if it is due."""
        recipe, group, state = self._plan.recipe, self._host.group, self._state
        if not self._plan.validation or not _is_due(state.step, recipe.validate_every, recipe.steps):
            return
        with averaged(self._average, self._parameters), group.main_process_only() as is_main:
            if is_main:
                self._oom.run(_validate, group.reset_after_failure, state.step, self._run, self._host, state)

    def preview(self) -> None:
        """Sample previews if they are due."""
        recipe, step = self._plan.recipe, self._state.step
        if _is_due(step, recipe.preview_every, recipe.steps):
            with averaged(self._average, self._parameters):
                preview(self._plan, self._run, self._host, step)

    def save_if_due(self, command: Command | None) -> None:
        """Save every `save_every` steps, or when the user asks for it. `finish` saves the last step."""
        recipe, step = self._plan.recipe, self._state.step
        if (step % recipe.save_every == 0 or command is Command.SAVE) and step < recipe.steps:
            self._checkpointer.save(self._state)

    def finish(self) -> None:
        """Save the last step, and tell the host if the user stopped the run."""
        run, host, state, steps = self._run, self._host, self._state, self._plan.recipe.steps
        if self._checkpointer.saved_step != state.step or not run.states():
            self._checkpointer.save(state)
        if state.step < steps:
            run.note_halt(STOPPED, state.step, steps)
            host.report("stopped", {"step": state.step, "steps": steps})
        # Wait until the main process has written its files.
        host.group.all_reduce()

    def save_after_error(self) -> None:
        """Save what was trained, unless the last save has it already."""
        self._checkpointer.save_after_error(self._state)

    def close(self) -> None:
        """End the prefetching thread, and remove the gradient hooks."""
        self._prefetcher.close()
        self._updater.close()


def accumulate_gradients(
    plan: Plan,
    host: Host,
    window: Window,
    updater: ParameterUpdater,
    samples_of: Callable[[Batch], list[Sample]] | None = None,
) -> StepLosses:
    """Run forward and backward over a window. The loss is the mean over all its samples, each times its factor.

    Each process computes its rows of the window. The sum of the gradients over all processes is the whole gradient.

    Args:
        samples_of: returns the samples of a batch; `plan.samples` by default.
    """
    samples_of = samples_of or plan.samples
    names = [plan.train[index].name for _, members in window.batches for index, _ in members]
    sums: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with dropping_out(trees_of(plan, host), host.denoiser.device, plan.recipe, window.step, host.group.rank):
        for batch in forward_passes(plan, host, window, samples_of):
            host.check_interrupt()
            for losses in loss_terms(plan, host, batch, watch=None if batch.is_padding else seen.append):
                # If only an embedding is trained, a caption without it (a dropped one) has no gradient.
                if losses.requires_grad:
                    updater.backward(losses.sum() / window.size)
                sums.append(losses.detach().sum())
    if not seen:
        # This process has no sample: there are more processes than samples.
        return StepLosses(0.0, names, [], [])
    sigmas, native = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # Copy all losses from the device at once: each copy would make the device wait for the next micro-batch.
    values = torch.cat([torch.stack(sums), native]).tolist()
    t = times_of(host.denoiser, sigmas)
    return StepLosses(sum(values[: len(sums)]) / window.size, names, t, values[len(sums) :])


def _next_command(host: Host) -> Command | None:
    """Return the user's command, which the main process receives and shares with all processes."""
    kinds = [None, *Command]
    command = host.next_command() if host.group.is_main else None
    return kinds[round(host.group.all_reduce(kinds.index(command)))]


def _warn_of_rate(warning: str, plan: Plan, run: Run, host: Host, step: int) -> None:
    """Warn in the log, the run and the page about a learning rate that does not suit the optimizer."""
    if not warning or not host.group.is_main:
        return
    log.warning("Graft: %s", warning)
    recipe = plan.recipe
    event = {"event": "rate", "step": step, "optimizer": recipe.optimizer, "learning_rate": recipe.learning_rate}
    run.log(event)
    host.report("rate", event)


def _report_spike(run: Run, host: Host, step: int, losses: StepLosses, limit: float) -> None:
    pictures = sorted(set(losses.names))
    log.warning(
        "Graft: skipped step %d: its loss %.4g is above %.4g (%s).", step, losses.mean, limit, ", ".join(pictures)
    )
    event = {"event": "spike", "step": step, "loss": losses.mean, "highest": limit, "pictures": pictures}
    run.log(event)
    host.report("spike", event)


def _validate(plan: Plan, run: Run, host: Host, state: State) -> None:
    loss = float(fixed_losses(plan.validation, plan.recipe, host).mean())
    state.validation.append((state.step, loss))
    event = {"event": "validation", "step": state.step, "loss": loss}
    run.log(event)
    host.report("validation", event)


def _not_finite(losses: StepLosses, step: int) -> NumbersError:
    what = "gradient" if math.isfinite(losses.mean) else "loss"
    return NumbersError(
        f"The {what} of step {step + 1} is not finite (pictures: {', '.join(sorted(set(losses.names)))}).",
        "Graft discarded that step. Lower learning_rate, compute in fp32 or bf16 (Graft Memory Options), or remove "
        "those pictures.",
        "learning_rate",
    )


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
