"""Exact gradients through modules that were written for inference.

This module solves three problems. Weights may have been created under inference mode. Models add residuals in place.
Training must not change the module that the ComfyUI graph holds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

if TYPE_CHECKING:
    from torch import nn

_OUT_OF_PLACE = {}
for _name in ("add", "sub", "mul", "div"):
    _OUT_OF_PLACE[getattr(torch.Tensor, f"{_name}_")] = getattr(torch, _name)
_OUT_OF_PLACE[torch.Tensor.__iadd__] = torch.add
_OUT_OF_PLACE[torch.Tensor.__isub__] = torch.sub
_OUT_OF_PLACE[torch.Tensor.__imul__] = torch.mul
_OUT_OF_PLACE[torch.Tensor.__itruediv__] = torch.div


class OutOfPlace(TorchFunctionMode):
    """Mode that replaces in-place arithmetic such as `x += y` by a new tensor while gradients are recorded.

    If code changes a tensor in place after autograd saved it, the backward fails. If a checkpoint's recomputation
    repeats the change, the gradient is silently wrong. The replacement is correct only for statements that rebind
    their left side. The gradient checks in the tests cover this for each architecture.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every torch call passes through here, so calls that need no change and have no keywords return first.
        plain = _OUT_OF_PLACE.get(func)
        if plain is None:
            if not kwargs:
                return func(*args)
            if kwargs.get("out") is not None and torch.is_grad_enabled() and _recorded(args):
                # Autograd does not record operations that write to `out`.
                kwargs = {name: value for name, value in kwargs.items() if name != "out"}
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        result = plain(*args, **(kwargs or {}))
        # The in-place operation keeps the dtype. Without this cast, activations would grow under half precision.
        return result if result.dtype == args[0].dtype else result.to(args[0].dtype)


@contextmanager
def out_of_place_suspended() -> Iterator[None]:
    """Suspend the innermost `OutOfPlace` modes in the block."""
    with ExitStack() as stack:
        while isinstance(_get_current_function_mode(), OutOfPlace):
            stack.enter_context(_pop_mode_temporarily())
        yield


def _recorded(args) -> bool:
    return any(torch.is_tensor(value) and value.requires_grad for value in args)


def own_weights(module: nn.Module) -> None:
    """Replace parameters and buffers created under inference mode by ordinary ones with the same values.

    Replaces them one at a time, so that memory never holds all weights twice. Call it outside inference mode.
    """
    done: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for slots, make in ((owner._parameters, _ordinary_parameter), (owner._buffers, _ordinary_buffer)):
            for name, tensor in list(slots.items()):
                if tensor is None or not tensor.is_inference():
                    continue
                if id(tensor) not in done:
                    done[id(tensor)] = make(tensor)
                slots[name] = done[id(tensor)]


def _ordinary_parameter(tensor):
    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)


def _ordinary_buffer(tensor):
    return tensor.detach().clone()


def private_tree(module: nn.Module) -> nn.Module:
    """Copy a module's structure over the same storages. Changes to the copy's structure do not reach the original.

    Args:
        module: a module with ordinary weights (see `own_weights`).

    Returns:
        A module tree with frozen parameters, ready for adapters.
    """
    memo: dict[int, object] = {}
    for tensor in module.parameters():
        memo[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    for tensor in module.buffers():
        memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(module, memo)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are worth checkpointing: the members of the outermost lists of blocks.

    A `Sequential` member is replaced by its own members, because some models iterate over it instead of calling it.
    Blocks without parameters are left out.
    """
    from torch import nn

    blocks = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for member in child.children():
                blocks.extend(_callable_members(member))
        elif isinstance(child, nn.ModuleDict):
            blocks.extend(child.children())
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            blocks.extend(blocks_of(child))
    return [block for block in blocks if any(True for _ in block.parameters())]


def _callable_members(member: nn.Module) -> list[nn.Module]:
    from torch import nn

    if isinstance(member, (nn.ModuleList, nn.Sequential)):
        return [inner for child in member.children() for inner in _callable_members(child)]
    return [member]
