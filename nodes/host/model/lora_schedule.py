"""Adapters that act in a part of sampling only: ComfyUI's own weight hooks, switched by the noise level.

ComfyUI patches hooked weights in place at the first step within the range, and restores them after the last. Steps
outside the range run on the unpatched weights. ComfyUI keeps hooks on conditionings; here the MODEL supplies them.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import comfy.hooks
from comfy.patcher_extension import WrappersMP

from ....trainers.errors import ModelError
from .quantization.gguf import is_gguf

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

_KEY = "graft_range"

WHOLE = (0.0, 1.0)


def add_in_range(
    model: ModelPatcher, parts: Iterable[tuple[dict, float]], span: tuple[float, float]
) -> tuple[ModelPatcher, set]:
    """Return a clone with patches that act in a part of sampling, and the keys of the patches that found a weight.

    Args:
        model: classic patcher, with its weights in place.
        parts: (patches by weight key, strength).
        span: (start, end) in 0..1 of sampling, as ComfyUI's percent_to_sigma takes them.

    Raises:
        ModelError: it is a GGUF model.
    """
    if is_gguf(model):
        raise ModelError(
            "ComfyUI cannot switch an adapter on and off during sampling on a GGUF model.",
            "Set start_percent to 0 and end_percent to 1, or load the original checkpoint.",
            "start_percent",
        )
    hook = comfy.hooks.WeightHook(1.0, 0.0)
    # The weights are set below, so ComfyUI need not load them when sampling starts.
    hook.need_weight_init = False
    out = model.clone()
    used = set()
    for patches, strength in parts:
        used.update(out.add_hook_patches(hook, patches, strength))
    if used:
        # Use a unique key: several ranges may be on one MODEL.
        key = f"{_KEY}_{uuid.uuid4().hex}"
        out.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, key, _Within(hook, span))
    return out, used


def refuse_scheduled_lora(model: ModelPatcher, input: str, operation: str) -> None:
    """Refuse a model that carries an adapter for a part of sampling only.

    Args:
        operation: cannot use such a model; the subject of the error's sentence.

    Raises:
        ModelError: the model carries such an adapter.
    """
    keys = model.wrappers.get(WrappersMP.CALC_COND_BATCH, {})
    if any(isinstance(key, str) and key.startswith(_KEY) for key in keys):
        raise ModelError(
            f"The model has an adapter that acts in a part of sampling only; {operation} cannot include it.",
            "In the Graft Apply Adapter before this node, set start_percent to 0 and end_percent to 1.",
            input,
        )


class _Within:
    """A wrapper around ComfyUI's prediction that adds a hook to all conditionings of a step within the range."""

    def __init__(self, hook: comfy.hooks.WeightHook, span: tuple[float, float]):
        self._hook = hook
        self._span = span
        self._alone = _with_hook(None, hook)
        # ComfyUI patches again for every new hook group, so keep one joined group for each group that comes in.
        self._joined: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __call__(self, executor, model, conds: list, x: torch.Tensor, timestep: torch.Tensor, model_options: dict):
        if self._holds(model.model_sampling, float(timestep[0])):
            conds = [
                cond if cond is None else [{**entry, "hooks": self._group(entry.get("hooks"))} for entry in cond]
                for cond in conds
            ]
        return executor(model, conds, x, timestep, model_options)

    def _holds(self, sampling, sigma: float) -> bool:
        """Report whether sigma is in the range, ends included, by the rule of ComfyUI's ControlNets."""
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in self._span)
        return end <= sigma <= start

    def _group(self, given: comfy.hooks.HookGroup | None) -> comfy.hooks.HookGroup:
        if given is None:
            return self._alone
        if given not in self._joined:
            self._joined[given] = _with_hook(given, self._hook)
        return self._joined[given]


def _with_hook(given: comfy.hooks.HookGroup | None, hook: comfy.hooks.WeightHook) -> comfy.hooks.HookGroup:
    group = comfy.hooks.HookGroup()
    for existing in given.hooks if given is not None else ():
        # Add the same hooks, not clones: ComfyUI advances their keyframes during sampling.
        group.add(existing)
    group.add(hook)
    return group
