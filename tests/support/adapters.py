"""Random adapters for the tiny MODELs, and the weight differences that the host makes of an adapter."""

from __future__ import annotations

import torch

from . import models


def make_model(name: str):
    """Return a MODEL as a loader passes it on."""
    with torch.inference_mode():
        return models.patcher(name)


def make_adapter(name: str, seed: int = 0, spread: float = 0.2, **fields):
    """Return an adapter with random values on all attention layers, or on the layers that the fields select."""
    from graft_pack.trainers.formats.adapter import Adapter

    with models.in_training(make_model(name), name, spread=spread, seed=seed, **fields) as training:
        made = training.plan.export(training.plan.trainables, 0).adapter
    return Adapter(made, {"modelspec.title": f"{name} {seed}"}, made.native)


def differences(patcher) -> dict[str, torch.Tensor]:
    """Return what a patcher's pending patches add to its weights, by key, computed by the host."""
    import comfy.lora

    weights = dict(patcher.model.named_parameters())
    found = {}
    for key, patches in patcher.patches.items():
        weight = weights[key].detach()
        # In float64, so that the difference shows the adapter and not the sum's rounding.
        value = comfy.lora.calculate_weight(patches, weight.double(), key, intermediate_dtype=torch.float64)
        found[key] = (value - weight.double()).float()
    return found


def added(model, adapter, clip=None, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """Return what an adapter adds to a MODEL's weights when the host's own loader applies it."""
    import comfy.sd

    applied, text = comfy.sd.load_lora_for_models(model, clip, dict(adapter), strength, strength)
    return {**differences(applied), **(differences(text.patcher) if text is not None else {})}
