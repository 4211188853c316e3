"""An adapter that acts in a part of sampling only: the host's own weight hooks, switched by the noise level.

The host patches hooked weights in place when the first step within the range comes and puts them back after the last;
steps outside run on the weights as they are. It keeps hooks on conditionings; here they come from the MODEL alone.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import comfy.hooks
from comfy.patcher_extension import WrappersMP

from ....trainers.errors import ModelError

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

_KEY = "graft_range"

WHOLE = (0.0, 1.0)


def add_in_range(
    model: ModelPatcher, parts: Iterable[tuple[dict, float]], span: tuple[float, float]
) -> tuple[ModelPatcher, set]:
    """A clone with patches that act within a part of sampling, and the keys of those that found a weight.

    Args:
        model: with its weights in place.
        parts: (patches by weight key, strength).
        span: (start, end) in 0..1 of sampling, as the host's percent_to_sigma takes them.
    """
    hook = comfy.hooks.WeightHook(1.0, 0.0)
    # Its weights are handed over here, not looked for when sampling starts.
    hook.need_weight_init = False
    out = model.clone()
    used = set()
    for patches, strength in parts:
        used.update(out.add_hook_patches(hook, patches, strength))
    if used:
        # Each has a key of its own: several ranges may lie on one MODEL.
        key = f"{_KEY}_{uuid.uuid4().hex}"
        out.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, _Within(hook, span))
    return out, used


def refuse_ranged(model: ModelPatcher, input: str, what: str) -> None:
    """Names an adapter upstream that is there for a part of sampling only.

    Args:
        input: of the node.
        what: cannot go with it.

    Raises:
        ModelError: there is one.
    """
    keys = model.wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    if any(isinstance(key, str) and key.startswith(_KEY) for key in keys):
        raise ModelError(
            f"The model carries an adapter for a part of sampling, which {what} cannot count as part of it.",
            "Set start_percent to 0 and end_percent to 1 in the Graft Apply Adapter before this node.",
            input,
        )


class _Within:
    """What wraps the host's prediction for all conditionings of a step."""

    def __init__(self, hook: comfy.hooks.WeightHook, span: tuple[float, float]):
        self._hook = hook
        self._span = span
        self._alone = _with_hook(None, hook)
        # The host patches anew whenever it is given another group: one for each that comes in.
        self._joined: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(self, executor, model, conds: list, x: torch.Tensor, timestep: torch.Tensor, model_options: dict):
        if self._holds(model.model_sampling, float(timestep[0])):
            conds = [
                cond if cond is None else [{**one, "hooks": self._group(one.get("hooks"))} for one in cond]
                for cond in conds
            ]
        return executor(model, conds, x, timestep, model_options)

    def _holds(self, sampling, sigma: float) -> bool:
        """By the rule that the host's ControlNets go by, ends included."""
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in self._span)
        return end <= sigma <= start

    def _group(self, given: comfy.hooks.HookGroup | None) -> comfy.hooks.HookGroup:
        if given is None:
            return self._alone
        if given not in self._joined:
            self._joined[given] = _with_hook(given, self._hook)
        return self._joined[given]


def _with_hook(given: comfy.hooks.HookGroup | None, hook: comfy.hooks.WeightHook) -> comfy.hooks.HookGroup:
    made = comfy.hooks.HookGroup()
    for one in given.hooks if given is not None else ():
        # The same and no clones: the host moves their keyframes on as sampling goes.
        made.add(one)
    made.add(hook)
    return made
