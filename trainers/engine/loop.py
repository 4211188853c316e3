"""The training loop. Read it from top to bottom."""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..distributed.group import report_idle, rows_of
from ..errors import GraftError, NumbersError
from ..methods.dropout import dropping_out
from ..optimizers import OPTIMIZERS, Group, lr_factor
from ..optimizers.ema import MovingAverage, averaged
from ..preprocessing.prefetch import Prefetcher
from ..protocols import Command
from ..runs.checkpoint import State
from ..runs.loss_by_timestep import times_of
from ..runs.run import STOPPED, Run
from .estimate import estimate, say
from .oom_fallback import OOMFallback, trees_of
from .previews import preview
from .step import fixed_losses, forward_passes, loss_terms
from .updater import ParameterUpdater

if TYPE_CHECKING:
    from ..preprocessing.items import Sample
    from ..protocols import Host
    from .plan import Plan

log = logging.getLogger(__name__)

# The spike check takes the median of the last _USUAL_LOSSES losses. With fewer than _LEAST_LOSSES it is off.
_USUAL_LOSSES = 100
_LEAST_LOSSES = 20


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
    recipe = plan.recipe
    group = host.group
    parameters = list(plan.trainables.values())
    groups = plan.all_groups()
    updater = ParameterUpdater(plan, host)
    oom_fallback = OOMFallback(plan, run, host, updater.in_backward)
    kind = OPTIMIZERS[recipe.optimizer]
    average = kind.average(updater.optimizer, parameters)
    if recipe.ema_decay:
        average = MovingAverage(recipe.ema_decay)
    report_idle(group, recipe.batch_size * recipe.accumulation)
    group.all_reduce()
    group.broadcast([*parameters, *plan.constants.values()])
    _restore(state, plan, updater, average)
    factor = lr_factor(recipe.schedule, recipe.warmup_steps, recipe.steps, recipe.num_cycles, recipe.power)
    batches = plan.batches(state.batches)
    upcoming = list(itertools.islice(batches, recipe.accumulation))
    next_shares = _shares(host, upcoming)
    prefetcher = Prefetcher(plan.samples, plan.prefetch)
    saved = state.step

    def keep() -> None:
        nonlocal saved
        if not group.is_main:
            saved = state.step
            return
        _capture(state, plan, updater, average)
        path = run.save(state, plan.export(_result(state), state.step), recipe.keep_last)
        saved = state.step
        host.report("saved", {"step": state.step, "path": path})

    try:
        _warn_of_rate(kind.mistaken_rate(recipe.learning_rate), plan, run, host, state)
        _estimate(oom_fallback.plan, run, host, updater, state)
        host.report_phase("training")
        if state.step == 0 and recipe.preview_every:
            preview(plan, run, host, state.step)
        while state.step < recipe.steps:
            # Set the learning rates of this step.
            started = time.perf_counter()
            share = factor(state.step)
            _set_rates(updater.optimizer, groups, plan, share, state)
            rate = kind.effective_rate(updater.optimizer, recipe.learning_rate * share)

            # Take the batches of this step, one per gradient accumulation. Prefetch those of the next step.
            number = state.step + 1
            window, shares = upcoming, next_shares
            upcoming = list(itertools.islice(batches, recipe.accumulation)) if number < recipe.steps else []
            next_shares = _shares(host, upcoming)
            prefetcher.set_upcoming([mine for _, mine in (*shares, *next_shares) if mine])

            # Forward and backward. After an out-of-memory error the fallback repeats the step with less memory.
            highest = _highest_loss(state.losses, recipe.loss_spike_factor)
            updater.begin(state.step, highest)
            loss, names, seen = oom_fallback.run(
                _gradients, updater.discard_gradients, number, host, window, state.step, updater, shares, prefetcher.get
            )

            # Sum over the processes before any of them updates: if one fails, none of them takes the step.
            loss = group.all_reduce(loss)
            seen = [group.gather(values, sum(len(batch) for _, batch in window)) for values in seen]
            group.all_reduce_gradients(parameters)

            # Clip the gradient and update the parameters. Skip the update if the loss spikes.
            with updater.small_work(host.denoiser.device):
                spike = highest < loss < math.inf
                if spike:
                    updater.discard_gradients()
                    norm = 0.0
                else:
                    norm = updater.norm()
                    if updater.should_abort(loss, norm):
                        raise _not_finite(loss, names, state.step)
                    updater.step()
                    plan.renormalize(share)
                    if average is not None:
                        average.step(parameters)

            # Record the step.
            state.step += 1
            state.batches += len(window)
            state.losses.append(loss)
            state.loss_by_timestep.add(state.step, *seen)
            updater.done()
            event = {
                "event": "step",
                "step": state.step,
                "steps": recipe.steps,
                "epoch": window[-1][0],
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "seconds": time.perf_counter() - started,
            }
            run.log(event)
            if spike:
                _tell_spike(run, host, number, loss, highest, names)

            # Validate before `host.report`, which may interrupt: a resumed run would not validate this step again.
            if plan.validation and _due(state.step, recipe.validate_every, recipe.steps):
                with averaged(average, parameters), group.main_process_only() as mine:
                    if mine:
                        oom_fallback.run(_validate, group.reset_after_failure, state.step, run, host, state)
            host.report("step", event)
            if _due(state.step, recipe.preview_every, recipe.steps):
                with averaged(average, parameters):
                    preview(plan, run, host, state.step)

            # Save when due, or when the user asks for it.
            asked = _agreed(host)
            if (state.step % recipe.save_every == 0 or asked is Command.SAVE) and state.step < recipe.steps:
                keep()
            if asked is Command.STOP:
                break

        # Save the last step and tell the host if the user stopped the run.
        if saved != state.step or not run.states():
            keep()
        if state.step < recipe.steps:
            run.note_halt(STOPPED, state.step, recipe.steps)
            host.report("stopped", {"step": state.step, "steps": recipe.steps})
        # Wait until the main process has written its files.
        group.all_reduce()
    except BaseException:
        # Not `Exception`: some ComfyUI versions interrupt with another BaseException.
        # If the step has updated only some of the weights, keep the last save: such weights belong to no step.
        if state.step > saved and not updater.step_in_progress and group.is_main:
            _keep_before_leaving(keep)
        raise
    finally:
        prefetcher.close()
        updater.close()
    return state


def _warn_of_rate(warning: str, plan: Plan, run: Run, host: Host, state: State) -> None:
    """Warn in the log, the run and the page about a learning rate that does not suit the optimizer."""
    if not warning or not host.group.is_main:
        return
    log.warning("Graft: %s", warning)
    recipe = plan.recipe
    event = {"event": "rate", "step": state.step, "optimizer": recipe.optimizer, "learning_rate": recipe.learning_rate}
    run.log(event)
    host.report("rate", event)


def _estimate(plan: Plan, run: Run, host: Host, updater: ParameterUpdater, state: State) -> None:
    """Report the memory and time that the remaining steps will take."""
    steps = plan.recipe.steps - state.step
    found = estimate(plan, host, updater, state.batches, steps)
    if found is None:
        return
    log.log(logging.INFO if found.fits else logging.WARNING, "Graft: %s.", say(found, steps))
    event = {"event": "estimate", "step": state.step, **asdict(found), "fits": found.fits}
    run.log(event)
    host.report("estimate", event)


def _agreed(host: Host) -> Command | None:
    """Return the user's command, which the main process receives and shares with all processes."""
    kinds = [None, *Command]
    asked = host.next_command() if host.group.is_main else None
    return kinds[round(host.group.all_reduce(kinds.index(asked)))]


def _highest_loss(losses: Sequence[float], factor: float) -> float:
    """Return the loss above which a step is skipped: `factor` times the median of the last losses, or infinity."""
    if not factor or len(losses) < _LEAST_LOSSES:
        return math.inf
    return factor * statistics.median(losses[-_USUAL_LOSSES:])


def _tell_spike(run: Run, host: Host, step: int, loss: float, highest: float, names: list[str]) -> None:
    pictures = sorted(set(names))
    log.warning("Graft: skipped step %d: its loss %.4g is above %.4g (%s).", step, loss, highest, ", ".join(pictures))
    event = {"event": "spike", "step": step, "loss": loss, "highest": highest, "pictures": pictures}
    run.log(event)
    host.report("spike", event)


def _set_rates(optimizer, groups: Sequence[Group], plan: Plan, share: float, state: State) -> None:
    """Set the step's learning rates. Freeze the groups that have reached their last step, to save their backward.

    A frozen group stays frozen even if a resumed run has more steps, and so a later end for the group: the other
    trainables have adapted to it since. `share` is the schedule's factor on the learning rates.
    """
    for held, group in zip(optimizer.param_groups, groups, strict=True):
        held["lr"] = group.learning_rate * share
        if group.until is not None:
            over = state.step >= group.until or set(group.names) <= set(state.frozen)
            for name in group.names:
                plan.trainables[name].requires_grad_(not over)
            if over:
                state.frozen = sorted({*state.frozen, *group.names})


def _shares(host: Host, window: list) -> list[tuple[int, list]]:
    """Return this process's part of each batch in the window, as (index of its first member, members)."""
    rows = rows_of([len(batch) for _, batch in window], host.group.rank, host.group.world_size)
    return [(own.start, batch[own]) for (_, batch), own in zip(window, rows, strict=True)]


def _gradients(
    plan: Plan,
    host: Host,
    window: list,
    step: int,
    updater: ParameterUpdater,
    shares: list[tuple[int, list]] | None = None,
    shown: Callable[[list], list[Sample]] | None = None,
) -> tuple[float, list[str], tuple[list[float], list[float]]]:
    """Run forward and backward over a window. The loss is the mean over all its samples, each times its factor.

    Each process computes its part of the window. The sum of the gradients over all processes is the whole gradient.

    Args:
        window: the batches of one optimizer step, each (epoch, members).
        shares: this process's parts of the batches, as `_shares` returns them.
        shown: returns the samples of a batch, as `plan.samples` does.

    Returns:
        The mean loss (with several processes, this process's part of the sum), the names of all samples in the window,
        and (t, native loss) of this process's samples as two lists.
    """
    shown = shown or plan.samples
    shares = shares or _shares(host, window)
    total = sum(len(batch) for _, batch in window)
    sums = []
    names = [plan.train[index].name for _, batch in window for index, _ in batch]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with dropping_out(trees_of(plan, host), host.denoiser.device, plan.recipe, step, host.group.rank):
        for part, counts in forward_passes(plan, host, window, shares, step, shown):
            host.check_interrupt()
            for losses in loss_terms(plan, host, *part, watch=seen.append if counts else None):
                # If only an embedding is trained, a caption without it (a dropped one) has no gradient.
                if losses.requires_grad:
                    updater.backward(losses.sum() / total)
                sums.append(losses.detach().sum())
    if not seen:
        # This process has no sample: there are more processes than samples.
        return 0.0, names, ([], [])
    sigmas, plain = (torch.cat(parts) for parts in zip(*seen, strict=True))
    # Copy all losses from the device at once: each copy would make the device wait for the next micro-batch.
    values = torch.cat([torch.stack(sums), plain]).tolist()
    times = times_of(host.denoiser, sigmas)
    return sum(values[: len(sums)]) / total, names, (times, values[len(sums) :])


def _validate(plan: Plan, run: Run, host: Host, state: State) -> None:
    loss = float(fixed_losses(plan.validation, plan.recipe, host).mean())
    state.validation.append((state.step, loss))
    event = {"event": "validation", "step": state.step, "loss": loss}
    run.log(event)
    host.report("validation", event)


def _not_finite(loss: float, names: list[str], step: int) -> NumbersError:
    what = "gradient" if math.isfinite(loss) else "loss"
    return NumbersError(
        f"The {what} of step {step + 1} is not finite (pictures: {', '.join(sorted(set(names)))}).",
        "Graft discarded that step. Lower learning_rate, compute in fp32 or bf16 (Graft Memory Options), "
        "or remove those pictures.",
        "learning_rate",
    )


def _capture(state: State, plan: Plan, updater: ParameterUpdater, average) -> None:
    """Put the live tensors into the state. They are not copied: full fine-tuning has no memory for a copy."""
    state.trainables = {name: parameter.detach() for name, parameter in plan.trainables.items()}
    state.constants = {name: tensor.detach() for name, tensor in plan.constants.items()}
    state.optimizer, state.groups, state.scaler = updater.state_of()
    state.ema = {}
    if average is not None:
        state.ema = dict(zip(plan.trainables, average.shadow_params, strict=True))
    if plan.recipe.ema_decay:
        state.ema_updates = average.updates


def _restore(state: State, plan: Plan, updater: ParameterUpdater, average) -> None:
    """Load the state into the live tensors and free the state's own. At step 0 only start the moving average.

    Raises:
        GraftError: the state has other trainables than this run, or the state of another optimizer.
    """
    if state.step == 0:
        if plan.recipe.ema_decay:
            average.start(list(plan.trainables.values()))
        return
    if not (_are_alike(state.trainables, plan.trainables) and _are_alike(state.constants, plan.constants)):
        raise GraftError(
            f"The saved state of step {state.step} has other layers than this model.",
            "Start the run over (on_existing in Graft Run Options).",
        )
    with torch.no_grad():
        for name, parameter in plan.trainables.items():
            parameter.copy_(state.trainables.pop(name))
        for name, tensor in plan.constants.items():
            tensor.copy_(state.constants[name])
    try:
        updater.restore(state.optimizer, state.groups, state.scaler)
        state.optimizer = {}
        if plan.recipe.ema_decay:
            averages = [state.ema.pop(name).to(parameter.device) for name, parameter in plan.trainables.items()]
            average.go_on(averages, _ema_updates(state, plan.recipe.loss_spike_factor))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GraftError(
            f"The saved state of step {state.step} does not fit this optimizer ({error!r:.200}).", "Start the run over."
        ) from error


def _ema_updates(state: State, factor: float) -> int:
    """Return the number of updates of the moving average. Recount it for states of earlier versions, which lack it."""
    if state.ema_updates is not None:
        return state.ema_updates
    losses = state.losses
    left_out = (_highest_loss(losses[:place], factor) < loss for place, loss in enumerate(losses))
    return state.step - (sum(left_out) if factor else 0)


def _are_alike(kept: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> bool:
    shapes = [{name: tuple(value.shape) for name, value in values.items()} for values in (kept, live)]
    return shapes[0] == shapes[1]


def _result(state: State) -> dict[str, torch.Tensor]:
    return state.ema or state.trainables


def _keep_before_leaving(keep: Callable[[], None]) -> None:
    """Save before an error ends the run. Log a failure to save, so that the user sees the first error."""
    try:
        keep()
    except Exception:
        log.exception("Graft: cannot save the progress after an error.")


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)
