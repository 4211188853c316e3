"""Losses of pairs of a better and a worse picture, against the frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..memory.transfer import upload
from ..objective.losses import example_losses, implicit_accuracy, noise_error_weights, preference_losses
from ..objective.targets import parameterization
from .predict import factors_of, predict, weights_of

if TYPE_CHECKING:
    from ..protocols import Host
    from .plan import Plan
    from .predict import MicroBatch, Watch


def pair_losses(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> torch.Tensor:
    """Return the loss of each pair, [B] float32, with its graph through the trained predictions.

    Both pictures of a pair get the same noise at the same level.

    Args:
        watch: called with the micro-batch's sigma as it is, and the losses without factors.
    """
    denoiser, samples = host.denoiser, [*batch.samples, *batch.samples]
    worse = torch.cat([sample.paired for sample in batch.samples])
    added = batch.noise if batch.custom is None else batch.custom.added
    doubled = (batch.x0, worse), *((values, values) for values in (batch.noise, added, batch.sigma))
    x0, noise, added, sigma = (upload(torch.cat(rows), denoiser.device) for rows in doubled)
    x_t = denoiser.add_noise(x0, added, sigma)
    kind = parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)
    target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    weights = weights_of(samples, x0)
    # Encode the prompts with and without the trainables: the text encoder may be trained too.
    with torch.no_grad(), plan.switched_off():
        base_errors = example_losses(predict(host, x_t, sigma, samples), target, weights)
    errors = example_losses(predict(host, x_t, sigma, samples), target, weights)
    levels = sigma[: len(batch.samples)] / denoiser.sigma_data
    losses = preference_losses(
        errors.view(2, -1),
        base_errors.view(2, -1),
        noise_error_weights(denoiser.parameterization, levels),
        plan.recipe.preference_beta,
    )
    if watch is not None:
        watch((batch.sigma, losses.detach()))
    return losses * factors_of(batch.samples, x0)


def accuracy_of(plan: Plan, losses: Sequence[float]) -> dict[str, float]:
    """Return the implicit accuracy of pairs for an event; empty if the plan trains no preference, or without pairs."""
    return {"accuracy": implicit_accuracy(losses)} if plan.recipe.preference_beta and losses else {}
