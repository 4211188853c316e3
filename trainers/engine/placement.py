"""Placement of the weights before the first step: offloaded, or in shards over the processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ..methods import METHODS
from ..recipe.options import HYBRID, SHARDED
from .oom_fallback import offload_blocks

if TYPE_CHECKING:
    from torch import nn

    from ..protocols import Host
    from ..runs.run import Run
    from ..steps.plan import Plan

log = logging.getLogger(__name__)


def place_weights(plan: Plan, run: Run, host: Host, read_later: Sequence[nn.Parameter] = ()) -> Plan:
    """Offload or shard the weights as the recipe says. Return the plan, whose trainables may be shards then.

    Args:
        read_later: frozen weights that an export reads.
    """
    recipe = plan.recipe
    if recipe.offload == "on":
        # Offload before the first forward: until now, the blocks' weights are not on the device.
        description = offload_blocks(plan, run, host)
        log.info("Graft: %s.", description or "offload is on, but no weights are frozen")
    if recipe.shard not in SHARDED:
        return plan
    if host.group.world_size == 1:
        log.info("Graft: shard is set, but only one process trains: it holds all weights.")
        return plan
    method, tree = METHODS[recipe.method], host.denoiser.module
    if method.in_backward:
        # The frozen weights stay off the device: only exports and predictions of the base read them.
        with method.base_apart(tree) as base:
            shards = host.group.shard(tree, read_later, False, False, trained=plan.trainables)
        plan = replace(plan, shards=shards, switched_off=partial(shards.replaced, base))
    else:
        # An adapter has a gradient in every pass. An embedding alone has one only if the caption contains it.
        keep, needs_grad = [*plan.trainables.values(), *read_later], not method.trains_model
        host.group.shard(tree, keep, needs_input_grad=needs_grad, hybrid=recipe.shard == HYBRID)
    host.denoiser.make_room(weights=True)
    return plan
