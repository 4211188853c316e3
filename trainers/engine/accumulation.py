"""Losses and gradients of one optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from ..methods.dropout import dropping_out
from ..runs.loss_by_timestep import times_of
from ..steps.pending_step import StepLosses
from ..steps.step import count_terms, forward_passes, loss_terms
from .oom_fallback import trees_of

if TYPE_CHECKING:
    from ..protocols import Host
    from ..steps.plan import BatchRows, Plan, Window
    from ..steps.predict import MicroBatch
    from .updater import ParameterUpdater


def accumulate_gradients(
    plan: Plan,
    host: Host,
    window: Window,
    updater: ParameterUpdater,
    batch_of: Callable[[BatchRows], MicroBatch],
) -> StepLosses:
    """Run forward and backward over a window. The loss is the mean over all its samples, each times its factor.

    Each process computes its rows of the window. The sum of the gradients over all processes is the whole gradient.
    Unless the device masks the update, the host waits for the losses here, so that errors of the device's queue are
    raised here too.

    Args:
        batch_of: returns what `fetch_batch` does.
    """
    names = [plan.train[index].name for _, members in window.batches for index, _ in members]
    sums: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with dropping_out(trees_of(plan, host), host.denoiser.device, plan.recipe, window.step, host.group.rank):
        for batch in forward_passes(plan, host, window, batch_of):
            host.check_interrupt()
            with closing(loss_terms(plan, host, batch, watch=None if batch.is_padding else seen.append)) as terms:
                left = count_terms(plan, batch)
                for losses in terms:
                    left -= 1
                    # If only an embedding is trained, a caption without it (a dropped one) has no gradient.
                    if losses.requires_grad:
                        updater.backward(losses.sum() / window.size, batch.is_last and not left)
                    sums.append(losses.detach().sum())
    if not seen:
        # This process has no sample: there are more processes than samples.
        return StepLosses(names, [], torch.zeros(0), torch.zeros(0), window.size)
    sigmas, native = (torch.cat(parts) for parts in zip(*seen, strict=True))
    losses = StepLosses(names, times_of(host.denoiser, sigmas), torch.stack(sums), native, window.size)
    return losses if updater.masks else losses.on_host()
