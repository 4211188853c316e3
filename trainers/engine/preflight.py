"""Checks and observations that run before training starts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from ..lowrank.layers import grouping, low_rank_layers
from ..memory.oom import in_one_line, is_out_of_memory
from ..methods import METHODS
from .gradient_check import TOLERANCE, TOLERANCE_HALF, check_gradient
from .oom_fallback import trees_of
from .step import batch_loss, losses_of, micro_batches

if TYPE_CHECKING:
    from ..protocols import Host
    from .plan import Plan

log = logging.getLogger(__name__)

# Number of batches to search for one whose loss depends on the trainables.
_TRIED = 64


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


def check_keys(plan: Plan, host: Host) -> None:
    """Check that the host reads all keys of the exported adapter.

    Raises:
        ModelError: the host does not read a key. The error names it.
    """
    values = {name: parameter.detach() for name, parameter in plan.trainables.items()}
    adapter = plan.export(values, 0).adapter
    if adapter is None:
        return
    unread = host.denoiser.check_adapter(adapter)
    if unread:
        raise ModelError(
            f"ComfyUI would not read {len(unread)} keys of this model's adapter, such as {unread[0]}.",
            "Graft cannot train this model yet. Please report its name.",
            "model",
        )
