"""Patches of ComfyUI for training: no kernels without a backward, the training flag, outputs that stay in place."""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.lightricks.model
import comfy.model_management
import torch

from ....trainers.memory.autograd import out_of_place_suspended

_LIGHTRICKS = "comfy.ldm.lightricks."
_BLOCKS = ("BasicTransformerBlock", "BasicAVTransformerBlock")
_ROTARY = ("apply_rotary_emb", "apply_rotary_emb_qk")
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
def recorded_blocks(network: torch.nn.Module) -> Iterator[None]:
    """Let autograd record the blocks of Lightricks' networks, which add in place without binding the result.

    Norms save copies of their inputs, which `addcmul_` changes. Blocks start with copies of their inputs: a
    recomputation needs the inputs as they were. Blocks for picture and sound bind no result of `add_` either, so they
    really add in place. Rotary embeddings round as at inference.

    Args:
        network: a private tree.
    """
    if not type(network).__module__.startswith(_LIGHTRICKS):
        yield
        return
    for block in network.modules():
        if type(block).__name__ in _BLOCKS:
            block.forward = functools.partial(_forward_of_copy, block.forward)
    common, lightricks = comfy.ldm.common_dit, comfy.ldm.lightricks.model
    patches = [(common, "rms_norm", _norm_of_copy)]
    patches += [(lightricks, name, _as_at_inference) for name in _ROTARY if hasattr(lightricks, name)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for (owner, name, original), (_, _, patch) in zip(originals, patches, strict=True):
        setattr(owner, name, functools.partial(patch, original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _norm_of_copy(norm: Callable, values: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    copied = values.clone() if torch.is_grad_enabled() and values.requires_grad else values
    return norm(copied, *args, **kwargs)


def _as_at_inference(function: Callable, *args) -> Any:
    with training_flag(False):
        return function(*args)


def _forward_of_copy(forward: Callable, latents: torch.Tensor | tuple[torch.Tensor, ...], *args, **kwargs) -> Any:
    if torch.is_tensor(latents):
        return forward(latents.clone(), *args, **kwargs)
    with out_of_place_suspended():
        return forward(tuple(latent.clone() for latent in latents), *args, **kwargs)


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
