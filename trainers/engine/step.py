"""From a batch to its losses: noised, predicted, compared; everything that a gradient goes through."""

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
    """Splits a batch into micro-batches; noise and levels are drawn for the whole batch, whatever the split.

    Each is what `_losses` takes after the host.

    Args:
        place, whole: where the showings lie in a batch of so many, of which other processes have the others; 0 for all.
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
    """What of a window a process computes at once, each as `parts_of` gives it, and whether it counts.

    Where the processes have to make the same passes, each part is one picture, with something to be preserved beside it
    if any picture has, and who has fewer pictures shows one again that counts for nothing.

    Args:
        shares: (place of the first, members) of each batch of the window.
        shown: gives the showings of some members.
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
        # Not by `shown`, which would let go of what it has fetched ahead.
        spare = [replace(one, factor=0.0) for one in plan.samples(window[0][1][:1])]
        spare = [replace(one, anchor=replace(one.anchor, factor=0.0)) if one.anchor else one for one in spare]
        for part in micro_batches(fill(spare), recipe, step, 0, host, 0, sizes[0]):
            yield part, False


def _anchored(shown: list[Sample]) -> list[Sample]:
    """The showings, each with something to be preserved beside it, which counts for nothing where there was none."""
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
    """The losses of the examples and of what is preserved beside them, each [B] float32 with a graph of its own."""
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
    """The loss of each example, [B] float32, with its graph: the native one, or what was asked for instead.

    Args:
        watch: told the noise levels [B] as they came, and the native losses without factors [B] on the device.
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
    """How far the prediction for each class prompt is from the frozen base's, [B] float32, with its graph."""
    denoiser = host.denoiser
    x0, noise, sigma = (values.to(denoiser.device) for values in (x0, noise, sigma))
    x_t = denoiser.add_noise(x0, noise, sigma)
    with OutOfPlace():
        # Encoded once with the trainables and once without: the text encoder may be trained too.
        with torch.no_grad(), plan.switched_off():
            target = denoiser.predict(x_t, sigma, _conditionings(host, shown))
        prediction = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    return example_losses(prediction, target, _weights(shown, x0)) * _factors(shown, x0)


def _conditionings(host: Host, shown: list[Sample]) -> list[Conditioning]:
    """What each showing is conditioned on; captions that were not encoded before are encoded once each."""
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
    """The mean loss of one of the run's batches, with its graph; the same at every call."""
    _, batch = next(plan.batches(number))
    parts = micro_batches(plan.samples(batch), plan.recipe, 0, 0, host)
    return sum(losses.sum() for part in parts for losses in loss_terms(plan, host, *part)) / len(batch)


def crop_sample(shown: Sample, share: float) -> Sample:
    """A showing of the upper left of its picture, each side a share of the whole one's."""
    height, width = shown.latent.shape[-2:]
    # Networks that halve what they see, or take it in patches, want sides that can be halved.
    least = max(1, int(min(height, width) * share))
    even = next(number for number in (8, 4, 2, 1) if not height % number and not width % number and number <= least)
    sides = [max(1, int(side * share)) // even * even for side in (height, width)]

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[..., : sides[0], : sides[1]]

    anchor = None if shown.anchor is None else crop_sample(shown.anchor, share)
    return replace(shown, latent=cut(shown.latent), weight=cut(shown.weight), anchor=anchor)


def fixed_losses(items: Sequence[DatasetItem], recipe: Recipe, host: Host) -> torch.Tensor:
    """Losses of items at fixed noise and evenly spread noise levels, [items, levels] float32, without gradients.

    Always the model's own loss, whatever the objective of the training: numbers of runs with other weights, noise or
    penalties can be compared with each other.
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
