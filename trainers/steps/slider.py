"""Losses of a concept slider (Gandikota et al. 2023), and its equations.

The adapter at +s leads to one side, at -s to the other, and anchors stay. The arithmetic holds for the raw outputs of
every parameterization: at one x_t and sigma they are affine in the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..families import family_of
from ..memory.transfer import upload
from ..objective.losses import example_losses
from ..objective.targets import parameterization
from .predict import encode_live, factors_of, predict, weights_of

if TYPE_CHECKING:
    from ..preprocessing.items import Sample
    from ..protocols import Host
    from .plan import Plan
    from .predict import MicroBatch, Watch

# As in the paper's code: the guidance of the latents that the base draws.
GUIDANCE = 3.0
# Euler steps from pure noise to none; a latent takes part of them, to its own noise level.
DRAW_STEPS = 12


def led(target: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, strength: float) -> torch.Tensor:
    """Return target + s (positive - negative), the output to which a slider leads the model at strength s."""
    return target + strength * (positive - negative)


def guided(output: torch.Tensor, without: torch.Tensor, guidance: float) -> torch.Tensor:
    """Return the output under classifier-free guidance, from those with the prompt and without it."""
    return without + guidance * (output - without)


def draw_path(levels: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return falling noise levels from the highest one to each sigma, which the last ones repeat.

    Args:
        levels: the model's noise levels in rising order, [N].
        sigma: [B].

    Returns:
        [DRAW_STEPS + 1, B], evenly spaced over the model's own levels.
    """
    last = len(levels) - 1
    places = (last - torch.arange(DRAW_STEPS + 1) * last / DRAW_STEPS).round().long()
    # At the end itself: timestep options may draw sigmas between the levels.
    return torch.maximum(levels[places][:, None], sigma[None])


def euler_step(denoised: torch.Tensor, x_t: torch.Tensor, sigma: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Return x_t at the following noise level (Karras et al. 2022, Euler).

    Args:
        denoised: the x0 that the model predicts at x_t and sigma. All arguments are [B, ...] or broadcastable to it.
    """
    return x_t + (x_t - denoised) / sigma * (following - sigma)


class _Side(NamedTuple):
    """One direction of a slider: the adapter's strength, x_t [B, C, ...] and the target of the raw output."""

    strength: float
    x_t: torch.Tensor
    target: torch.Tensor


def slider_losses(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> Iterator[torch.Tensor]:
    """Yield half the losses of the samples at +s and at -s, each followed by half those of their anchors.

    Each is [B] float32 with its own graph. Its backward must run before the next one is taken: until then the adapter
    keeps its scale, which blocks that are recomputed read again.
    """
    denoiser, samples = host.denoiser, batch.samples
    anchors = [sample.prior_target for sample in samples if sample.prior_target is not None]
    read = _from_pictures if samples[0].poles is None else _from_prompts
    with torch.no_grad(), plan.switched_off():
        sides, kept = read(plan, host, batch, anchors)
    sigma = upload(batch.sigma, denoiser.device)
    weights, factors = weights_of(samples, sides[0].x_t), factors_of(samples, sigma)
    native = []
    for side in sides:
        with plan.scaled(side.strength):
            prediction = predict(host, side.x_t, sigma, samples)
            losses = plain = example_losses(prediction, side.target, weights)
            if batch.custom is not None:
                losses = batch.custom.losses(denoiser, prediction, side.target, sigma, weights)
            native.append(plain.detach())
            yield 0.5 * losses * factors
            if anchors:
                losses = example_losses(predict(host, kept.x_t, sigma, anchors), kept.target)
                yield 0.5 * losses * factors_of(anchors, sigma)
    if watch is not None:
        watch((batch.sigma, sum(native) / len(native)))


def both_sides(plan: Plan, host: Host, batch: MicroBatch, watch: Watch | None = None) -> torch.Tensor:
    """Return the mean loss of the samples at +s and -s, [B] float32 without a graph, such as for validation."""
    samples = [replace(sample, prior_target=None) for sample in batch.samples]
    with torch.no_grad():
        return sum(slider_losses(plan, host, replace(batch, samples=samples), watch))


def _from_prompts(plan: Plan, host: Host, batch: MicroBatch, anchors: list[Sample]) -> tuple[list[_Side], _Side | None]:
    """Let the base draw and predict. Return the sides, and x_t and target of the anchors if there are some."""
    count, strength = len(batch.samples), plan.recipe.slider_strength
    samples = encode_live(host, [*batch.samples, *anchors])
    drawn = _draw(plan, host, samples, batch)
    poles = [getattr(sample.poles, name) for name in ("positive", "negative") for sample in samples[:count]]
    rows = [*samples, *encode_live(host, poles)]
    x_t = torch.cat([drawn, drawn[:count], drawn[:count]])
    outputs = _predict_rows(plan, host, x_t, _repeated(host, batch.sigma, len(rows)), rows)
    target, (positive, negative) = outputs[: len(samples)], outputs[len(samples) :].chunk(2)
    sides = [_Side(s, drawn[:count], led(target[:count], positive, negative, s)) for s in (strength, -strength)]
    return sides, _Side(0.0, drawn[count:], target[count:]) if anchors else None


def _from_pictures(
    plan: Plan, host: Host, batch: MicroBatch, anchors: list[Sample]
) -> tuple[list[_Side], _Side | None]:
    """Return one side for each picture of the pairs, under the same noise, and the anchors at the first picture."""
    denoiser, strength = host.denoiser, plan.recipe.slider_strength
    kind = parameterization(denoiser.parameterization, denoiser.sigma_data, denoiser.noise_scale)
    added = batch.noise if batch.custom is None else batch.custom.added
    noise, added, sigma = (upload(values, denoiser.device) for values in (batch.noise, added, batch.sigma))
    paired = torch.cat([sample.paired for sample in batch.samples])
    sides = []
    for s, x0 in ((strength, batch.x0), (-strength, paired)):
        x0 = upload(x0, denoiser.device)
        target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
        sides.append(_Side(s, denoiser.add_noise(x0, added, sigma), target))
    if not anchors:
        return sides, None
    x_t = sides[0].x_t
    return sides, _Side(0.0, x_t, _predict_rows(plan, host, x_t, sigma, anchors))


def _draw(plan: Plan, host: Host, samples: list[Sample], batch: MicroBatch) -> torch.Tensor:
    """Return x_t [rows, C, ...] at the micro-batch's noise levels, drawn from its noise for the prompts of samples.

    Args:
        samples: those of the micro-batch, and their anchors behind them.
    """
    denoiser, rows = host.denoiser, len(samples)
    # Models that were distilled with guidance draw without it.
    is_guided = family_of(denoiser.family).preview_cfg > 1
    prompts = [*samples, *encode_live(host, [sample.poles.unconditional for sample in samples])]
    prompts = prompts if is_guided else samples
    path = draw_path(denoiser.sigmas(), batch.sigma)
    x0, noise = (_repeated(host, values, rows) for values in (batch.x0, batch.noise))
    x_t = denoiser.add_noise(x0, noise, _repeated(host, path[0], rows))
    for sigma, following in itertools.pairwise(path):
        if torch.equal(sigma, following) and not host.group.lockstep:
            break
        host.check_interrupt()
        sigma, following = (_repeated(host, level, rows) for level in (sigma, following))
        copies = len(prompts) // rows
        outputs = _predict_rows(plan, host, torch.cat([x_t] * copies), sigma.repeat(copies), prompts)
        if is_guided:
            outputs = guided(*outputs.chunk(2), GUIDANCE)
        levels = (level.view(-1, *[1] * (x_t.ndim - 1)) for level in (sigma, following))
        x_t = euler_step(denoiser.denoised(outputs, x_t, sigma), x_t, *levels)
    return x_t


def _repeated(host: Host, values: torch.Tensor, rows: int) -> torch.Tensor:
    return upload(torch.cat([values] * (rows // len(values))), host.denoiser.device)


def _predict_rows(
    plan: Plan, host: Host, x_t: torch.Tensor, sigma: torch.Tensor, samples: list[Sample]
) -> torch.Tensor:
    """Predict samples in passes of `micro_batch` rows.

    If all processes must run the same passes, each has one row: prompts may not fit into one batch.
    """
    size = 1 if host.group.lockstep else plan.recipe.micro_batch or len(samples)
    parts = [slice(first, first + size) for first in range(0, len(samples), size)]
    return torch.cat([predict(host, x_t[part], sigma[part], samples[part]) for part in parts])
