"""Newer hosts' own kernels have no backward: while a model is trained they are told, and kept away from them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management

_KITCHEN = "comfy_kitchen"
_PLAIN = "comfy_kitchen.backends.eager.rope"
_NAMES = tuple(
    f"{kind}_rope{layout}{ends}" for kind in ("apply", "rms") for layout in ("", "_split_half") for ends in ("", "1")
)


@contextmanager
def differentiable() -> Iterator[None]:
    """Within it calls for rotary embeddings reach the kernels' own reference in PyTorch, which autograd records.

    The host asks `model_management.in_training` in some models before it takes a kernel, and in others not at all.
    """
    try:
        kitchen, plain = importlib.import_module(_KITCHEN), importlib.import_module(_PLAIN)
    except ImportError:
        yield
        return
    before = {name: getattr(kitchen, name) for name in _NAMES if hasattr(kitchen, name) and hasattr(plain, name)}
    for name in before:
        setattr(kitchen, name, getattr(plain, name))
    try:
        yield
    finally:
        for name, kernel in before.items():
            setattr(kitchen, name, kernel)


@contextmanager
def training_flag(value: bool) -> Iterator[None]:
    """Within it newer hosts know that a model is trained, or that it is not; older ones do not ask."""
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
