"""The training loop, to be read from top to bottom."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from .autograd import OutOfPlace
from .data.order import batches_from
from .errors import GraftError, NumbersError
from .methods.dropout import dropping_out
from .objective.asked import Asked, draw_asked
from .objective.loss import example_losses
from .objective.noise import draw_noise, draw_sigmas, generator, spread_sigmas
from .objective.options import NATIVE
from .objective.parameterisations import parameterisation
from .optimisers import OPTIMISERS, Group, lr_factor, parameter_groups, restore_optimiser, state_of
from .protocols import Conditioning, PreviewRequest
from .run import Run, State

if TYPE_CHECKING:
    from torch import nn

    from .protocols import Host
    from .recipe import Recipe
    from .run import Products

log = logging.getLogger(__name__)

_VALIDATION_LEVELS = 4


@dataclass(frozen=True)
class Shown:
    """One showing of an example.

    Attributes:
        latent: scaled, [1, C, ...].
        conditioning: what it is conditioned on; without tensors where the text is encoded at every step.
        weight: None, or the loss weights [1, 1, ...] of the latent's positions.
        caption: the text, where it is encoded at every step.
        factor: on its loss; the prior weight for a class image.
        anchor: None, or the same latent conditioned on its class prompt, what the frozen base predicts for which is to
            be preserved.
    """

    latent: torch.Tensor
    conditioning: Conditioning
    weight: torch.Tensor | None = None
    caption: str | None = None
    factor: float = 1.0
    anchor: Shown | None = None


@dataclass(frozen=True)
class Item:
    """One example, ready: everything but its latent and text, which are fetched when needed.

    Attributes:
        name: for errors.
        bucket: (width, height) in pixels; items of one bucket can be batched.
        repeats: how often an epoch shows it.
        show: gives a showing by its turn, how often the run showed the item before; by None the one that never varies.
        prior: whether it is a class image.
    """

    name: str
    bucket: tuple[int, int]
    repeats: int
    show: Callable[[int | None], Shown]
    prior: bool = False


@dataclass(frozen=True)
class Plan:
    """What the loop works on.

    Attributes:
        trainables: by name, float32, already part of the denoiser's or the text encoder's tree.
        export: from the trainables' values and the step to what is handed on.
        groups: of the trainables, all of them; empty for one group with the recipe's learning rate.
        settle: called with the step's factor on the learning rates after every optimiser step, to keep trainables
            where they must be.
        frozen: gives a context in which the denoiser predicts as the base did before it was given trainables.
        constants: tensors of the tree that are not trained and that a resumed run must find again.
    """

    recipe: Recipe
    train: Sequence[Item]
    validation: Sequence[Item]
    trainables: dict[str, nn.Parameter]
    export: Callable[[dict[str, torch.Tensor], int], Products]
    groups: Sequence[Group] = ()
    settle: Callable[[float], None] = lambda factor: None
    frozen: Callable[[], AbstractContextManager] = nullcontext
    constants: dict[str, torch.Tensor] = field(default_factory=dict)

    def all_groups(self) -> Sequence[Group]:
        """The groups, or the one that stands for none."""
        return self.groups or (Group(tuple(self.trainables), self.recipe.learning_rate),)


def train(plan: Plan, run: Run, host: Host, state: State) -> State:
    """Trains from `state` to the recipe's last step; whatever interrupts it, what was reached is saved first.

    Args:
        state: where to go on from; step 0 for a new run.

    Returns:
        The final state, saved.

    Raises:
        NumbersError: a loss or gradient is not finite, naming the pictures of the batch.
        Anything that `host.report` raises to interrupt.
    """
    recipe = plan.recipe
    parameters = list(plan.trainables.values())
    groups = plan.all_groups()
    kind = OPTIMISERS[recipe.optimizer]
    optimiser = kind.make(parameter_groups(groups, plan.trainables, recipe), recipe)
    average = kind.average(optimiser, parameters) or _average(parameters, recipe)
    scaler = _loss_scaler(host)
    _restore(state, plan, optimiser, average, scaler)
    factor = lr_factor(recipe.schedule, recipe.warmup_steps, recipe.steps, recipe.num_cycles, recipe.power)
    batches = _batches(plan, state.batches)
    saved = state.step
    moving = False

    def keep() -> None:
        nonlocal saved
        _capture(state, plan, optimiser, average, scaler)
        path = run.save(state, plan.export(_result(state), state.step), recipe.keep_last)
        saved = state.step
        host.report("saved", {"step": state.step, "path": path})

    try:
        if state.step == 0:
            _preview(plan, run, host, state)
        while state.step < recipe.steps:
            started = time.perf_counter()
            share = factor(state.step)
            _set_rates(optimiser, groups, plan, share, state)
            window = [next(batches) for _ in range(recipe.accumulation)]
            loss, names = _gradients(plan, host, window, state.step, scaler)
            with _small_work(host.denoiser.device):
                norm = _clip(parameters, recipe.max_grad_norm, optimiser, scaler)
                _refuse_if_not_finite(loss, norm, names, state.step, scaler)
                moving = True
                scaler.step(optimiser)
                scaler.update()
                optimiser.zero_grad(set_to_none=True)
                plan.settle(share)
                if average is not None:
                    average.step(parameters)
            state.step += 1
            state.batches += len(window)
            state.losses.append(loss)
            moving = False
            event = {
                "event": "step",
                "step": state.step,
                "steps": recipe.steps,
                "epoch": window[-1][0],
                "loss": loss,
                "lr": recipe.learning_rate * share,
                "grad_norm": norm,
                "seconds": time.perf_counter() - started,
            }
            run.log(event)
            # Before the host is told, and may interrupt: what is resumed would not be validated at this step again.
            if plan.validation and _due(state.step, recipe.validate_every, recipe.steps):
                with _averaged(average, parameters):
                    _validate(plan, run, host, state)
            host.report("step", event)
            if _due(state.step, recipe.preview_every, recipe.steps):
                with _averaged(average, parameters):
                    _preview(plan, run, host, state)
            if state.step % recipe.save_every == 0 and state.step < recipe.steps:
                keep()
        if saved != state.step or not run.states():
            keep()
    except BaseException:
        # The host interrupts by an exception of its own, which on some versions is no Exception.
        # Weights that an interrupted step has half moved belong to no step; the last save stands then.
        if state.step > saved and not moving:
            _keep_before_leaving(keep)
        raise
    return state


def _set_rates(optimiser, groups: Sequence[Group], plan: Plan, share: float, state: State) -> None:
    """The learning rates of a step; a group whose time is over is frozen, so that nothing is computed for it.

    It stays so when more steps move its end: what was trained since counts on it.
    """
    for held, group in zip(optimiser.param_groups, groups, strict=True):
        held["lr"] = group.learning_rate * share
        if group.until is not None:
            over = state.step >= group.until or set(group.names) <= set(state.frozen)
            for name in group.names:
                plan.trainables[name].requires_grad_(not over)
            if over:
                state.frozen = sorted({*state.frozen, *group.names})


def _gradients(plan: Plan, host: Host, window: list, step: int, scaler) -> tuple[float, list[str]]:
    """Accumulates the gradient of the mean over all examples of a window of their losses, each times its factor.

    Returns:
        The mean and the examples' names.
    """
    total = sum(len(batch) for _, batch in window)
    summed = 0.0
    names = []
    with dropping_out(host.denoiser.module, plan.recipe, step):
        for number, (_, batch) in enumerate(window):
            names.extend(plan.train[index].name for index, _ in batch)
            for part in _parts(_shown(plan, batch), plan.recipe, step, number, host):
                for losses in _terms(plan, host, *part):
                    # A text without the word that is all that is trained, such as a dropped caption, teaches nothing.
                    if losses.requires_grad:
                        scaler.scale(losses.sum() / total).backward()
                    summed += float(losses.detach().sum())
    return summed / total, names


def _shown(plan: Plan, batch: list[tuple[int, int]]) -> list[Shown]:
    return [plan.train[index].show(turn) for index, turn in batch]


def _parts(shown: list[Shown], recipe: Recipe, step: int, number: int, host: Host) -> Iterator[tuple]:
    """Splits a batch into micro-batches; noise and levels are drawn for the whole batch, whatever the split.

    Each is what `_losses` takes after the host.
    """
    latents = torch.cat([one.latent for one in shown])
    source = generator("step", recipe.seed, step, number)
    asked = None
    if recipe.objective == NATIVE:
        sigma = draw_sigmas(host.denoiser.sigmas(), len(shown), source)
        noise = draw_noise(tuple(latents.shape), source)
    else:
        sigma, noise, asked = draw_asked(recipe.objective, host.denoiser, tuple(latents.shape), source)
    size = recipe.micro_batch or len(shown)
    for start in range(0, len(shown), size):
        stop = start + size
        part = shown[start:stop], latents[start:stop], noise[start:stop], sigma[start:stop]
        yield part if asked is None else (*part, asked.part(start, stop))


def _terms(
    plan: Plan,
    host: Host,
    shown: list[Shown],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    asked: Asked | None = None,
) -> Iterator[torch.Tensor]:
    """The losses of the examples and of what is preserved beside them, each [B] float32 with a graph of its own."""
    yield _losses(host, shown, x0, noise, sigma, asked)
    rows = [row for row, one in enumerate(shown) if one.anchor is not None]
    if rows:
        yield _drifts(plan, host, [shown[row].anchor for row in rows], x0[rows], noise[rows], sigma[rows])


def _losses(
    host: Host,
    shown: list[Shown],
    x0: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    asked: Asked | None = None,
) -> torch.Tensor:
    """The loss of each example, [B] float32, with its graph: the native one, or what was asked for instead."""
    denoiser = host.denoiser
    x0 = x0.to(denoiser.device)
    noise = noise.to(denoiser.device)
    sigma = sigma.to(denoiser.device)
    x_t = denoiser.add_noise(x0, noise if asked is None else asked.added.to(denoiser.device), sigma)
    kind = parameterisation(denoiser.parameterisation, denoiser.sigma_data, denoiser.noise_scale)
    target = kind.target(x0, noise, sigma.view(-1, *[1] * (x0.ndim - 1)))
    with OutOfPlace():
        prediction = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    if asked is not None:
        losses = asked.losses(denoiser, prediction, target, sigma, _weights(shown, x0))
    else:
        losses = example_losses(prediction, target, _weights(shown, x0))
    return losses * _factors(shown, x0)


def _drifts(
    plan: Plan, host: Host, shown: list[Shown], x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """How far the prediction for each class prompt is from the frozen base's, [B] float32, with its graph."""
    denoiser = host.denoiser
    x0 = x0.to(denoiser.device)
    sigma = sigma.to(denoiser.device)
    x_t = denoiser.add_noise(x0, noise.to(denoiser.device), sigma)
    with torch.no_grad(), plan.frozen():
        target = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    with OutOfPlace():
        prediction = denoiser.predict(x_t, sigma, _conditionings(host, shown))
    return example_losses(prediction, target, _weights(shown, x0)) * _factors(shown, x0)


def _conditionings(host: Host, shown: list[Shown]) -> list[Conditioning]:
    """What each showing is conditioned on; captions that were not encoded before are encoded once each."""
    captions = list(dict.fromkeys(one.caption for one in shown if one.caption is not None))
    encoded = dict(zip(captions, host.text.encode_live(captions), strict=True)) if captions else {}
    return [
        one.conditioning if one.caption is None else replace(one.conditioning, tensors=encoded[one.caption])
        for one in shown
    ]


def _weights(shown: list[Shown], x0: torch.Tensor) -> torch.Tensor | None:
    if all(one.weight is None for one in shown):
        return None
    ones = torch.ones_like(x0[:1, :1])
    return torch.cat([ones if one.weight is None else one.weight.to(ones) for one in shown])


def _factors(shown: list[Shown], x0: torch.Tensor) -> torch.Tensor | float:
    if all(one.factor == 1.0 for one in shown):
        return 1.0
    return torch.tensor([one.factor for one in shown], device=x0.device)


def batch_loss(plan: Plan, host: Host) -> torch.Tensor:
    """The mean loss of the run's first batch, with its graph; the same at every call."""
    _, batch = next(_batches(plan, 0))
    parts = _parts(_shown(plan, batch), plan.recipe, 0, 0, host)
    return sum(losses.sum() for part in parts for losses in _terms(plan, host, *part)) / len(batch)


def fixed_losses(items: Sequence[Item], recipe: Recipe, host: Host) -> torch.Tensor:
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
            x0 = latent.expand(_VALIDATION_LEVELS, *latent.shape[1:])
            rows.append(_losses(host, [shown] * _VALIDATION_LEVELS, x0, noise, sigma).cpu())
    return torch.stack(rows)


def _validate(plan: Plan, run: Run, host: Host, state: State) -> None:
    loss = float(fixed_losses(plan.validation, plan.recipe, host).mean())
    state.validation.append((state.step, loss))
    event = {"event": "validation", "step": state.step, "loss": loss}
    run.log(event)
    host.report("validation", event)


def _preview(plan: Plan, run: Run, host: Host, state: State) -> None:
    recipe = plan.recipe
    if not recipe.preview_prompts:
        return
    request = PreviewRequest(
        prompts=recipe.preview_prompts,
        size=_usual_bucket(plan),
        steps=recipe.preview_steps,
        cfg=recipe.preview_cfg,
        sampler_name=recipe.preview_sampler,
        scheduler=recipe.preview_scheduler,
        seed=recipe.preview_seed,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        pictures = host.denoiser.preview(request)
    paths = run.save_samples(state.step, pictures)
    run.log({"event": "sample", "step": state.step, "files": [os.path.basename(path) for path in paths]})
    host.report("sample", {"step": state.step, "paths": paths, "pictures": pictures})


def _usual_bucket(plan: Plan) -> tuple[int, int]:
    buckets = [item.bucket for item in plan.train if not item.prior]
    return max(sorted(set(buckets)), key=buckets.count)


@contextmanager
def _small_work(device: torch.device) -> Iterator[None]:
    """One thread on a CPU: an adapter's hundreds of small tensors are done before a second one has woken up."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _clip(parameters: list, limit: float, optimiser, scaler) -> float:
    """Clips the gradient to a norm (0: not at all), once per optimiser step; its norm before."""
    scaler.unscale_(optimiser)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
    return float(norm)


def _refuse_if_not_finite(loss: float, norm: float, names: list[str], step: int, scaler) -> None:
    # Under fp16 loss scaling an infinite gradient is ordinary: the scaler skips that step and lowers its factor.
    if math.isfinite(loss) and (math.isfinite(norm) or scaler.is_enabled()):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    raise NumbersError(
        f"The {what} of step {step + 1} is not finite (pictures: {', '.join(sorted(set(names)))}).",
        "Nothing of that step was kept. Lower learning_rate, compute in fp32 or bf16 (Graft Memory Options), "
        "or take those pictures out.",
        "learning_rate",
    )


def _average(parameters: list, recipe: Recipe):
    """diffusers' moving average of the trainables, None when off."""
    if not recipe.ema_decay:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=recipe.ema_decay, use_ema_warmup=False)


class _averaged:
    """Lends the moving average to the trainables for the block."""

    def __init__(self, average, parameters: list):
        self.average = average
        self.parameters = parameters

    def __enter__(self):
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)

    def __exit__(self, *error):
        if self.average is not None:
            self.average.restore(self.parameters)


def _loss_scaler(host: Host):
    """Dynamic loss scaling for fp16 compute (Micikevicius et al. 2018), idle otherwise."""
    half = getattr(host.denoiser, "compute_dtype", None) is torch.float16
    return torch.amp.GradScaler(host.denoiser.device.type, enabled=half)


def _capture(state: State, plan: Plan, optimiser, average, scaler) -> None:
    """Brings the live values into the state."""
    state.trainables = {name: parameter.detach().clone() for name, parameter in plan.trainables.items()}
    state.constants = {name: tensor.detach().clone() for name, tensor in plan.constants.items()}
    state.optimiser, state.groups = state_of(optimiser)
    state.ema = {}
    if average is not None:
        state.ema = {name: value.clone() for name, value in zip(plan.trainables, average.shadow_params, strict=True)}
    state.scaler = dict(scaler.state_dict())


def _restore(state: State, plan: Plan, optimiser, average, scaler) -> None:
    """Brings the state into the live values; nothing to do for a new run.

    Raises:
        GraftError: the state's trainables are not this run's.
    """
    if state.step == 0:
        return
    shapes = {name: tuple(value.shape) for name, value in state.trainables.items()}
    if shapes != {name: tuple(parameter.shape) for name, parameter in plan.trainables.items()}:
        raise GraftError("The saved state has other layers than this model.", "Start the run over.")
    with torch.no_grad():
        for name, parameter in plan.trainables.items():
            parameter.copy_(state.trainables[name])
        for name, tensor in plan.constants.items():
            tensor.copy_(state.constants[name])
    restore_optimiser(optimiser, state.optimiser, state.groups)
    if plan.recipe.ema_decay and state.ema:
        average.shadow_params = [state.ema[name].to(plan.trainables[name].device) for name in plan.trainables]
        average.optimization_step = state.step
    if scaler.is_enabled() and state.scaler:
        scaler.load_state_dict(state.scaler)


def _result(state: State) -> dict[str, torch.Tensor]:
    return state.ema or state.trainables


def _keep_before_leaving(keep: Callable[[], None]) -> None:
    """Saves; a failure of that is logged, so that the first error is the one that is shown."""
    try:
        keep()
    except Exception:
        log.exception("Graft: what was trained so far could not be saved.")


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def _batches(plan: Plan, position: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    recipe = plan.recipe
    prior = [item.prior for item in plan.train]
    return batches_from(position, _buckets(plan), _repeats(plan), recipe.batch_size, recipe.seed, prior)


def _buckets(plan: Plan) -> list[tuple[int, int]]:
    return [item.bucket for item in plan.train]


def _repeats(plan: Plan) -> list[int]:
    return [item.repeats for item in plan.train]
