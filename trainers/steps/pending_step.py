"""A step whose loss and gradient norm the host reads while the device computes the next one."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import NumbersError
from ..memory.transfer import HostCopy

if TYPE_CHECKING:
    from ..protocols import Group
    from .plan import Window


@dataclass(frozen=True)
class StepLosses:
    """Losses of one optimizer step.

    Attributes:
        names: of all samples in the window.
        t: timestep of each of this process's samples; after `over_group`, of all samples.
        sums: [passes], sum over the samples of a pass, each times its factor.
        native: native loss of each sample of `t`.
        divisor: the mean over all samples is the total of `sums` over this number.
    """

    names: list[str]
    t: list[float]
    sums: torch.Tensor
    native: torch.Tensor
    divisor: int

    @property
    def mean(self) -> float:
        """Read the mean over all samples; before `over_group`, this process's part of it."""
        return self.mean_of(self.sums.tolist())

    def mean_of(self, sums: list[float]) -> float:
        """Return the mean from the numbers of `sums`."""
        return sum(sums) / self.divisor

    def on_host(self) -> StepLosses:
        """Return the losses on the host, read at once."""
        values = torch.cat([self.sums, self.native]).cpu()
        sums, native = values.split([len(self.sums), len(self.native)])
        return replace(self, sums=sums, native=native)

    def over_group(self, group: Group) -> StepLosses:
        """Return the losses of all processes, summed."""
        if group.world_size == 1:
            return self
        mean = group.all_reduce(self.mean)
        t, native = (group.gather(values, self.divisor) for values in (self.t, self.native.tolist()))
        sums, native = (torch.tensor(values, dtype=torch.float64) for values in ([mean], native))
        return StepLosses(self.names, t, sums, native, 1)


@dataclass(frozen=True)
class StepNumbers:
    """Numbers of one optimizer step, on the host.

    Attributes:
        loss: mean over the samples.
        native: native loss of each sample.
        norm: norm of the whole gradient before clipping.
        is_spike: the loss is too high; the step updates nothing.
        is_refused: the loss or the norm is not finite; training must end.
    """

    loss: float
    native: list[float]
    norm: float
    is_spike: bool
    is_refused: bool


class PendingNumbers:
    """Numbers of a step that the host reads when it needs them.

    Attributes:
        limit: a loss above it is a spike.
        skip: 1.0 on the device for a step that must not update anything, else 0.0; None if the host decides.
    """

    def __init__(self, losses: StepLosses, norms: torch.Tensor, limit: float, masked: bool, allow_inf: bool):
        self.limit = limit
        self._losses, self._allow_inf = losses, allow_inf
        self._read: StepNumbers | None = None
        self.skip: torch.Tensor | None = None
        norms = norms.to(losses.sums.device)
        values = [losses.sums, losses.native, norms]
        if masked:
            mean = losses.sums.sum() / losses.divisor
            is_finite = mean.isfinite()
            is_spike = is_finite & (mean > limit)
            is_refused = ~is_spike & ~(is_finite if allow_inf else is_finite & norms.isfinite().all())
            self.skip = (is_spike | is_refused).to(norms.dtype)
            values.append(torch.stack([is_spike, is_refused]).to(norms.dtype))
        self._copy = HostCopy(torch.cat(values), masked)

    def read(self) -> StepNumbers:
        """Return the numbers. At the first call, the host waits until the device has computed them."""
        if self._read is None:
            self._read = self._split()
        return self._read

    def _split(self) -> StepNumbers:
        values = iter(self._copy.read())
        loss, native = (list(itertools.islice(values, len(part))) for part in (self._losses.sums, self._losses.native))
        loss = self._losses.mean_of(loss)
        if self.skip is not None:
            *norms, is_spike, is_refused = values
            return StepNumbers(loss, native, _norm_of(norms), bool(is_spike), bool(is_refused))
        norm = _norm_of(list(values))
        is_spike = self.limit < loss < math.inf
        is_finite = math.isfinite(loss) and (math.isfinite(norm) or self._allow_inf)
        return StepNumbers(loss, native, norm, is_spike, not is_spike and not is_finite)


@dataclass
class PendingStep:
    """A step on its way through the device.

    Attributes:
        window: its batches.
        lr_scale: the schedule's factor on the learning rates.
        learning_rate: the effective learning rate, for the log.
        started: time of its start.
        losses: set after the backward.
        numbers: set after the update.
    """

    window: Window
    lr_scale: float
    learning_rate: float
    started: float
    losses: StepLosses | None = None
    numbers: PendingNumbers | None = None

    def checked(self) -> StepNumbers:
        """Return the numbers.

        Raises:
            NumbersError: they are not finite. The error names the pictures of the batch.
        """
        numbers = self.numbers.read()
        if not numbers.is_refused:
            return numbers
        what = "gradient" if math.isfinite(numbers.loss) else "loss"
        pictures = ", ".join(sorted(set(self.losses.names)))
        raise NumbersError(
            f"The {what} of step {self.window.step + 1} is not finite (pictures: {pictures}).",
            "Graft discarded that step. Lower learning_rate, compute in fp32 or bf16 (Graft Memory Options), or remove "
            "those pictures.",
            "learning_rate",
        )


def _norm_of(norms: list[float]) -> float:
    return norms[0] if len(norms) == 1 else float(torch.tensor(norms, dtype=torch.float64).norm())
