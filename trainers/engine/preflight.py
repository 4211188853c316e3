"""Checks and observations that run before training starts."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError, in_one_line, is_out_of_memory
from ..formats.adapter import LazyAdapter
from ..lowrank.layers import grouping, low_rank_layers
from ..methods import METHODS, eva
from ..methods.arguments import value_of
from ..optimizers import OPTIMIZERS
from ..runs import tensorboard
from ..steps.step import batch_loss, fixed_losses, losses_of, micro_batches, sample_losses
from .estimate import estimate, say
from .gradient_check import TOLERANCE, TOLERANCE_HALF, check_gradient
from .oom_fallback import trees_of

if TYPE_CHECKING:
    from ..protocols import Host
    from ..recipe.recipe import Recipe
    from ..runs.checkpoint import State
    from ..runs.run import Run
    from ..steps.plan import Plan
    from .updater import ParameterUpdater

log = logging.getLogger(__name__)

# Number of batches to search for one whose loss depends on the trainables.
_TRIED = 64
# Number of pictures whose layers' inputs EVA sees.
_SHOWN = 8


def check_gradients(plan: Plan, host: Host) -> None:
    """Check the gradient if the user asks for it, or if Graft has no description of the model family.

    Raises:
        ModelError: the model has no gradient, or a wrong one.
    """
    wanted = plan.recipe.gradient_check
    if wanted == "off" or (wanted == "auto" and host.denoiser.family != "general"):
        return
    with host.group.main_process_only() as mine:
        if mine:
            host.report_phase("gradients")
            _check_gradients(plan, host)


def _check_gradients(plan: Plan, host: Host) -> None:
    denoiser = host.denoiser
    before = denoiser.compute_dtype
    # A finite difference cannot follow the steep loss of a preference, and a slider changes the adapter's scale between
    # its losses. The model's own loss has the same graph.
    plan = replace(plan, recipe=replace(plan.recipe, preference_beta=0.0, slider_strength=0.0))
    half = any(parameter.dtype.itemsize < 4 for parameter in plan.trainables.values())
    # In half precision, rounding would hide the finite difference.
    denoiser.compute_dtype = torch.promote_types(before, torch.float32)
    try:
        number = _teaching(plan, host)
        check_gradient(lambda: batch_loss(plan, host, number), plan.trainables, TOLERANCE_HALF if half else TOLERANCE)
    finally:
        denoiser.compute_dtype = before


def _teaching(plan: Plan, host: Host) -> int:
    """Return the index of the first batch whose loss depends on the trainables; 0 if none is found.

    If only an embedding is trained, a batch of dropped captions does not depend on it.
    """
    if METHODS[plan.recipe.method].trains_model:
        return 0
    coming = min(_TRIED, plan.recipe.steps * plan.recipe.accumulation)
    return next((number for number in range(coming) if batch_loss(plan, host, number).requires_grad), 0)


def start_at_inputs(plan: Plan, host: Host) -> None:
    """With eva in adapter_args, start the adapter at the main directions of its inputs on some pictures.

    All processes do it, because they share weights. The values of the main process count.
    """
    if not value_of(plan.recipe, "eva"):
        return
    items = plan.train[:: max(1, len(plan.train) // _SHOWN)][:_SHOWN]
    recipe = replace(plan.recipe, micro_batch=1)
    measure = sample_losses(plan)
    for can_repeat in (not host.group.lockstep, False):
        try:
            count, total = eva.start_at_inputs(trees_of(plan, host), lambda: fixed_losses(items, recipe, host, measure))
            break
        except Exception as error:
            if not (can_repeat and is_out_of_memory(error)):
                raise
        host.denoiser.make_room()
    log.info("Graft: EVA started %d of %d layers at the main directions of their inputs.", count, total)


def share_inputs(plan: Plan, host: Host, number: int) -> None:
    """Find the adapted layers that read the same tensor, by a forward without gradients. They share products then.

    It runs before the first step and before the first resumed one, because shared products round in another way.

    Args:
        number: index of the run's next batch.
    """
    trees = trees_of(plan, host)
    if not any(low_rank_layers(tree) for tree in trees):
        return
    _, members = next(plan.batches(number))
    sample = plan.samples(members[:1])[0]
    for _ in range(2):
        try:
            with grouping(trees), torch.no_grad():
                for batch in micro_batches([sample], plan.recipe, host):
                    losses_of(host, batch)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.info("Graft: no memory to find layers that share an input: %s", in_one_line(error))
        host.denoiser.make_room()


def check_packages(recipe: Recipe, is_sharded: bool) -> None:
    """Fail on a missing package before anything is encoded."""
    from ..distributed.fsdp import check_shards

    OPTIMIZERS[recipe.optimizer].load(recipe)
    if is_sharded:
        check_shards(METHODS[recipe.method].in_backward)
    if recipe.tensorboard == "on":
        tensorboard.load()


def check_keys(plan: Plan, host: Host) -> None:
    """Check that the host reads all keys of the exported adapter, and that the adapter fits the preview model.

    Raises:
        ModelError: the host does not read a key. The error names it. Or the adapter does not fit.
    """
    adapter = plan.products(0).adapter
    if adapter is None:
        return
    if isinstance(adapter, LazyAdapter):
        # All its tensors together are as large as the model.
        adapter = adapter.on_meta()
    unread = host.denoiser.check_adapter(adapter)
    if unread:
        raise ModelError(
            f"ComfyUI would not read {len(unread)} keys of this model's adapter, such as {unread[0]}.",
            "Graft cannot train this model yet. Please report its name.",
            "model",
        )
    if host.preview_model is not None:
        host.preview_model.check(adapter)


def warn_of_rate(warning: str, plan: Plan, run: Run, host: Host, step: int) -> None:
    """Warn in the log, the run and the page about a learning rate that does not suit the optimizer."""
    if not warning or not host.group.is_main:
        return
    log.warning("Graft: %s", warning)
    recipe = plan.recipe
    event = {"event": "rate", "step": step, "optimizer": recipe.optimizer, "learning_rate": recipe.learning_rate}
    run.log(event)
    host.report("rate", event)


def report_estimate(plan: Plan, run: Run, host: Host, updater: ParameterUpdater, state: State) -> None:
    """Report the memory and time that the remaining steps will take."""
    steps = plan.recipe.steps - state.step
    estimated = estimate(plan, host, updater, state.batches, steps)
    if estimated is None:
        return
    log.log(logging.INFO if estimated.fits else logging.WARNING, "Graft: %s.", say(estimated, steps))
    event = {"event": "estimate", "step": state.step, **asdict(estimated), "fits": estimated.fits}
    run.log(event)
    host.report("estimate", event)
