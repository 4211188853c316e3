"""Loss of a batch: add noise, predict, compare with the target. Every gradient passes through this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..memory.autograd import OutOfPlace
from ..objective.custom import CustomDraw, draw_custom
from ..objective.losses import example_losses
from ..objective.noise import draw_noise, draw_sigmas, spread_sigmas
from ..objective.options import NATIVE
from ..objective.targets import parameterization
from ..rng import generator

if TYPE_CHECKING:
    from ..preprocessing.items import DatasetItem, Sample
    from ..preprocessing.prefetch import Batch
    from ..protocols import Conditioning, Host
    from ..recipe.recipe import Recipe
    from .plan import Plan, Window

_VALIDATION_LEVELS = 4

# Called with sigma [B] and the native losses [B] without factors, both on the device.
Watch = Callable[[tuple[torch.Tensor, torch.Tensor]], None]


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass, with their draws.

    Attributes:
        x0, noise: [B, C, ...].
        sigma: [B].
        custom: the draws of a custom objective, which then replaces the model's native loss; None for the native loss.
        is_padding: a repeated sample with loss factor 0, which only keeps the processes in lockstep.
    """

    samples: list[Sample]
    x0: torch.Tensor
    noise: torch.Tensor
    sigma: torch.Tensor
    custom: CustomDraw | None = None
    is_padding: bool = False


@dataclass(frozen=True)
class BatchRows:
    """Place of some samples in the batches of a training.

    Attributes:
        step: index of the step.
        number: index of the batch among the step's accumulated batches.
        first: index of the first of these samples in the whole batch.
        batch_size: size of the whole batch over all processes; 0 if the samples are the whole batch.
    """

    step: int = 0
    number: int = 0
    first: int = 0
    batch_size: int = 0


def micro_batches(
    samples: list[Sample], recipe: Recipe, host: Host, rows: BatchRows = BatchRows()
) -> Iterator[MicroBatch]:
    """Split a batch into micro-batches. Noise and sigmas are drawn for the whole batch, so the split changes nothing.

    Args:
        samples: the samples of the batch that this process computes.
        rows: their place; by default they are the first batch of the first step.
    """
    latents = torch.cat([sample.latent for sample in samples])
    source = generator("step", recipe.seed, rows.step, rows.number)
    custom = None
    shape = (rows.batch_size or len(samples), *latents.shape[1:])
    if recipe.objective == NATIVE:
        sigma = draw_sigmas(host.denoiser.sigmas(), shape[0], source)
        noise = draw_noise(shape, source)
    else:
        sigma, noise, custom = draw_custom(recipe.objective, host.denoiser, shape, source)
    size = recipe.micro_batch or len(samples)
    for start in range(0, len(samples), size):
        stop = min(start + size, len(samples))
        drawn = slice(rows.first + start, rows.first + stop)
        part = None if custom is None else custom.part(drawn.start, drawn.stop)
        yield MicroBatch(samples[start:stop], latents[start:stop], noise[drawn], sigma[drawn], part)


def forward_passes(
    plan: Plan, host: Host, window: Window, samples_of: Callable[[Batch], list[Sample]]
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a window that this process computes.

    With sharded weights, all processes must run the same forward passes. Each micro-batch is then one sample. If any
    dataset item has a prior target, every sample gets one. A process with fewer samples than the others repeats one
    as padding.

    Args:
        samples_of: returns the samples of some members.
    """
    lockstep = host.group.lockstep
    recipe = replace(plan.recipe, micro_batch=1) if lockstep else plan.recipe
    fill = _with_prior_targets if lockstep and any(item.has_prior_target for item in plan.train) else list
    sizes = window.sizes
    for number, (first, members) in enumerate(window.rows):
        if members:
            rows = BatchRows(window.step, number, first, sizes[number])
            yield from micro_batches(fill(samples_of(members)), recipe, host, rows)
    most = -(-sum(sizes) // host.group.world_size)
    if lockstep and sum(len(members) for _, members in window.rows) < most:
        # Not `samples_of`: the prefetcher would discard the batch that it has fetched ahead.
        padding = [_without_loss(sample) for sample in plan.samples(window.batches[0][1][:1])]
        for batch in micro_batches(fill(padding), recipe, host, BatchRows(window.step, 0, 0, sizes[0])):
            yield replace(batch, is_padding=True)


def _without_loss(sample: Sample) -> Sample:
    """Return a sample with loss factor 0, also for its prior target."""
    target = sample.prior_target
    return replace(sample, factor=0.0, prior_target=None if target is None else replace(target, factor=0.0))


def _with_prior_targets(samples: list[Sample]) -> list[Sample]:
    """Return the samples, all with a prior target. A sample without one gets itself, with loss factor 0."""
    return [
        sample if sample.prior_target is not None else replace(sample, prior_target=replace(sample, factor=0.0))
        for sample in samples
    ]


def loss_terms(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> Iterator[torch.Tensor]:
    """Yield the losses of the samples, then those of their prior targets. Each is [B] float32 with its own graph."""
    yield losses_of(host, batch, watch)
    rows = [row for row, sample in enumerate(batch.samples) if sample.prior_target is not None]
    if rows:
        targets = [batch.samples[row].prior_target for row in rows]
        yield prior_losses(plan, host, MicroBatch(targets, batch.x0[rows], batch.noise[rows], batch.sigma[rows]))


def losses_of(host: Host, batch: MicroBatch, watch: Watch | None = None) -> torch.Tensor:
    """Return the loss of each sample, [B] float32, with its graph.

    Args:
        watch: called with the micro-batch's sigma as it is, and the native losses.
    """
    denoiser, custom = host.denoiser, batch.custom
    x0, noise, sigma = (values.to(denoiser.device) for values in (batch.x0, batch.noise, batch.sigma))
    x_t = denoiser.add_noise(x0, noise if custom is None else custom.added.to(denoiser.device), sigma)
    kind = parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)
    target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    prediction = _predict(host, x_t, sigma, batch.samples)
    weights = _weights(batch.samples, x0)
    if custom is not None:
        losses = custom.losses(denoiser, prediction, target, sigma, weights)
    else:
        losses = example_losses(prediction, target, weights)
    if watch is not None:
        with torch.no_grad():
            native = losses.detach() if custom is None else example_losses(prediction, target, weights)
        watch((batch.sigma, native))
    return losses * _factors(batch.samples, x0)


def prior_losses(plan: Plan, host: Host, batch: MicroBatch) -> torch.Tensor:
    """Return the loss between the predictions with and without the trainables for each prior target's prompt.

    [B] float32, with its graph through the prediction with the trainables.
    """
    denoiser = host.denoiser
    x0, noise, sigma = (values.to(denoiser.device) for values in (batch.x0, batch.noise, batch.sigma))
    x_t = denoiser.add_noise(x0, noise, sigma)
    # Encode the prompts with and without the trainables: the text encoder may be trained too.
    with torch.no_grad(), plan.switched_off():
        target = _predict(host, x_t, sigma, batch.samples)
    prediction = _predict(host, x_t, sigma, batch.samples)
    return example_losses(prediction, target, _weights(batch.samples, x0)) * _factors(batch.samples, x0)


def _predict(host: Host, x_t: torch.Tensor, sigma: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    """Return the network's output for samples. Text encoders always add in place; their output is encoded here."""
    with OutOfPlace():
        conditionings = _conditionings(host, samples)
    # Every operation passes through the mode: networks that do not need it compute without it.
    with OutOfPlace() if host.denoiser.adds_in_place else nullcontext():
        return host.denoiser.predict(x_t, sigma, conditionings)


def _conditionings(host: Host, samples: list[Sample]) -> list[Conditioning]:
    """Return the conditioning of each sample. Encode each distinct caption once if the text encoder runs live."""
    captions = list(dict.fromkeys(sample.caption for sample in samples if sample.caption is not None))
    encoded = dict(zip(captions, host.text.encode_live(captions), strict=True)) if captions else {}
    return [
        sample.conditioning if sample.caption is None else replace(sample.conditioning, tensors=encoded[sample.caption])
        for sample in samples
    ]


def _weights(samples: list[Sample], x0: torch.Tensor) -> torch.Tensor | None:
    if all(sample.weight is None for sample in samples):
        return None
    ones = torch.ones_like(x0[:1, :1])
    return torch.cat([ones if sample.weight is None else sample.weight.to(ones) for sample in samples])


def _factors(samples: list[Sample], x0: torch.Tensor) -> torch.Tensor | float:
    if all(sample.factor == 1.0 for sample in samples):
        return 1.0
    return torch.tensor([sample.factor for sample in samples], device=x0.device)


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
    return replace(sample, latent=crop(sample.latent), weight=crop(sample.weight), prior_target=target)


def fixed_losses(items: Sequence[DatasetItem], recipe: Recipe, host: Host) -> torch.Tensor:
    """Return losses of items at fixed noise and evenly spread noise levels, [items, levels] float32, no gradients.

    This is the model's native loss even if the run trains another objective. So runs with other loss weights, noise or
    penalties can be compared.
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
                parts.append(losses_of(host, MicroBatch([sample] * len(levels), x0, drawn, levels)).cpu())
            rows.append(torch.cat(parts))
    return torch.stack(rows)
