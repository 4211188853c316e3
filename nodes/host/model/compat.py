"""Patches of ComfyUI for training: no kernels without a backward, the training flag, outputs that stay in place."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
import torch

_KITCHEN = "comfy_kitchen"
_PLAIN = "comfy_kitchen.backends.eager.rope"
_NAMES = tuple(
    f"{kind}_rope{layout}{ends}" for kind in ("apply", "rms") for layout in ("", "_split_half") for ends in ("", "1")
)


@contextmanager
def differentiable_rope() -> Iterator[None]:
    """Replace ComfyUI's kernels for rotary embeddings by their PyTorch reference, which autograd can record.

    Some models of ComfyUI check `model_management.in_training` before they use a kernel; others do not.
    """
    try:
        kitchen, plain = importlib.import_module(_KITCHEN), importlib.import_module(_PLAIN)
    except ImportError:
        yield
        return
    originals = {name: getattr(kitchen, name) for name in _NAMES if hasattr(kitchen, name) and hasattr(plain, name)}
    for name in originals:
        setattr(kitchen, name, getattr(plain, name))
    try:
        yield
    finally:
        for name, kernel in originals.items():
            setattr(kitchen, name, kernel)


@contextmanager
def training_flag(value: bool) -> Iterator[None]:
    """Tell newer ComfyUI versions that a model is or is not being trained; older versions have no such flag."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before = management.in_training
    management.in_training = value
    try:
        yield
    finally:
        management.in_training = before


@contextmanager
def outputs_on(device: torch.device) -> Iterator[None]:
    """Keep the outputs of text encoders on the device that computes them; ComfyUI moves them to the CPU."""
    management = comfy.model_management
    before = management.intermediate_device
    management.intermediate_device = lambda: device
    try:
        yield
    finally:
        management.intermediate_device = before
