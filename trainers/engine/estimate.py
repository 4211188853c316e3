"""Estimate of a run's memory and time per step, measured by a few passes before step 1.

A pass is a forward and a backward, with one and with two pictures of the largest size. The two peaks give the fixed
memory and the memory per picture. The optimizer's state, peak and time are measured on copies of the trainables. The
measurement does not change the run, to the bit.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import statistics
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import GraftError, in_one_line, is_out_of_memory
from ..memory.autograd import blocks_of
from ..memory.checkpointing import checkpointed, is_checkpointed, keeps_attention
from ..memory.offload import is_offloaded, list_frozen
from ..memory.quantization import saved_by_nf4
from ..memory.tracking import DevicePeakMemory, bytes_of
from ..methods import METHODS
from ..methods.dropout import dropping_out
from ..optimizers import OPTIMIZERS
from ..optimizers.per_parameter import PerParameterOptimizer
from ..recipe.options import ALL_BUT_ATTENTION, EVERYTHING, NF4
from ..steps.step import loss_terms, micro_batches
from .oom_fallback import placed_trees, trees_of

if TYPE_CHECKING:
    from torch import nn

    from ..preprocessing.prefetch import Batch
    from ..protocols import Host
    from ..steps.plan import Plan
    from .updater import ParameterUpdater

log = logging.getLogger(__name__)

# For fewer steps, an estimate is not worth its time.
_LEAST_STEPS = 50
# Number of batches to search for the largest pictures.
_MOST_BATCHES = 256
# Time a pass at most _TRIES times, and stop after _LONG seconds.
_TRIES = 3
_LONG = 1.0
# Bytes of trainables to copy for measuring the optimizer.
_SCRATCH = 64 * 1024 * 1024


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a run's steps.

    Attributes:
        memory: peak bytes on the device: weights, trainables, optimizer state, activations; None if memory ran out
            during the measurement.
        missing: bytes of `memory` that are not allocated yet; None as for `memory`.
        free: free bytes on the device; None if the device does not report them.
        seconds: seconds per step; None if a step does not fit.
        cures: settings of Graft Memory Options that together make a step fit; empty if it fits, or if none would help.
    """

    memory: int | None
    missing: int | None
    free: int | None
    seconds: float | None
    cures: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Report whether the memory suffices, as far as is known."""
        return self.missing is not None and (self.free is None or self.missing <= self.free)


def estimate(plan: Plan, host: Host, updater: ParameterUpdater, position: int, steps: int) -> Estimate | None:
    """Estimate memory and time of the remaining steps.

    Args:
        position: number of batches that were trained on before.
        steps: number of remaining steps.

    Returns:
        The estimate; None for few steps, for several processes, or if the measurement fails.
    """
    if steps < _LEAST_STEPS or host.group.world_size > 1:
        return None
    host.report_phase("measuring")
    # Measure with upcoming batches, so that no other captions are encoded.
    coming = min(_MOST_BATCHES, steps * plan.recipe.accumulation)
    batches = [batch for _, batch in itertools.islice(plan.batches(position), coming)]
    try:
        return _Dry(plan, host, updater, batches).estimate()
    except (RuntimeError, MemoryError, TypeError, GraftError) as error:
        # If something is wrong, the steps raise a better error.
        log.warning("Graft: cannot measure the memory and the time of a step: %s", in_one_line(error))
        return None


def say(result: Estimate, steps: int) -> str:
    """Describe an estimate in one sentence for the log."""
    if result.memory is None:
        parts = ["a step needs more memory than the device has"]
    else:
        parts = [f"a step needs about {result.memory / 1e9:.2f} GB on the device"]
    if result.seconds is not None:
        parts.append(f"{result.seconds:.2f} s, all {steps} about {_in_minutes(result.seconds * steps)}")
    if result.missing is not None and not result.fits:
        parts.append(f"it needs {result.missing / 1e9:.2f} GB more than now, and {result.free / 1e9:.2f} GB are free")
    if not result.fits:
        parts.append(f"it would fit with {' and '.join(result.cures)}" if result.cures else "no known option helps")
    return "; ".join(parts)


def _in_minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


@dataclass(frozen=True)
class _Moves:
    """Cost of an optimizer step: bytes of optimizer state, temporary bytes during the step, seconds."""

    kept: int
    passing: int
    seconds: float


class _Dry:
    """The trial passes of one estimate."""

    def __init__(self, plan: Plan, host: Host, updater: ParameterUpdater, batches: list[Batch]):
        self._plan = plan
        self._host = host
        self._mover = updater
        self._trained = list(plan.trainables.values())
        self._device = host.denoiser.device
        self._trees = trees_of(plan, host)
        recipe = plan.recipe
        most = recipe.micro_batch or recipe.batch_size
        self._batch = _largest(plan, batches, most)
        self._size = len(self._batch)
        self._several = recipe.accumulation > 1 or any(len(batch) > most for batch in batches)
        self._pictures = recipe.accumulation * sum(len(batch) for batch in batches) / len(batches)
        trained = [torch.empty_like(weight, dtype=_full(weight.dtype), device="meta") for weight in self._trained]
        self._average = sum(weight.nbytes for weight in trained) if recipe.ema_decay else 0
        self._moves = self._measure_moves()
        self._account = DevicePeakMemory(self._device)

    def estimate(self) -> Estimate:
        free = self._host.denoiser.free_memory()
        there = bytes_of(self._held()) + bytes_of(self._mover.tensors()) + self._average
        single, more = self._line()
        memory = self._whole(single, more, self._size)
        room = math.inf if free is None else free
        if math.isinf(memory):
            return Estimate(None, None, free, None, self._cures(there + room, single, more))
        if memory - there > room:
            return Estimate(int(memory), int(memory) - there, free, None, self._cures(there + room, single, more))
        seconds, measured = self._try()
        if measured:
            memory = self._whole(max(measured, single), 0, 1)
        return Estimate(int(memory), int(memory) - there, free, seconds)

    def _held(self) -> list[torch.Tensor]:
        weights = [tensor for tree in self._trees for tensor in (*tree.parameters(), *tree.buffers())]
        return [weight for weight in weights if not is_offloaded(weight) and weight.device.type == self._device.type]

    def _whole(self, single: float, more: float, size: int) -> float:
        """Return the peak bytes of a step.

        Args:
            single: peak bytes of a pass with one picture.
            more: bytes that each further picture adds.
            size: number of pictures in a pass.
        """
        trained = bytes_of(self._trained)
        a_pass = single if size == 1 else single + (size - 1) * more
        if self._mover.in_backward:
            # The optimizer steps while activations are still in memory.
            most = a_pass + self._moves.passing
        else:
            most = max(a_pass, bytes_of(self._held()) + trained + self._moves.passing)
        return most + self._moves.kept + self._average

    def _line(self) -> tuple[float, float]:
        """Return (peak bytes of a pass with one picture, weights included; bytes that each further picture adds).

        The first is infinite if not even one picture fits.
        """
        single = self._peak(1)
        if self._size == 1 or math.isinf(single):
            return single, 0.0
        return single, self._peak(2) - single

    def _peak(self, size: int) -> float:
        """Return the peak bytes of a pass with `size` pictures, weights included; infinite if it does not fit."""
        self._host.check_interrupt()
        try:
            # If gradients accumulate, run a second pass: it starts with the gradients of the first in memory.
            work = functools.partial(self._passes, size, 1 + self._several)
            return self._account.peak_of(work, self._held(), self._away())
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._host.denoiser.make_room()
        return math.inf

    def _away(self) -> list[torch.Tensor]:
        return [weight for tree in self._trees for weight in tree.parameters() if is_offloaded(weight)]

    def _try(self) -> tuple[float, int]:
        """Time the plan as it is. Return (seconds per step, peak bytes of a pass).

        The peak is 0 if the device does not report it: tracking the tensors instead would distort the time.
        """
        work = functools.partial(self._passes, self._size, 1)
        took: list[float] = []
        most = 0
        if self._plan.recipe.compile == "on":
            # The first pass compiles.
            work()
        while len(took) < _TRIES and sum(took) < _LONG:
            self._host.check_interrupt()
            _wait(self._device)
            began = time.perf_counter()
            most = max(most, self._account.peak_of(work, self._held(), self._away(), False))
            _wait(self._device)
            took.append(time.perf_counter() - began)
        a_pass = statistics.median(took) / self._size
        seconds = a_pass * self._pictures * self._usual_share() + self._moves.seconds
        waiting = bytes_of(self._trained) if self._several else 0
        return seconds, most and most + waiting

    def _usual_share(self) -> float:
        """Return the mean area of the dataset's pictures, divided by the area of the measured ones."""
        areas = [(item.volume, item.repeats) for item in self._plan.train]
        usual = sum(area * repeats for area, repeats in areas) / sum(repeats for _, repeats in areas)
        return usual / self._plan.train[self._batch[0][0]].volume

    def _passes(self, size: int, times: int) -> None:
        plan, host = self._plan, self._host
        samples = plan.samples(self._batch[:size])
        recipe = replace(plan.recipe, micro_batch=0)
        try:
            with (
                torch.random.fork_rng(devices=[]),
                dropping_out(self._trees, self._device, recipe, 0),
                self._mover.updates_disabled(),
            ):
                for _ in range(times):
                    for batch in micro_batches(samples, recipe, host):
                        with closing(loss_terms(plan, host, batch)) as terms:
                            for losses in terms:
                                if losses.requires_grad:
                                    losses.sum().backward()
        finally:
            for parameter in plan.trainables.values():
                parameter.grad = None

    def _measure_moves(self) -> _Moves:
        """Measure an optimizer step on copies of some trainables, and scale the result to all of them."""
        parameters = self._trained
        recipe = self._plan.recipe
        apart = isinstance(self._mover.optimizer, PerParameterOptimizer)
        chosen = _some_of(parameters, apart)
        share = sum(parameter.numel() for parameter in parameters) / sum(parameter.numel() for parameter in chosen)
        # Copy the values too: some optimizers keep less state for zeros.
        copies = [torch.nn.Parameter(parameter.detach().to(_full(parameter.dtype), copy=True)) for parameter in chosen]
        group = {"params": copies, "lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        optimizer = OPTIMIZERS[recipe.optimizer].make([group], recipe)
        work = _Move(optimizer, copies)
        # The first step creates the optimizer state.
        work()
        kept = bytes_of(_tensors_in(optimizer.state.values()))
        held = [*copies, *(copy.grad for copy in copies), *_tensors_in(optimizer.state.values())]
        with self._mover.small_work(self._device):
            passing = DevicePeakMemory(self._device).peak_of(work, held) - bytes_of(held)
            _wait(self._device)
            began = time.perf_counter()
            work()
            _wait(self._device)
        seconds = time.perf_counter() - began
        return _Moves(int(kept * share), int(passing if apart else passing * share), seconds * share)

    def _cures(self, there_is: float, single: float, more: float) -> tuple[str, ...]:
        """Find settings with which a step fits into `there_is` bytes, cheapest in time first."""
        cures = []
        size = self._size
        blocks = [block for tree in self._trees for block in blocks_of(tree)]
        for keep, cures in self._ways_to_forget(blocks):
            with checkpointed(blocks, keep):
                single, more = self._line()
            if self._fits(single, more, size, there_is):
                return tuple(cures)
        if size > 1 and not self._several:
            # With micro-batches, the gradients of the first stay in memory while the others are computed.
            single += bytes_of(self._trained)
        while size > 1 and not self._mover.in_backward:
            size //= 2
            if self._fits(single, more, size, there_is):
                return (*cures, f"micro_batch {size}")
        if size < self._size:
            cures.append(f"micro_batch {size}")
        # Offloading keeps two blocks on the device: the running block, and the next block during its transfer.
        frozen = {id(weight) for weight in list_frozen(placed_trees(self._plan, self._host), self._trained)}
        sizes = [bytes_of(weight for weight in block.parameters() if id(weight) in frozen) for block in blocks]
        saved = sum(sizes) - 2 * max(sizes, default=0)
        if saved > 0 and self._fits(single, more, size, there_is + saved):
            return (*cures, "offload")
        # Only a frozen denoiser is quantized.
        own = () if METHODS[self._plan.recipe.method].in_backward else set(blocks_of(self._trees[0]))
        quantized = [saved_by_nf4(block, frozen if block in own else ()) for block in blocks]
        rest = [before - less for before, (less, _) in zip(sizes, quantized, strict=True)]
        saved = sum(sizes) - 2 * max(rest, default=0) - max((largest for _, largest in quantized), default=0)
        if any(less > 0 for less, _ in quantized) and self._fits(single, more, size, there_is + saved):
            return (*cures, "offload", f"base_dtype {NF4}")
        return ()

    def _ways_to_forget(self, blocks: list[nn.Module]) -> list[tuple[bool, list[str]]]:
        """List stronger checkpointing settings than the current ones, weakest first.

        Each is (whether attention outputs are kept, the options that select it).
        """
        plainly = all(is_checkpointed(block) for block in blocks)
        kept = any(keeps_attention(block) for block in blocks)
        ways = [] if plainly else [(True, ALL_BUT_ATTENTION)]
        ways += [(False, EVERYTHING)] if kept or not plainly else []
        return [
            (keep, ["checkpointing"] * (not plainly) + [f"recompute {name}"] * (name != self._plan.recipe.recompute))
            for keep, name in ways
        ]

    def _fits(self, single: float, more: float, size: int, there_is: float) -> bool:
        memory = self._whole(single, more, size)
        # If free memory is unknown, `there_is` is infinite: it fits if the trial pass has run.
        return math.isfinite(memory) and memory <= there_is


class _Move:
    """An optimizer step with non-zero gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]):
        self._optimizer = optimizer
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)

    def __call__(self) -> None:
        self._optimizer.step()


def _largest(plan: Plan, batches: list[Batch], size: int) -> Batch:
    """Return up to `size` members of the batch with the largest pictures; among equals, of a full batch."""
    largest = max(batches, key=lambda batch: (plan.train[batch[0][0]].volume, min(len(batch), size)))
    return largest[:size]


def _some_of(parameters: list[nn.Parameter], apart: bool) -> list[nn.Parameter]:
    """Choose trainables to measure: the largest if each is updated alone, else the first ones up to _SCRATCH bytes."""
    if apart:
        return [max(parameters, key=lambda parameter: parameter.numel())]
    chosen = []
    size = 0
    for parameter in parameters:
        if chosen and size + parameter.nbytes > _SCRATCH:
            break
        chosen.append(parameter)
        size += parameter.nbytes
    return chosen


def _full(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tensors_in(slots: Iterable[dict]) -> list[torch.Tensor]:
    return [value for slot in slots for value in slot.values() if torch.is_tensor(value)]


def _wait(device: torch.device) -> None:
    synchronize = getattr(getattr(torch, device.type, None), "synchronize", None)
    if synchronize is not None:
        synchronize()
