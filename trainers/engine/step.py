"""Loss of a batch: add noise, predict, compare with the target. Every gradient passes through this module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
    from ..protocols import Conditioning, Host
    from ..recipe.recipe import Recipe
    from .plan import Plan

_VALIDATION_LEVELS = 4

Watch = Callable[[tuple[torch.Tensor, torch.Tensor]], None]


def micro_batches(
    shown: list[Sample], recipe: Recipe, step: int, number: int, host: Host, place: int = 0, whole: int = 0
) -> Iterator[tuple]:
    """Split a batch into micro-batches. Noise and sigmas are drawn for the whole batch, so the split changes nothing.

    Each micro-batch is the tuple of arguments that `losses_of` takes after the host.

    Args:
        shown: the samples of the batch that this process computes.
        number: index of the batch among the step's accumulated batches.
        place: index of the first of these samples in the whole batch.
        whole: size of the whole batch over all processes; 0 if `shown` is the whole batch.
    """
    latents = torch.cat([one.latent for one in shown])
    source = generator("step", recipe.seed, step, number)
    asked = None
    shape = (whole or len(shown), *latents.shape[1:])
    if recipe.objective == NATIVE:
        sigma = draw_sigmas(host.denoiser.sigmas(), shape[0], source)
        noise = draw_noise(shape, source)
    else:
        sigma, noise, asked = draw_custom(recipe.objective, host.denoiser, shape, source)
    size = recipe.micro_batch or len(shown)
    for start in range(0, len(shown), size):
        stop = min(start + size, len(shown))
        drawn = slice(place + start, place + stop)
        part = shown[start:stop], latents[start:stop], noise[drawn], sigma[drawn]
        yield part if asked is None else (*part, asked.part(drawn.start, drawn.stop))


def forward_passes(
    plan: Plan,
    host: Host,
    window: list,
    shares: list[tuple[int, list]],
    step: int,
    shown: Callable[[list], list[Sample]],
) -> Iterator[tuple[tuple, bool]]:
    """Yield the micro-batches of a window that this process computes, each as (micro-batch, whether it counts).

    With sharded weights, all processes must run the same forward passes. Each micro-batch is then one sample. If any
    dataset item has a prior target, every sample gets one. A process with fewer samples than the others repeats one
    with loss factor 0; that one does not count.

    Args:
        window: the batches of one optimizer step, each (epoch, members).
        shares: this process's part of each batch, as (index of its first member, members).
        shown: returns the samples of some members.
    """
    lockstep = host.group.lockstep
    recipe = replace(plan.recipe, micro_batch=1) if lockstep else plan.recipe
    fill = _anchored if lockstep and any(item.anchored for item in plan.train) else list
    sizes = [len(batch) for _, batch in window]
    for number, (first, mine) in enumerate(shares):
        if mine:
            for part in micro_batches(fill(shown(mine)), recipe, step, number, host, first, sizes[number]):
                yield part, True
    most = -(-sum(sizes) // host.group.world_size)
    if lockstep and sum(len(mine) for _, mine in shares) < most:
        # Not `shown`: the prefetcher would discard the batch that it has fetched ahead.
        spare = [replace(one, factor=0.0) for one in plan.samples(window[0][1][:1])]
        spare = [replace(one, anchor=replace(one.anchor, factor=0.0)) if one.anchor else one for one in spare]
        for part in micro_batches(fill(spare), recipe, step, 0, host, 0, sizes[0]):
            yield part, False


def _anchored(shown: list[Sample]) -> list[Sample]:
    """Return the samples, all with a prior target. A sample without one gets itself, with loss factor 0."""
    return [one if one.anchor is not None else replace(one, anchor=replace(one, factor=0.0)) for one in shown]


def loss_terms(
    plan: Plan,
    host: Host,
    shown: list[Sample],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    asked: CustomDraw | None = None,
    watch: Watch | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the losses of the samples, then those of their prior targets. Each is [B] float32 with its own graph."""
    yield losses_of(host, shown, x0, noise, sigma, asked, watch)
    rows = [row for row, one in enumerate(shown) if one.anchor is not None]
    if rows:
        yield prior_losses(plan, host, [shown[row].anchor for row in rows], x0[rows], noise[rows], sigma[rows])


def losses_of(
    host: Host,
    shown: list[Sample],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    asked: CustomDraw | None = None,
    watch: Watch | None = None,
) -> torch.Tensor:
    """Return the loss of each sample, [B] float32, with its graph.

    Args:
        x0, noise: [B, C, ...].
        sigma: [B].
        asked: the draws of a custom objective, which then replaces the model's native loss; None for the native loss.
        watch: called with sigma [B] as passed in, and the native losses [B] without factors, on the device.
    """
    denoiser = host.denoiser
    levels = sigma
    x0, noise, sigma = (values.to(denoiser.device) for values in (x0, noise, sigma))
    x_t = denoiser.add_noise(x0, noise if asked is None else asked.added.to(denoiser.device), sigma)
    kind = parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)
    target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    with OutOfPlace():
        prediction = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    weights = _weights(shown, x0)
    if asked is not None:
        losses = asked.losses(denoiser, prediction, target, sigma, weights)
    else:
        losses = example_losses(prediction, target, weights)
    if watch is not None:
        with torch.no_grad():
            plain = losses.detach() if asked is None else example_losses(prediction, target, weights)
        watch((levels, plain))
    return losses * _factors(shown, x0)


def prior_losses(
    plan: Plan, host: Host, shown: list[Sample], x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Return the loss between the predictions with and without the trainables for each prior target's prompt.

    [B] float32, with its graph through the prediction with the trainables.
    """
    denoiser = host.denoiser
    x0, noise, sigma = (values.to(denoiser.device) for values in (x0, noise, sigma))
    x_t = denoiser.add_noise(x0, noise, sigma)
    with OutOfPlace():
        # Encode the prompts with and without the trainables: the text encoder may be trained too.
        with torch.no_grad(), plan.switched_off():
            target = denoiser.predict(x_t, sigma, _conditionings(host, shown))
        prediction = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    return example_losses(prediction, target, _weights(shown, x0)) * _factors(shown, x0)


def _conditionings(host: Host, shown: list[Sample]) -> list[Conditioning]:
    """Return the conditioning of each sample. Encode each distinct caption once if the text encoder runs live."""
    captions = list(dict.fromkeys(one.caption for one in shown if one.caption is not None))
    encoded = dict(zip(captions, host.text.encode_live(captions), strict=True)) if captions else {}
    return [
        one.conditioning if one.caption is None else replace(one.conditioning, tensors=encoded[one.caption])
        for one in shown
    ]


def _weights(shown: list[Sample], x0: torch.Tensor) -> torch.Tensor | None:
    if all(one.weight is None for one in shown):
        return None
    ones = torch.ones_like(x0[:1, :1])
    return torch.cat([ones if one.weight is None else one.weight.to(ones) for one in shown])


def _factors(shown: list[Sample], x0: torch.Tensor) -> torch.Tensor | float:
    if all(one.factor == 1.0 for one in shown):
        return 1.0
    return torch.tensor([one.factor for one in shown], device=x0.device)


def batch_loss(plan: Plan, host: Host, number: int = 0) -> torch.Tensor:
    """Return the mean loss of the run's batch `number`, with its graph. Every call draws the same noise."""
    _, batch = next(plan.batches(number))
    parts = micro_batches(plan.samples(batch), plan.recipe, 0, 0, host)
    return sum(losses.sum() for part in parts for losses in loss_terms(plan, host, *part)) / len(batch)


def crop_sample(shown: Sample, share: float) -> Sample:
    """Crop a sample's latent to its upper left, each side to a share of the whole side."""
    height, width = shown.latent.shape[-2:]
    # Networks that downsample or patchify need even sides.
    least = max(1, int(min(height, width) * share))
    even = next(number for number in (8, 4, 2, 1) if not height % number and not width % number and number <= least)
    sides = [max(1, int(side * share)) // even * even for side in (height, width)]

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[..., : sides[0], : sides[1]]

    anchor = None if shown.anchor is None else crop_sample(shown.anchor, share)
    return replace(shown, latent=cut(shown.latent), weight=cut(shown.weight), anchor=anchor)


def fixed_losses(items: Sequence[DatasetItem], recipe: Recipe, host: Host) -> torch.Tensor:
    """Return losses of items at fixed noise and evenly spread noise levels, [items, levels] float32, no gradients.

    This is the model's native loss even if the run trains another objective. So runs with other loss weights, noise or
    penalties can be compared.
    """
    rows = []
    with torch.no_grad():
        for index, item in enumerate(items):
            shown = item.show(None)
            latent = shown.latent
            sigma = spread_sigmas(host.denoiser.sigmas(), _VALIDATION_LEVELS)
            noise = draw_noise((_VALIDATION_LEVELS, *latent.shape[1:]), generator("validation", recipe.seed, index))
            size = recipe.micro_batch or _VALIDATION_LEVELS
            parts = []
            for level, drawn in zip(sigma.split(size), noise.split(size), strict=True):
                x0 = latent.expand(len(level), *latent.shape[1:])
                parts.append(losses_of(host, [shown] * len(level), x0, drawn, level).cpu())
            rows.append(torch.cat(parts))
    return torch.stack(rows)
