"""Placement of the weights, and fallbacks after an out-of-memory error, cheapest first. None changes the result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch

from ..errors import OutOfMemory, in_one_line, is_out_of_memory
from ..memory.autograd import blocks_of
from ..memory.checkpointing import checkpoint_blocks, forget_attention, is_checkpointed, keeps_attention
from ..memory.offload import Tree, list_frozen, offload_trees
from ..memory.quantization import saved_by_nf4
from ..methods import METHODS
from ..recipe.options import AS_IT_IS, HYBRID, NF4, SHARDED
from ..steps.step import crop_sample, loss_terms, micro_batches

if TYPE_CHECKING:
    from torch import nn

    from ..preprocessing.items import DatasetItem
    from ..protocols import Host
    from ..runs.run import Run
    from ..steps.plan import Plan

log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")

# If no fallback is left, try pictures cropped to these fractions of their sides, to tell the user what fits.
_FRACTIONS = (0.75, 0.5, 0.25)


def trees_of(plan: Plan, host: Host) -> list[nn.Module]:
    """Return the module trees that gradients pass through."""
    return [tree for tree, _ in placed_trees(plan, host)]


def placed_trees(plan: Plan, host: Host) -> list[Tree]:
    """Return the module trees that gradients pass through, each with its device."""
    owners = [host.denoiser, host.text] if plan.recipe.live_text else [host.denoiser]
    return [(owner.module, owner.device) for owner in owners]


def offload_blocks(plan: Plan, run: Run, host: Host) -> str | None:
    """Offload the frozen weights of blocks. Return a description for the log; None if nothing was left to offload."""
    trees = placed_trees(plan, host)
    count, size = offload_trees(
        trees, plan.trainables.values(), run.folder, host.denoiser.pin, plan.recipe.keeps_attention
    )
    if not count:
        return None
    host.denoiser.make_room(weights=True)
    return f"offloaded the frozen weights of {count} blocks ({size / 1e6:.0f} MB)"


def place_weights(plan: Plan, run: Run, host: Host, read_later: Sequence[nn.Parameter] = ()) -> Plan:
    """Offload or shard the weights as the recipe says, but not `read_later`. Return the plan, perhaps with shards."""
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


class OOMFallback:
    """The out-of-memory fallbacks of one run.

    Attributes:
        plan: the run's plan, with the micro-batch that fits.
    """

    def __init__(self, plan: Plan, run: Run, host: Host, in_backward: bool):
        self.plan = plan
        self._run = run
        self._host = host
        # With updates in the backward, gradients cannot accumulate over micro-batches.
        self._can_split = not in_backward
        self._has_made_room = False
        self._applied: list[str] = []

    def run(self, work: Callable[..., Outcome], undo: Callable[[], None], step: int, *args) -> Outcome:
        """Call `work`. After each out-of-memory error, apply the next fallback and call it again.

        Args:
            work: called with the plan and `args`.
            undo: called after each out-of-memory error; an error that it raises ends the attempt.
            step: number of the step, for messages.

        Raises:
            OutOfMemory: no fallback is left.
            Any other error of `work`.
        """
        while True:
            try:
                return work(self.plan, *args)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                message = in_one_line(error)
            # Outside the except block: the exception keeps the tensors of `work` alive.
            undo()
            if self._host.group.lockstep:
                # The other processes are within the step and would not repeat it.
                raise self._refusal(message, step)
            self._apply_next(message, step)

    def _apply_next(self, message: str, step: int) -> None:
        fallbacks = (
            self._make_room,
            self._checkpoint,
            self._recompute_attention,
            self._halve_micro_batch,
            self._offload,
        )
        for fallback in fallbacks:
            description = fallback()
            if description is not None:
                self._applied.append(description)
                self._report(message, description, step)
                return
        raise self._refusal(message, step)

    def _report(self, message: str, description: str, step: int) -> None:
        log.warning("Graft: memory ran out in step %d (%s). Graft %s and repeats the step.", step, message, description)
        event = {"event": "memory", "step": step, "done": description, "said": message}
        self._run.log(event)
        self._host.report("memory", event)

    def _make_room(self) -> str | None:
        if self._has_made_room:
            return None
        self._has_made_room = True
        self._host.denoiser.make_room()
        return "moved other models and caches off the device"

    def _checkpoint(self) -> str | None:
        blocks = [block for block in self._blocks() if not is_checkpointed(block)]
        if not blocks:
            return None
        checkpoint_blocks(blocks, self.plan.recipe.keeps_attention)
        return f"turned on checkpointing for {len(blocks)} blocks"

    def _recompute_attention(self) -> str | None:
        count = forget_attention(self._blocks())
        return f"turned on the recomputation of attention in {count} blocks" if count else None

    def _halve_micro_batch(self) -> str | None:
        recipe = self.plan.recipe
        size = min(recipe.micro_batch or recipe.batch_size, recipe.batch_size) // 2
        if not size and recipe.slider_prompts and recipe.micro_batch != 1:
            # The base predicts several prompts for one sample.
            size = 1
        if not size or not self._can_split:
            return None
        self.plan = replace(self.plan, recipe=replace(recipe, micro_batch=size))
        return f"limited the micro-batch to {size} of {recipe.batch_size} pictures"

    def _offload(self) -> str | None:
        if self._host.group.sharded or not list_frozen(placed_trees(self.plan, self._host), self._trainables()):
            return None
        return offload_blocks(self.plan, self._run, self._host)

    def _blocks(self) -> list[nn.Module]:
        return [block for tree in trees_of(self.plan, self._host) for block in blocks_of(tree)]

    def _trainables(self) -> list[torch.Tensor]:
        return list(self.plan.trainables.values())

    def _refusal(self, message: str, step: int) -> OutOfMemory:
        recipe = self.plan.recipe
        tried = f", although Graft {', '.join(self._applied)}" if self._applied else ""
        cures = ["lower the resolution of the dataset"]
        if self._host.group.sharded:
            cures.append("start more processes")
            if not all(is_checkpointed(block) for block in self._blocks()):
                cures.append("set checkpointing to on (Graft Memory Options)")
            elif any(keeps_attention(block) for block in self._blocks()):
                cures.append("set recompute to everything (Graft Memory Options)")
        if METHODS[recipe.method].in_backward:
            cures.append("train a LoRA, or all weights with Adafactor in bf16")
        elif recipe.base_dtype == AS_IT_IS and self._is_smaller_in_nf4():
            cures.append(f"set base_dtype to {NF4} (Graft Memory Options), which makes another run")
        if recipe.rank:
            cures.append("choose a lower rank or fewer layers (targets of Graft Adapter Options)")
        return OutOfMemory(
            f"Memory ran out in step {step} ({message}){tried}.",
            f"{self._what_fits()}To train with this memory, {', or '.join(cures)}. Graft has kept the saves: queue the "
            "graph again to resume.",
            "dataset",
        )

    def _is_smaller_in_nf4(self) -> bool:
        blocks = blocks_of(self._host.denoiser.module)
        frozen = {id(weight) for block in blocks for weight in block.parameters() if not weight.requires_grad}
        return any(saved_by_nf4(block, frozen)[0] > 0 for block in blocks)

    def _what_fits(self) -> str:
        """Measure a picture size that fits in memory. Return a sentence that names it; empty if none fits."""
        if not self._can_split or self._host.group.lockstep:
            # Updates in the backward need less memory than this trial, which holds all gradients at once. And with
            # sharded weights, one process alone cannot run a forward pass.
            return ""
        largest = max(self.plan.train, key=lambda item: item.volume)
        for fraction in _FRACTIONS:
            self._host.denoiser.make_room()
            size = self._size_if_fits(largest, fraction)
            if size is not None:
                return f"Pictures of {size[0]} x {size[1]} fit. "
        return ""

    def _size_if_fits(self, item: DatasetItem, fraction: float) -> tuple[int, int] | None:
        """Return (width, height) in pixels of an item cropped to a fraction of its sides; None if it does not fit."""
        sample = item.show(0)
        cropped = crop_sample(sample, fraction)
        trainables = [parameter for parameter in self._trainables() if parameter.requires_grad]
        try:
            for batch in micro_batches([cropped], self.plan.recipe, self._host):
                with closing(loss_terms(self.plan, self._host, batch)) as terms:
                    for losses in terms:
                        torch.autograd.grad(losses.sum(), trainables, allow_unused=True)
        except (RuntimeError, ValueError, MemoryError) as error:
            # Only log it: the user sees the error that led here.
            log.info("Graft: pictures of %d %% of the sides do not fit: %s", round(100 * fraction), in_one_line(error))
            return None
        latent, whole = cropped.latent.shape, sample.latent.shape
        return tuple(side * latent[axis] // whole[axis] for side, axis in zip(item.bucket, (-1, -2), strict=True))
