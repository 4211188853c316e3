"""Loss of a batch: add noise, predict, compare with the target. Every gradient passes through this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..memory.transfer import pinned, upload
from ..objective.custom import draw_custom
from ..objective.losses import example_losses, implicit_accuracy, noise_error_weights, preference_losses
from ..objective.noise import draw_noise, draw_sigmas, spread_sigmas
from ..objective.options import NATIVE
from ..objective.targets import parameterization
from ..rng import generator
from .plan import BatchRows
from .predict import MicroBatch, Watch, factors_of, predict, weights_of
from .slider import both_sides, slider_losses

if TYPE_CHECKING:
    from ..preprocessing.items import DatasetItem, Sample
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from .plan import Plan, Window

_VALIDATION_LEVELS = 4
_FIRST_BATCH = BatchRows()


def micro_batches(
    samples: list[Sample], recipe: Recipe, host: Host, rows: BatchRows = _FIRST_BATCH
) -> Iterator[MicroBatch]:
    """Draw the noise of a batch's samples, and split them into micro-batches; see `draw_batch`."""
    return _split(draw_batch(samples, recipe, host, rows), recipe.micro_batch)


def draw_batch(samples: list[Sample], recipe: Recipe, host: Host, rows: BatchRows = _FIRST_BATCH) -> MicroBatch:
    """Return samples with noise and sigmas, which are drawn for the whole batch, so no split changes anything.

    Args:
        samples: the samples of the batch that this process computes.
        rows: their place; by default they are the first batch of the first step.
    """
    latents = torch.cat([sample.latent for sample in samples])
    source = generator("step", recipe.seed, rows.step, rows.number)
    custom = None
    shape = (rows.batch_size or len(samples), *latents.shape[1:])
    own = slice(rows.first, rows.first + len(samples))
    if recipe.objective == NATIVE:
        sigma = draw_sigmas(host.denoiser.sigmas(), shape[0], source)
        noise = draw_noise(shape, source)
    else:
        sigma, noise, custom = draw_custom(recipe.objective, host.denoiser, shape, source, latents, rows.first)
        custom = custom.part(own)
    return MicroBatch(samples, latents, noise[own], sigma[own], custom)


def _split(batch: MicroBatch, size: int) -> Iterator[MicroBatch]:
    """Yield micro-batches of at most `size` samples; the whole batch if it is 0."""
    count = len(batch.samples)
    for start in range(0, count, size or count):
        rows = slice(start, start + (size or count))
        custom = None if batch.custom is None else batch.custom.part(rows)
        tensors = (tensor[rows] for tensor in (batch.x0, batch.noise, batch.sigma))
        yield MicroBatch(batch.samples[rows], *tensors, custom, is_last=rows.stop >= count)


def fetch_batch(plan: Plan, host: Host, rows: BatchRows) -> MicroBatch:
    """Return the samples of some rows, with their noise and sigmas. Any thread may call this."""
    return draw_batch(pin_samples(plan.samples(rows.members), host.denoiser.device), plan.recipe, host, rows)


def forward_passes(
    plan: Plan, host: Host, window: Window, batch_of: Callable[[BatchRows], MicroBatch]
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a window that this process computes.

    With sharded weights, all processes must run the same forward passes. Each micro-batch is then one sample. If any
    dataset item has a prior target, every sample gets one. A process with fewer samples than the others repeats one
    as padding.

    Args:
        batch_of: returns what `fetch_batch` does.
    """
    lockstep = host.group.lockstep
    size = 1 if lockstep else plan.recipe.micro_batch
    fill = _with_prior_targets if lockstep and any(item.has_prior_target for item in plan.train) else list
    counts = [len(rows.members) for rows in window.rows]
    pads = lockstep and sum(counts) < -(-window.size // host.group.world_size)
    for number, rows in enumerate(window.rows):
        if rows.members:
            is_last = not pads and not any(counts[number + 1 :])
            batch = batch_of(rows)
            for part in _split(replace(batch, samples=fill(batch.samples)), size):
                yield replace(part, is_last=part.is_last and is_last)
    if pads:
        # Not `batch_of`: the prefetcher would discard the batch that it has fetched ahead.
        padding = [_without_loss(sample) for sample in plan.samples(window.batches[0][1][:1])]
        yield replace(draw_batch(fill(padding), plan.recipe, host), is_padding=True, is_last=True)


def _without_loss(sample: Sample) -> Sample:
    """Return a sample with loss factor 0, also for its prior target."""
    target = sample.prior_target
    return replace(sample, factor=0.0, prior_target=None if target is None else replace(target, factor=0.0))


def _with_prior_targets(samples: list[Sample]) -> list[Sample]:
    return [
        sample if sample.prior_target is not None else replace(sample, prior_target=replace(sample, factor=0.0))
        for sample in samples
    ]


def loss_terms(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> Iterator[torch.Tensor]:
    """Yield the losses of the samples, then those of their prior targets. Each is [B] float32 with its own graph.

    Run the backward of each before the next one, and close the iterator after an error: a slider changes the scale of
    the adapter between its losses.
    """
    if plan.recipe.slider_strength:
        yield from slider_losses(plan, host, batch, watch)
        return
    base = _base_prediction(plan, host, batch)
    yield sample_losses(plan)(host, batch, watch) if base is None else losses_of(host, batch, watch, base)
    rows = [row for row, sample in enumerate(batch.samples) if sample.prior_target is not None]
    if rows:
        targets = [batch.samples[row].prior_target for row in rows]
        yield prior_losses(plan, host, MicroBatch(targets, batch.x0[rows], batch.noise[rows], batch.sigma[rows]))


def count_terms(plan: Plan, batch: MicroBatch) -> int:
    """Return the number of losses that `loss_terms` yields."""
    sides = 2 if plan.recipe.slider_strength else 1
    return sides * (1 + any(sample.prior_target is not None for sample in batch.samples))


def sample_losses(plan: Plan) -> Callable[..., torch.Tensor]:
    """Return the function for the losses of a micro-batch's samples: `losses_of`, or that of a preference or slider."""
    if plan.recipe.slider_strength:
        return partial(both_sides, plan)
    return partial(pair_losses, plan) if plan.recipe.preference_beta else losses_of


def _base_prediction(plan: Plan, host: Host, batch: MicroBatch) -> torch.Tensor | None:
    if batch.custom is None or not batch.custom.objective.masked_prior_weight:
        return None
    # Also without a mask: with sharded weights, all processes must run the same forward passes.
    _, _, sigma, x_t = _add_noise(host, batch)
    with torch.no_grad(), plan.switched_off():
        return predict(host, x_t, sigma, batch.samples)


def _add_noise(host: Host, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (x0, noise, sigma, noisy latents) on the device."""
    denoiser, custom = host.denoiser, batch.custom
    x0, noise, sigma = (upload(values, denoiser.device) for values in (batch.x0, batch.noise, batch.sigma))
    added = noise if custom is None else upload(custom.added, denoiser.device)
    return x0, noise, sigma, denoiser.add_noise(x0, added, sigma)


def losses_of(
    host: Host, batch: MicroBatch, watch: Watch | None = None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of each sample, [B] float32, with its graph.

    Args:
        watch: called with the micro-batch's sigma as it is, and the native losses.
        base: the frozen base's prediction, which the loss preserves outside masks.
    """
    denoiser, custom = host.denoiser, batch.custom
    x0, noise, sigma, x_t = _add_noise(host, batch)
    kind = parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)
    target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    prediction = predict(host, x_t, sigma, batch.samples)
    weights = weights_of(batch.samples, x0)
    if custom is not None:
        losses = custom.losses(denoiser, prediction, target, sigma, weights)
        if base is not None and weights is not None:
            outside = custom.losses(denoiser, prediction, base, sigma, weights_of(batch.samples, x0, outside=True))
            losses = losses + custom.objective.masked_prior_weight * outside
    else:
        losses = example_losses(prediction, target, weights)
    if watch is not None:
        with torch.no_grad():
            native = losses.detach() if custom is None else example_losses(prediction, target, weights)
        watch((batch.sigma, native))
    return losses * factors_of(batch.samples, x0)


def prior_losses(plan: Plan, host: Host, batch: MicroBatch) -> torch.Tensor:
    """Return the loss between the predictions with and without the trainables for each prior target's prompt.

    [B] float32, with its graph through the prediction with the trainables.
    """
    x0, _, sigma, x_t = _add_noise(host, batch)
    # Encode the prompts with and without the trainables: the text encoder may be trained too.
    with torch.no_grad(), plan.switched_off():
        target = predict(host, x_t, sigma, batch.samples)
    prediction = predict(host, x_t, sigma, batch.samples)
    return example_losses(prediction, target, weights_of(batch.samples, x0)) * factors_of(batch.samples, x0)


def pair_losses(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> torch.Tensor:
    """Return the loss of each pair of pictures against the frozen base, [B] float32, with its graph.

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


def predict_sample(sample: Sample, recipe: Recipe, host: Host) -> torch.Tensor:
    """Return the network's output for a sample at the middle noise level, without gradients."""
    denoiser = host.denoiser
    sigma = spread_sigmas(denoiser.sigmas(), 1)
    noise = draw_noise(sample.latent.shape, generator("validation", recipe.seed, 0))
    with torch.no_grad():
        x0, noise, sigma = (upload(values, denoiser.device) for values in (sample.latent, noise, sigma))
        return predict(host, denoiser.add_noise(x0, noise, sigma), sigma, [sample])


def pin_samples(samples: list[Sample], device: torch.device) -> list[Sample]:
    """Return the samples with their conditionings in pinned memory, if the device uploads from it faster."""
    return [_pinned(sample, device) for sample in samples] if device.type != "cpu" else samples


def _pinned(sample: Sample, device: torch.device) -> Sample:
    tensors = {name: pinned(tensor, device) for name, tensor in sample.conditioning.tensors.items()}
    target = None if sample.prior_target is None else _pinned(sample.prior_target, device)
    poles = sample.poles
    if poles is not None:
        pins = {name: None if pole is None else _pinned(pole, device) for name, pole in vars(poles).items()}
        poles = replace(poles, **pins)
    conditioning = replace(sample.conditioning, tensors=tensors)
    return replace(sample, conditioning=conditioning, prior_target=target, poles=poles)


def batch_loss(plan: Plan, host: Host, number: int = 0) -> torch.Tensor:
    """Return the mean loss of the run's batch `number`, with its graph. Every call draws the same noise."""
    _, members = next(plan.batches(number))
    parts = micro_batches(plan.samples(members), plan.recipe, host)
    return sum(losses.sum() for part in parts for losses in loss_terms(plan, host, part)) / len(members)


def crop_sample(sample: Sample, fraction: float) -> Sample:
    """Crop a sample's latent to its upper left, each side to a fraction of the whole side."""
    height, width = sample.latent.shape[-2:]
    # Networks that downsample or patchify need even sides.
    least = max(1, int(min(height, width) * fraction))
    even = next(number for number in (8, 4, 2, 1) if not height % number and not width % number and number <= least)
    sides = [max(1, int(side * fraction)) // even * even for side in (height, width)]

    def crop(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[..., : sides[0], : sides[1]]

    target = None if sample.prior_target is None else crop_sample(sample.prior_target, fraction)
    cropped = {name: crop(getattr(sample, name)) for name in ("latent", "weight", "paired")}
    conditioning = replace(sample.conditioning, first_frame=crop(sample.conditioning.first_frame))
    return replace(sample, **cropped, conditioning=conditioning, prior_target=target)


def fixed_losses(
    items: Sequence[DatasetItem], recipe: Recipe, host: Host, measure: Callable[..., torch.Tensor] = losses_of
) -> torch.Tensor:
    """Return losses of items at fixed noise and evenly spread noise levels, [items, levels] float32, no gradients.

    Args:
        measure: as `sample_losses` returns it. By default it is the model's native loss even if the run trains another
            objective. So runs with other loss weights, noise or penalties can be compared.
    """
    rows = []
    with torch.no_grad():
        for index, item in enumerate(items):
            sample = item.show(None)
            sigma = spread_sigmas(host.denoiser.sigmas(), _VALIDATION_LEVELS)
            shape = (_VALIDATION_LEVELS, *sample.latent.shape[1:])
            noise = draw_noise(shape, generator("validation", recipe.seed, index))
            size = recipe.micro_batch or _VALIDATION_LEVELS
            parts = []
            for levels, drawn in zip(sigma.split(size), noise.split(size), strict=True):
                x0 = sample.latent.expand(len(levels), *sample.latent.shape[1:])
                parts.append(measure(host, MicroBatch([sample] * len(levels), x0, drawn, levels)).cpu())
            rows.append(torch.cat(parts))
    return torch.stack(rows)
