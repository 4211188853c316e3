"""Exact gradients through modules that were written for inference.

Three things stand in the way and are put right here: weights made under inference mode, residuals added in
place, and the wish to leave the graph's own module as it was.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

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
    """Answers `x += y` and its kin with a new tensor while gradients are recorded.

    A tensor that is changed in place after autograd saved it makes the gradient fail, or, when the change is
    repeated in a checkpoint's recomputation, silently wrong. Holds for statements that rebind their left side;
    the gradient checks of the tests say for each architecture whether that is so.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Every call of torch's comes by here; most are none of the two kinds, and have no keywords.
        plain = _OUT_OF_PLACE.get(func)
        if plain is None:
            if not kwargs:
                return func(*args)
            if kwargs.get("out") is not None and torch.is_grad_enabled() and _recorded(args):
                # Into a given tensor autograd does not record at all.
                kwargs = {name: value for name, value in kwargs.items() if name != "out"}
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        result = plain(*args, **(kwargs or {}))
        # In place would have kept the dtype; so must this, or activations grow under half precision.
        return result if result.dtype == args[0].dtype else result.to(args[0].dtype)


def _recorded(args) -> bool:
    return any(torch.is_tensor(value) and value.requires_grad for value in args)


def own_weights(module: nn.Module) -> None:
    """Replaces parameters and buffers made under inference mode by ordinary ones of the same values.

    One at a time, so that the weights are never held twice. Must be called outside inference mode.
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
    """A copy of a module's structure over the same storages; what is done to it does not reach the original.

    Args:
        module: with ordinary weights (see `own_weights`).

    Returns:
        A tree of frozen parameters, to inject adapters into.
    """
    memo: dict[int, object] = {}
    for tensor in module.parameters():
        memo[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=False)
    for tensor in module.buffers():
        memo[id(tensor)] = tensor.detach()
    return copy.deepcopy(module, memo)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The modules at which activations are worth forgetting: the members of the outermost lists of blocks.

    A member that is a `Sequential` is taken apart, since some models iterate over it instead of calling it.
    """
    from torch import nn

    found = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for member in child.children():
                found.extend(_callable_members(member))
        elif isinstance(child, nn.ModuleDict):
            found.extend(child.children())
        elif any(isinstance(inner, nn.ModuleList) for inner in child.modules()):
            found.extend(blocks_of(child))
    return [block for block in found if any(True for _ in block.parameters())]


def _callable_members(member: nn.Module) -> list[nn.Module]:
    from torch import nn

    if isinstance(member, (nn.ModuleList, nn.Sequential)):
        return [inner for child in member.children() for inner in _callable_members(child)]
    return [member]
